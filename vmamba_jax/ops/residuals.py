"""What a gradient keeps of the forward pass, and the order it computes in.

A block is differentiated under ``jax.checkpoint(block, policy=POLICIES[name])``: it keeps what is
marked here, as far as the name says, and computes the rest again.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Literal, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

_DEAR, _CONVOLUTION = "vmamba_jax", "vmamba_jax_convolution"
T = TypeVar("T")

keep = partial(checkpoint_name, name=_DEAR)
"""Marks arrays that are dear to compute again: products, scans; and what stands for them."""

keep_convolution = partial(checkpoint_name, name=_CONVOLUTION)
"""Marks what a depthwise convolution pads and returns: a hundredth of a block's operations."""

Recompute = Literal["activations", "convolutions", "blocks"]

POLICIES: Mapping[str, Callable[..., bool] | None] = MappingProxyType(
    {
        "activations": jax.checkpoint_policies.save_only_these_names(_DEAR, _CONVOLUTION),
        "convolutions": jax.checkpoint_policies.save_only_these_names(_DEAR),
        "blocks": None,
    }
)
"""What is computed again: activations and normalisations; depthwise convolutions too; all of it."""


def together(arrays: T) -> T:
    """The same arrays; on a CPU none of them can be used before all are computed.

    A single array is computed once, where XLA for CPU would compute it in each operation that reads
    it. Of a layer's gradients it would compute the weights' at the very end, and keep alive until
    then all that they need. And what a gradient computes again it would compute beforehand, and
    keep. Elsewhere this would hold up the exchange of gradients between devices.
    """
    return jax.lax.platform_dependent(
        arrays, cpu=jax.lax.optimization_barrier, default=lambda arrays: arrays
    )

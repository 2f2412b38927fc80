"""What a gradient keeps of the forward pass, and the order it computes in.

A block is differentiated under ``jax.checkpoint(block, policy=KEPT)``: it keeps what `keep` marks,
the results of products, convolutions and scans, and computes normalisations and activations again.
"""

from functools import partial
from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "vmamba_jax"
T = TypeVar("T")

keep = partial(checkpoint_name, name=_NAME)
"""Marks arrays that are dearer to compute again than to keep."""

KEPT = jax.checkpoint_policies.save_only_these_names(_NAME)


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

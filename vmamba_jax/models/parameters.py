"""A model's parameters by their paths: their shapes, and where in the network they are."""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from vmamba_jax.config import VMambaConfig
from vmamba_jax.models.vssm import VSSM

Path = tuple[str, ...]
"""Such as ``("params", "layers_0_blocks_1", "op", "Ds")``."""

_PLACE = re.compile(r"layers_(\d+)_(?:blocks_(\d+)|downsample)")


@functools.lru_cache(maxsize=64)
def variable_shapes(config: VMambaConfig) -> Mapping[Path, tuple[int, ...]]:
    """The shape of every parameter and statistic of a VSSM, in the order of its tree."""
    side = config.patch_size * 2 ** len(config.depths)
    size = config.input_size if config.posembed else (side, side)
    images = jax.ShapeDtypeStruct((1, *size, config.in_chans), jnp.float32)
    # The blocks of a stage are alike, and tracing all of a deep model takes seconds.
    one_each = config.replace(depths=(1,) * len(config.depths))
    tree: Any = jax.eval_shape(VSSM(one_each).init, jax.random.key(0), images)
    flat: dict[Path, Any] = flax.traverse_util.flatten_dict(dict(tree))
    return MappingProxyType(
        {
            path: leaf.shape
            for first, leaf in flat.items()
            for path in _in_every_block(first, config)
        }
    )


def place_of(module: str) -> tuple[int, int | None] | None:
    """Stage and block of a module of VSSM; a downsampling has no block, the rest no place.

    Args:
        module: its name, such as ``"layers_2_blocks_0"`` or ``"layers_2_downsample"``.
    """
    if (match := _PLACE.fullmatch(module)) is None:
        return None
    stage, block = match.groups()
    return int(stage), None if block is None else int(block)


def _in_every_block(path: Path, config: VMambaConfig) -> list[Path]:
    """The paths of a leaf of a stage's first block in all the stage's blocks."""
    collection, module, *rest = path
    place = place_of(module)
    if place is None or place[1] is None:
        return [path]
    stage = place[0]
    blocks = range(config.depths[stage])
    return [(collection, f"layers_{stage}_blocks_{block}", *rest) for block in blocks]

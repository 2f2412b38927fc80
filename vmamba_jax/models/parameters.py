"""A model's parameters by their paths: their shapes, and where in the network they are."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
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
    return MappingProxyType(network_shapes(VSSM, config))


def network_shapes(
    network: Callable[[VMambaConfig], nn.Module], config: VMambaConfig
) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter and statistic of a network that holds one VMamba.

    Args:
        network: builds it around a VMamba.
        config: that VMamba.

    Returns:
        Shapes by path, in the order of the network's tree.
    """
    side = config.patch_size * 2 ** len(config.depths)
    size = config.input_size if config.posembed else (side, side)
    images = jax.ShapeDtypeStruct((1, *size, config.in_chans), jnp.float32)
    # The blocks of a stage are alike, and tracing all of a deep model takes seconds.
    one_each = config.replace(depths=(1,) * len(config.depths))
    # So does tracing a scan for each platform, and this one is traced soonest.
    module: Any = network(one_each).clone(scan_implementation="reference")
    tree: Any = jax.eval_shape(module.init, jax.random.key(0), images)
    flat: dict[Path, Any] = flax.traverse_util.flatten_dict(dict(tree))
    return {
        path: leaf.shape for first, leaf in flat.items() for path in _in_every_block(first, config)
    }


def layer_index(path: Sequence[str], depths: Sequence[int]) -> int:
    """How deep in a network a parameter lies, for learning rates that decay layer by layer.

    The patch embedding is layer 0, every block is one layer, a downsampling belongs to the last
    block before it; all else (norms of the backbone's maps, classifier, heads, decoder) is the
    layer after the last block (Bao et al., "BEiT", 2021).

    Args:
        path: names from the root of the parameters to the leaf; the VMamba may lie at any depth.
        depths: blocks in each stage.

    Returns:
        Between 0 and ``sum(depths) + 1``.
    """
    for name in path:
        if name in ("patch_embed", "pos_embed"):
            return 0
        if (place := place_of(name)) is not None:
            stage, block = place
            return sum(depths[:stage]) + (depths[stage] if block is None else block + 1)
    return sum(depths) + 1


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
    for i, module in enumerate(path):
        place = place_of(module)
        if place is not None and place[1] is not None:
            stage = place[0]
            return [
                (*path[:i], f"layers_{stage}_blocks_{block}", *path[i + 1 :])
                for block in range(config.depths[stage])
            ]
    return [path]

"""What the scan of a block reads, taken out of a model as it runs and without changing it."""

from typing import Any

import flax.linen as nn
import jax

from vmamba_jax.config import VMambaConfig
from vmamba_jax.models import SS2D, VSSM
from vmamba_jax.typing import Array, FeatureMap, Variables

_NAME = "scan_input"
_CORES = ("_scan", "_mamba2")


def resolve_stage(config: VMambaConfig, stage: int) -> int:
    """A stage counted from 0, also where -1 means the last one.

    Raises:
        ValueError: if there is no such stage.
    """
    stages = len(config.depths)
    if not -stages <= stage < stages:
        raise ValueError(f"stage {stage}: the model has the stages 0 to {stages - 1}")
    return stage % stages


def resolve_block(config: VMambaConfig, stage: int, block: int) -> tuple[int, int]:
    """A stage and a block in it, counted from 0, also where -1 means the last one.

    Raises:
        ValueError: if there is no such stage or block, or the model's blocks have no scan.
    """
    stage = resolve_stage(config, stage)
    blocks = config.depths[stage]
    if not -blocks <= block < blocks:
        raise ValueError(f"block {block}: stage {stage} has the blocks 0 to {blocks - 1}")
    if config.ssm_ratio <= 0:
        raise ValueError("the blocks of this model have no scan (ssm_ratio is 0)")
    return stage, block % blocks


def scan_input(
    model: VSSM, variables: Variables, images: Array, *, stage: int = -1, block: int = -1
) -> FeatureMap:
    """The map that the scan of one block reads: after projection, convolution and activation.

    Args:
        model: the model.
        variables: its weights.
        images: (B, H, W, 3), normalised.
        stage: which stage; -1 is the last.
        block: which of its blocks; -1 is the last.

    Returns:
        (B, h, w, C) with the inner channels of SS2D, in the model's compute dtype.

    Raises:
        ValueError: for a stage or a block that the model lacks.
    """
    stage, block = resolve_block(model.config, stage, block)

    def keep_input(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, SS2D) and context.method_name in _CORES:
            # A value would not survive the block's inner jit; the collection leaves it.
            context.module.sow("intermediates", _NAME, args[0])
        return next_method(*args, **kwargs)

    # Blocks in a loop have no modules of their own to look into.
    model = model.clone(scan_blocks=False)
    with nn.intercept_methods(keep_input):
        kept: Any = model.apply(
            variables, images, out_indices=(stage,), method="features", mutable="intermediates"
        )[1]
    return kept["intermediates"][f"layers_{stage}_blocks_{block}"]["op"][_NAME][0]


def block_weights(variables: Variables, stage: int, block: int) -> dict[str, jax.Array]:
    """The parameters of the SS2D in one block, under the module's own names."""
    return variables["params"][f"layers_{stage}_blocks_{block}"]["op"]

"""The published segmentation recipe's optimizer: AdamW, linear warm-up, linear decay to 0."""

from typing import Any, NamedTuple

import flax.traverse_util
import jax
import optax

from vmamba_jax.convert.upernet import upernet_weights
from vmamba_jax.segmentation import UPerNetConfig
from vmamba_jax.training.optimizer import adamw
from vmamba_jax.training.segmentation_config import SegmentationOptimizer

PyTree = Any


class LinearSchedule(NamedTuple):
    """Linear warm-up, then a straight line to 0 at the last update; on the host, in float64.

    It is the one of mmengine's ``LinearLR`` and ``PolyLR`` (power 1), which both reach their end
    with their last update.

    Attributes:
        peak: learning rate after the warm-up.
        warmup_factor: the first update's share of the peak.
        warmup_updates: updates of warm-up; the last one has the peak already.
        updates: length of the run.
    """

    peak: float
    warmup_factor: float
    warmup_updates: int
    updates: int

    def __call__(self, update: int) -> float:
        """The learning rate that update number `update` (from 0) uses."""
        if update < self.warmup_updates:
            done = update / max(self.warmup_updates - 1, 1)
            return self.peak * (self.warmup_factor + (1 - self.warmup_factor) * done)
        left = self.updates - 1 - update
        return self.peak * max(left, 0) / max(self.updates - 1 - self.warmup_updates, 1)


def make_linear_schedule(config: SegmentationOptimizer, updates: int) -> LinearSchedule:
    """The schedule of a run.

    Raises:
        ValueError: if the warm-up fills the whole run.
    """
    if config.warmup_updates >= updates:
        raise ValueError(
            f"the run has {updates} updates and {config.warmup_updates} of them are warm-up: "
            "raise updates or lower optimizer.warmup-updates"
        )
    return LinearSchedule(
        config.learning_rate, config.warmup_factor, config.warmup_updates, updates
    )


def make_segmentation_optimizer(
    config: SegmentationOptimizer, model_config: UPerNetConfig
) -> optax.GradientTransformationExtraArgs:
    """AdamW that decays every parameter but those with "norm" in their PyTorch name.

    So biases, heads' BatchNorms (``bn``) and the numbered norms of patch embedding and
    downsampling are decayed, as they were in the published runs.

    Args:
        config: hyper-parameters.
        model_config: the segmenter whose parameters are optimised.

    Returns:
        An optax transformation; call ``update(grads, state, params, learning_rate=...)``.
    """
    weights = [weight for weight in upernet_weights(model_config) if weight.path[0] == "params"]
    decayed = flax.traverse_util.unflatten_dict(
        {weight.path[1:]: "norm" not in weight.key for weight in weights}
    )
    return adamw(
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        decayed=decayed,
        scales=jax.tree.map(lambda _: 1.0, decayed),
    )

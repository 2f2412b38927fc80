"""Builds detectors by the name of their backbone."""

import jax
import jax.numpy as jnp

from vmamba_jax.detection.config import InferenceConfig, MaskRCNNConfig
from vmamba_jax.detection.mask_rcnn import MaskRCNN
from vmamba_jax.registry import model_config
from vmamba_jax.typing import Array, Dtype, Variables


def create_detector(
    name: str,
    *,
    num_classes: int = 80,
    inference: InferenceConfig | None = None,
    dtype: Dtype = jnp.float32,
    rng: Array | None = None,
) -> tuple[MaskRCNN, Variables]:
    """Builds a Mask R-CNN on a registered model and its initial variables.

    Args:
        name: one of `list_models`.
        num_classes: of objects, without the background.
        inference: how the outputs become detections; None: as the released detectors'.
        dtype: compute dtype; parameters are float32.
        rng: key of the initial values; None: ``jax.random.key(0)``.

    Returns:
        The module, and its variables for ``model.apply``.

    Raises:
        ValueError: for an unknown model.
    """
    config = MaskRCNNConfig(model_config(name).replace(num_classes=0), num_classes=num_classes)
    model = MaskRCNN(config, inference or InferenceConfig(), dtype=dtype)
    side = config.strides[-1]
    images = jnp.zeros((1, side, side, config.backbone.in_chans), jnp.float32)
    sizes = jnp.full((1, 2), side, jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0) if rng is None else rng, images, sizes)
    return model, variables

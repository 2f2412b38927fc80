"""Builds a detector by the name of its backbone."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from vmamba_jax.detection.config import InferenceConfig, MaskRCNNConfig
from vmamba_jax.detection.mask_rcnn import MaskRCNN
from vmamba_jax.registry import model_config
from vmamba_jax.typing import Array, Dtype, Variables


def create_detector(
    name: str,
    *,
    pretrained: str | os.PathLike[str] | None = None,
    num_classes: int = 80,
    inference: InferenceConfig | None = None,
    dtype: Dtype = jnp.float32,
    rng: Array | None = None,
    **config_overrides: object,
) -> tuple[MaskRCNN, Variables]:
    """Builds a Mask R-CNN on a registered VMamba, and its initial variables.

    Args:
        name: of the backbone, one of `list_models`.
        pretrained: the address of a checkpoint, or a path to one: a detector's, whose last layers
            start anew for another number of classes; or a classifier's or segmenter's, whose
            backbone is taken. A log message names what starts anew.
        num_classes: of objects, without the background; COCO has 80.
        inference: how the outputs become detections; None: as the released detectors'.
        dtype: compute dtype; parameters are float32.
        rng: key of the initial values; None: ``jax.random.key(0)``.
        **config_overrides: other fields of `MaskRCNNConfig` (without `backbone`), or of
            `VMambaConfig` for the backbone.

    Returns:
        The module, and its variables for ``model.apply``.

    Raises:
        ValueError: for an unknown model or field, or a value that a field can't take; as
            `vmamba_jax.convert.CheckpointError` for pretrained weights that can't be had or don't
            fit.
        OSError: if the pretrained weights can't be read.
    """
    own = {field.name for field in dataclasses.fields(MaskRCNNConfig)} - {"backbone"}
    heads = {key: config_overrides.pop(key) for key in own & config_overrides.keys()}
    backbone = model_config(name).replace(num_classes=0, posembed=False, **config_overrides)
    config = MaskRCNNConfig(backbone, num_classes).replace(**heads)
    model = MaskRCNN(config, inference or InferenceConfig(), dtype=dtype)
    key = jax.random.key(0) if rng is None else rng

    def fresh() -> Variables:
        side = config.strides[-1]
        images = jnp.zeros((1, side, side, backbone.in_chans), jnp.float32)
        return jax.jit(model.init)(key, images, jnp.full((1, 2), side, jnp.int32))

    if pretrained is None:
        return model, fresh()
    # Files, network and Orbax are loaded only when asked for.
    from vmamba_jax.convert.pretrained import load_network  # noqa: PLC0415

    seed = 0 if rng is None else int(jax.random.bits(rng))
    variables = load_network(pretrained, config, name, fresh, seed)
    return model, jax.tree.map(jnp.asarray, variables)

"""Named architectures: the nine released models, the default one, and a small one for the demo."""

import fnmatch
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vmamba_jax._closest import closest
from vmamba_jax.config import VMambaConfig
from vmamba_jax.models import VSSM, VSSMBackbone
from vmamba_jax.typing import Array, Dtype, Variables

_registry: dict[str, VMambaConfig] = {}


def register_model(name: str, config: VMambaConfig) -> None:
    """Gives an architecture a name for `create_model`.

    Raises:
        ValueError: if the name stands for another architecture already.
    """
    if _registry.setdefault(name, config) != config:
        raise ValueError(f"model {name!r} is registered already, with another config")


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_registry, pattern))


def model_config(name: str) -> VMambaConfig:
    """The architecture behind a name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _registry:
        raise ValueError(f"unknown model {name!r}." + closest(name, list_models()))
    return _registry[name]


def create_model(
    name: str,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Dtype = jnp.float32,
    rng: Array | None = None,
    **config_overrides: object,
) -> tuple[VSSM, Variables]:
    """Builds a registered model and its initial variables.

    Args:
        name: one of `list_models`.
        pretrained: True for the weights that were released under this name, fetched once and
            kept; or the address of a checkpoint, or a path to one, to a training run of this
            package (its best checkpoint, the moving average where there is one) or to one of its
            checkpoints. A head of another number of classes starts anew, and a first convolution
            for RGB images is fitted to other `in_chans`.
        num_classes: classes of the head; 0 leaves it out: the model returns pooled features. None:
            as registered, 1000 for the released models.
        image_size: side of the image that a position embedding is made for, in pixels, or its
            height and width. Models without one (all released ones) take any size. None: as
            registered.
        dtype: compute dtype; parameters are float32.
        rng: key of the initial values; None: ``jax.random.key(0)``.
        **config_overrides: other fields of `VMambaConfig`.

    Returns:
        The module, and its variables for ``model.apply``.

    Raises:
        ValueError: for an unknown model or field, or a value that a field can't take; as
            `vmamba_jax.convert.CheckpointError` for pretrained weights that can't be had or don't
            fit.
        OSError: if the pretrained weights can't be read.
    """
    given = {"num_classes": num_classes, "imgsize": image_size}
    given = {field: value for field, value in given.items() if value is not None}
    config = model_config(name).replace(**given, **config_overrides)
    model = VSSM(config, dtype=dtype)
    if pretrained:
        # Files, network and Orbax are loaded only when asked for.
        from vmamba_jax.convert.pretrained import load_pretrained  # noqa: PLC0415

        seed = 0 if rng is None else int(jax.random.bits(rng))
        variables = load_pretrained(pretrained, config, name, seed)
        return model, jax.tree.map(jnp.asarray, variables)
    images = jnp.zeros((1, *config.input_size, config.in_chans), jnp.float32)
    # Compiled, the forward pass that Linen runs to find the shapes is dropped as dead code.
    variables = jax.jit(model.init)(jax.random.key(0) if rng is None else rng, images)
    return model, variables


def create_backbone(
    name: str,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    out_indices: Sequence[int] | None = None,
    dtype: Dtype = jnp.float32,
    rng: Array | None = None,
    **config_overrides: object,
) -> tuple[VSSMBackbone, Variables]:
    """Builds a registered model without its classifier, for a detector, segmenter or decoder.

    Args:
        name: one of `list_models`.
        pretrained: True for the weights that were released under this name, fetched once and
            kept; or the address of a checkpoint, or a path to one: a classifier's, or a
            segmenter's or detector's, whose backbone is taken. Norms of the maps that it has not
            start anew, and a log message says so.
        out_indices: the stages whose maps are returned; None: all.
        dtype: compute dtype; parameters are float32.
        rng: key of the initial values; None: ``jax.random.key(0)``.
        **config_overrides: other fields of `VMambaConfig`.

    Returns:
        The module, whose `feature_info` tells each map's channels and stride, and its variables
        for ``backbone.apply``.

    Raises:
        ValueError: for an unknown model, field or stage, or a value that a field can't take; as
            `vmamba_jax.convert.CheckpointError` for pretrained weights that can't be had or don't
            fit.
        OSError: if the pretrained weights can't be read.
    """
    config = model_config(name).replace(**config_overrides)
    if out_indices is None:
        out_indices = range(len(config.depths))
    backbone = VSSMBackbone(config, tuple(out_indices), dtype=dtype)
    if pretrained:
        # Files, network and Orbax are loaded only when asked for.
        from vmamba_jax.convert.pretrained import load_backbone  # noqa: PLC0415

        variables = load_backbone(pretrained, config, name, backbone.out_indices)
        return backbone, jax.tree.map(jnp.asarray, variables)
    images = jnp.zeros((1, *config.input_size, config.in_chans), jnp.float32)
    variables = jax.jit(backbone.init)(jax.random.key(0) if rng is None else rng, images)
    return backbone, variables


def _register_released() -> None:
    vanilla = VMambaConfig(
        ssm_d_state=16,
        ssm_ratio=2.0,
        ssm_conv_bias=True,
        forward_type="v0",
        mlp_ratio=0.0,
        downsample_version="v1",
        patchembed_version="v1",
        norm_layer="ln",
    )
    later = VMambaConfig(
        ssm_d_state=1,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        mlp_ratio=4.0,
        downsample_version="v3",
        patchembed_version="v2",
        norm_layer="ln2d",
    )
    s1, s2 = later.replace(ssm_ratio=1.0), later.replace(ssm_ratio=2.0)
    # name: (family, blocks in the third stage, channels of the first, drop path rate)
    released = {
        "vanilla_vmamba_tiny": (vanilla, 9, 96, 0.2),
        "vanilla_vmamba_small": (vanilla, 27, 96, 0.3),
        "vanilla_vmamba_base": (vanilla, 27, 128, 0.6),
        "vmamba_tiny_s2l5": (s2, 5, 96, 0.2),
        "vmamba_small_s2l15": (s2, 15, 96, 0.3),
        "vmamba_base_s2l15": (s2, 15, 128, 0.6),
        "vmamba_tiny_s1l8": (s1, 8, 96, 0.2),
        "vmamba_small_s1l20": (s1, 20, 96, 0.3),
        "vmamba_base_s1l20": (s1, 20, 128, 0.5),
    }
    for name, (family, depth, dim, drop_path) in released.items():
        dims = tuple(dim * 2**i for i in range(4))
        config = family.replace(depths=(2, 2, depth, 2), dims=dims, drop_path_rate=drop_path)
        register_model(name, config)


_register_released()
register_model("vssm_tiny_default", VMambaConfig(forward_type="v3"))
register_model(
    "vmamba_digits",
    VMambaConfig(
        depths=(1, 2),
        dims=(32, 64),
        num_classes=10,
        ssm_d_state=1,
        ssm_ratio=1.0,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        downsample_version="v3",
        patchembed_version="v2",
        mlp_ratio=2.0,
        imgsize=32,
    ),
)
register_model(
    "vmamba_photos",
    VMambaConfig(
        depths=(1, 1, 1),
        dims=(32, 64, 128),
        ssm_d_state=1,
        ssm_ratio=1.0,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        downsample_version="v3",
        patchembed_version="v2",
        mlp_ratio=2.0,
        imgsize=96,
    ),
)

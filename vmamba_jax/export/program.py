"""A network as a program of StableHLO, written by `jax.export`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.export import Exported, export, symbolic_shape

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.artifact import describe_model
from vmamba_jax.convert.tasks import DETECTION, NetworkConfig, task_of
from vmamba_jax.export.artifact import (
    PROGRAM,
    TPU_PROGRAM,
    WEIGHTS,
    refuse_existing,
    save_exported,
)
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.segmentation.upernet import SegmenterLogits
from vmamba_jax.typing import Array, Variables

Platform = Literal["cpu", "cuda", "rocm", "tpu"]
WeightDtype = Literal["float32", "bfloat16"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)

# Of the others, the scan's decay rates and step sizes, biases and norms, bfloat16 would save
# nothing that counts.
_MATRICES = ("kernel", "x_proj_weight", "dt_projs_weight")


def export_model(
    path: str | os.PathLike[str],
    variables: Variables,
    config: NetworkConfig,
    *,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = (224, 224),
    platforms: Sequence[Platform] = ("cpu", "cuda", "tpu"),
    weight_dtype: WeightDtype = "float32",
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model that runs without this package: see `vmamba_jax.export.artifact`.

    Each platform gets its own scan, as in `vmamba_jax.ops.selective_scan`. The TPU's kernel is
    built for one size: it is in programs of a fixed batch and image size, and then apart from the
    other platforms'; where a size is open, TPUs take the parallel prefix.

    Args:
        path: a file that does not exist yet; ``.npz`` by custom.
        variables: float32 variable collections, on devices or host.
        config: the architecture they belong to, of a classifier, a bare backbone or a segmenter.
        batch_size: None leaves it open.
        image_size: height and width in pixels; None leaves both open, in multiples of what one
            position of the last stage covers.
        platforms: what it has to run on.
        weight_dtype: how matrices are stored: ``"bfloat16"`` rounds them, for half the size; they
            are widened when the program runs, and all computation stays float32.
        class_names: names of the classes in the head's order.
        preprocessing: what images have to go through.
        provenance: where the weights came from, as JSON types.

    Raises:
        CheckpointError: if something is at `path` already.
        ValueError: for a detector, a size that the model can't take, or no platforms.
        OSError: if it can't be written.
    """
    path = refuse_existing(path)  # before the work, and not after it
    asked = _asked(config, batch_size, image_size)
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"platforms must be some of {', '.join(PLATFORMS)}, got {platforms}")
    flat: Any = flatten_dict(jax.tree.map(np.asarray, variables), sep="/")
    stored = {f"{WEIGHTS}{name}": _store(name, a, weight_dtype) for name, a in flat.items()}
    is_fixed = all(isinstance(size, int) for size in asked)
    groups = {PROGRAM: tuple(platforms)}
    if is_fixed and "tpu" in platforms and len(platforms) > 1:
        groups = {PROGRAM: tuple(p for p in platforms if p != "tpu"), TPU_PROGRAM: ("tpu",)}
    programs = {
        name: export_program(config, stored, asked, group) for name, group in groups.items()
    }
    about = {
        **describe_model(config, provenance, class_names, preprocessing),
        "images": asked,
        "platforms": list(platforms),
        "weight_dtype": weight_dtype,
    }
    save_exported(path, programs, stored, about)


def export_program(
    config: NetworkConfig,
    stored: Mapping[str, Any],
    asked: Sequence[int | Mapping[str, int]],
    platforms: Sequence[str],
) -> Exported:
    """The program ``(weights, images) -> logits`` for some platforms, see `export_model`.

    Args:
        config: the architecture.
        stored: arrays, or their shapes and dtypes, under the names in the file.
        asked: of each axis of the images: its size, or what it has to be a multiple of.
        platforms: all of which one program is lowered for.
    """
    network = task_of(config).network(config)

    def logits(weights: dict[str, Array], images: Array) -> Array:
        flat = {name.removeprefix(WEIGHTS): _restore(a) for name, a in weights.items()}
        y: Any = network.apply(unflatten_dict(flat, sep="/"), images)
        return y.decode if isinstance(y, SegmenterLogits) else y

    sizes = [
        str(size) if isinstance(size, int) else f"{size['multiple_of']}*{letter}"
        for size, letter in zip(asked, "bhwc", strict=True)
    ]
    images = jax.ShapeDtypeStruct(symbolic_shape(", ".join(sizes)), jnp.float32)
    weights = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in stored.items()}
    return export(jax.jit(logits), platforms=platforms)(weights, images)


def _asked(
    config: NetworkConfig, batch_size: int | None, image_size: tuple[int, int] | None
) -> list[int | dict[str, int]]:
    """What the program asks of each axis of the images."""
    task = task_of(config)
    if task is DETECTION:
        raise ValueError(f"it is {task.holds}: classifiers, backbones and segmenters are exported")
    vmamba = config if isinstance(config, VMambaConfig) else config.backbone
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"the batch size must be positive, got {batch_size}")
    batch = {"multiple_of": 1} if batch_size is None else batch_size
    if image_size is not None:
        if vmamba is config and vmamba.posembed and image_size != vmamba.input_size:
            raise ValueError(
                f"its position embedding is for images of {vmamba.input_size}, not {image_size}"
            )
        return [batch, *image_size, vmamba.in_chans]
    if vmamba is config and vmamba.posembed:
        raise ValueError("a model with a position embedding takes images of one size")
    halvings = 0 if vmamba.downsample_version == "none" else len(vmamba.depths) - 1
    side = {"multiple_of": vmamba.patch_size * 2**halvings}
    return [batch, side, side, vmamba.in_chans]


def _store(name: str, array: np.ndarray, weight_dtype: WeightDtype) -> np.ndarray:
    """A weight as it lies in the file: bfloat16, which NumPy has no name for, as its bits."""
    array = np.asarray(array, np.float32)
    if weight_dtype == "float32" or not name.endswith(_MATRICES):
        return array
    return array.astype(ml_dtypes.bfloat16).view(np.uint16)


def _restore(stored: Array) -> Array:
    if stored.dtype != jnp.uint16:
        return stored
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16).astype(jnp.float32)

"""The command that exports a model."""

import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.source import Weights, read_weights
from vmamba_jax.convert.tasks import SEGMENTATION, task_of
from vmamba_jax.export.artifact import (
    TPU_PROGRAM,
    ExportedModel,
    load_exported,
    refuse_existing,
)
from vmamba_jax.export.program import Platform, WeightDtype, export_model
from vmamba_jax.imagenet import imagenet_classes
from vmamba_jax.preprocessing import Preprocessing, imagenet_preprocessing
from vmamba_jax.segmentation.config import Inference
from vmamba_jax.segmentation.picture import ade20k_classes

_SEGMENTED = (512, 512)  # the size of the published segmenters
# In a file or a pipe there is no width to fit: nothing is cut.
_out = Console(width=None if sys.stdout.isatty() else 200)
_err = Console(stderr=True)


def export_checkpoint(
    target: Annotated[Path, Positional, arg(metavar="TARGET")],
    *,
    checkpoint: Path,
    step: str | None = None,
    batch_size: int | None = None,
    image_size: tuple[int, ...] | None = None,
    any_size: bool = False,
    platforms: tuple[Platform, ...] = ("cpu", "cuda", "tpu"),
    weight_dtype: WeightDtype = "float32",
    check: bool = False,
) -> int:
    """Exports a model as a program of StableHLO, which JAX alone runs.

    Args:
        target: Where to: FILE.npz, with the program, the weights, class names and preprocessing.
        checkpoint: The weights: the folder of a training run or one of its checkpoints, a
            converted model, a .pth or a .safetensors file.
        step: Which checkpoint of a training run: best, latest or a number; by default the best,
            or the latest where none was evaluated.
        batch_size: Images at a time; by default any number.
        image_size: Height and width in pixels, or one number for both; by default the size that
            the model was evaluated at, 512 for a segmenter.
        any_size: Leave height and width open, in multiples of 32 (for most models).
        platforms: What it has to run on. Its own kernel runs on TPU where the batch and image
            size are fixed.
        weight_dtype: bfloat16 stores the matrices rounded, in half the size; the program widens
            them and computes in float32.
        check: Run what was written beside the model, on images of noise, and tell how far apart
            their answers are.
    """
    if target.suffix == ".onnx":
        raise ValueError(
            f"{target}: ONNX is written by examples/export_onnx.py, which needs jax2onnx; this "
            "command writes .npz files"
        )
    if target.suffix != ".npz":
        raise ValueError(f"{target}: an exported model is an .npz file; name it so")
    refuse_existing(target)
    if any_size and image_size is not None:
        raise ValueError("give either --image-size or --any-size")
    if image_size is not None and len(image_size) not in (1, 2):
        raise ValueError("--image-size takes one number, or a height and a width")
    size = None if image_size is None else (image_size[0], image_size[-1])
    with _err.status(f"reading {escape(str(checkpoint))}"):
        read = read_weights(checkpoint, image_size=size, step=step)
        variables = read.variables()
    steps = preprocessing_of(read, size)
    with _err.status(f"exporting for {', '.join(platforms)}"):
        export_model(
            target,
            variables,
            read.config,
            batch_size=batch_size,
            image_size=None if any_size else steps.size,
            platforms=platforms,
            weight_dtype=weight_dtype,
            class_names=class_names_of(read),
            preprocessing=steps,
            provenance=read.provenance,
        )
        exported = load_exported(target)
    own = ", TPU by a program of its own" if TPU_PROGRAM in exported.programs else ""
    lines = {
        "model": task_of(read.config).holds,
        "images": f"float32 {exported.takes}",
        "platforms": ", ".join(platforms) + own,
        "written": f"{target} ({target.stat().st_size / 1e6:.1f} MB, weights {weight_dtype})",
    }
    for label, value in lines.items():
        _out.print(f"{label}: {escape(value)}", soft_wrap=True, highlight=False)
    if check:
        with _err.status("running it beside the model"):
            text = _compared(exported, variables, read.config)
        _out.print(text, soft_wrap=True, highlight=False)
    return 0


def preprocessing_of(read: Weights[Any], size: tuple[int, int] | None) -> Preprocessing:
    """What images have to go through for these weights; of this size, if one is asked."""
    config, steps = read.config, read.preprocessing
    if isinstance(steps, Inference):  # a program takes images of the size of one window
        steps = imagenet_preprocessing(steps.crop_size, config.backbone.in_chans, crop=1.0)
    elif steps is None and isinstance(config, VMambaConfig):
        steps = imagenet_preprocessing(size or config.input_size, config.in_chans)
    elif steps is None:
        steps = imagenet_preprocessing(size or _SEGMENTED, config.backbone.in_chans, crop=1.0)
    return steps if size is None else steps.replace(image_size=size)


def class_names_of(read: Weights[Any]) -> list[str] | None:
    """Those of the weights, or of the data set that has so many classes."""
    if read.class_names is not None:
        return read.class_names
    known = ade20k_classes() if task_of(read.config) is SEGMENTATION else imagenet_classes()
    return list(known) if read.config.num_classes == len(known) else None


def _compared(exported: ExportedModel, variables: Any, config: Any) -> str:
    """How far an exported model's answers to noise are from the model's."""
    asked = exported.about["images"]
    # Of open sizes, two images and, of 32, 256 pixels.
    sizes = (n if isinstance(n, int) else n["multiple_of"] * 8 for n in asked[1:])
    batch = asked[0] if isinstance(asked[0], int) else 2
    images = np.random.default_rng(0).standard_normal((batch, *sizes), np.float32)
    network = task_of(config).network(config)
    y: Any = jax.jit(network.apply)(jax.tree.map(jnp.asarray, variables), images)
    ours = np.asarray(getattr(y, "decode", y))
    theirs = np.asarray(exported(images))
    error = float(np.sqrt(np.mean((theirs - ours) ** 2)) / ours.std())
    same = np.mean(ours.argmax(-1) == theirs.argmax(-1))
    return (
        f"checked on {jax.default_backend()}, {batch} images of noise: largest difference "
        f"{np.abs(theirs - ours).max():.2g} of values up to {np.abs(ours).max():.2g}, root mean "
        f"square error over standard deviation {error:.1e}, the same largest value in {same:.1%}"
    )

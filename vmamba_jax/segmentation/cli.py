"""The command that segments photographs."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from tyro.conf import Positional, arg

from vmamba_jax.convert.source import read_weights
from vmamba_jax.convert.tasks import task_of
from vmamba_jax.data.decode import decode_rgb
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.picture_path import is_folder, picture_paths, result_paths
from vmamba_jax.predict import find_images
from vmamba_jax.segmentation.config import Inference, UPerNetConfig
from vmamba_jax.segmentation.inference import segment
from vmamba_jax.segmentation.picture import ade20k_classes, overlay, shares, write_labels
from vmamba_jax.segmentation.upernet import UPerNet
from vmamba_jax.typing import Variables

_Images = Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGE...")]

# In a file or a pipe there is no width to fit: nothing is cut.
_out = Console(width=None if sys.stdout.isatty() else 200)
_err = Console(stderr=True)


def segment_images(
    images: _Images,
    *,
    checkpoint: Path,
    step: str | None = None,
    mode: Literal["whole", "slide"] | None = None,
    scale: tuple[int, int] | None = None,
    crop_size: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    top: int = 5,
    save: Path | None = None,
    save_labels: Path | None = None,
) -> int:
    """Tells the class of every pixel of images; ends with status 1 if one could not be read.

    How an image is shown is by default as its weights' run evaluated, or else as the published
    evaluation: whole, at 2048 x 512, or by windows of 512 x 512 every 341 pixels.

    Args:
        images: Image files, or folders of them.
        checkpoint: The segmenter's weights: a converted model, a run, a .pth or a .safetensors
            file.
        step: Which checkpoint of a run: best, latest or a number.
        mode: Show the network the whole image, or slide a window over it.
        scale: The longest and shortest side that an image is resized to fit, in pixels.
        crop_size: Height and width of the window, in pixels.
        stride: Rows and columns from one window to the next; for a --crop-size by default two
            thirds of it.
        top: How many classes of each image to show.
        save: Draw the classes over the image with a legend: into this picture, or for several
            images into this folder.
        save_labels: Write the class indices as a grey PNG: likewise.
    """
    if top < 1:
        raise ValueError("--top must be positive")
    paths = find_images(images)
    if not paths:
        raise ValueError("no images: give image files, or folders that hold some")
    pictures, label_maps = _targets(paths, save, save_labels)
    if crop_size is not None and stride is None:
        stride = max(2 * crop_size[0] // 3, 1), max(2 * crop_size[1] // 3, 1)
    given = {"mode": mode, "scale": scale, "crop_size": crop_size, "stride": stride}
    given = {name: value for name, value in given.items() if value is not None}
    # A mistake is said before the weights are read, but for what goes with their own windows.
    dataclasses.replace(Inference(), **{**given, "mode": "whole"})
    model, variables, names, stored = _segmenter(checkpoint, step)
    inference = dataclasses.replace(stored, **given)
    table = Table("image", "class", "share")
    table.columns[2].justify = "right"
    unreadable = 0
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        every = progress.add_task("images", total=len(paths), visible=len(paths) > 1)
        windows = progress.add_task("windows", total=None)
        for number, path in enumerate(paths):
            progress.update(windows, completed=0, total=None)
            try:
                image = decode_rgb(path, str(path))
            except DamagedRecordError as error:
                unreadable += 1
                line = f"[red]unreadable:[/red] {escape(f'{path}: {error.reason}')}"
                _err.print(line, soft_wrap=True)
                progress.advance(every)
                continue

            def shown(done: int, total: int) -> None:
                progress.update(windows, completed=done, total=total)

            labels = segment(model, variables, image, inference, shown)
            for i, (label, share) in enumerate(shares(labels)[:top]):
                name = escape(str(path)) if i == 0 else ""
                table.add_row(name, escape(names[label]), f"{share:.1%}")
            table.add_section()
            for target in (*pictures[number : number + 1], *label_maps[number : number + 1]):
                target.parent.mkdir(parents=True, exist_ok=True)
            if pictures:
                overlay(image, labels, names, pictures[number])
            if label_maps:
                write_labels(labels, label_maps[number])
            progress.advance(every)
    if table.row_count:
        _out.print(table)
    for what, target in (("picture", save), ("labels", save_labels)):
        if target is not None and unreadable < len(paths):
            _err.print(f"{what}: {escape(str(target))}", soft_wrap=True)
    return 1 if unreadable else 0


def _segmenter(
    checkpoint: Path, step: str | None
) -> tuple[UPerNet, Variables, list[str], Inference]:
    """The model, its weights on the device, its classes' names, how images are shown to it."""
    with _err.status(f"reading {escape(str(checkpoint))}"):
        read = read_weights(checkpoint, step=step)
    config, task = read.config, task_of(read.config)
    if not isinstance(config, UPerNetConfig):
        raise ValueError(
            f"{checkpoint} holds {task.holds} and no segmenter (UPerNet); it is for "
            f"`{task.command}`"
        )
    names = read.class_names
    if names is None or len(names) != config.num_classes:
        is_ade20k = config.num_classes == len(ade20k_classes())
        numbers = [f"class {i}" for i in range(config.num_classes)]
        names = list(ade20k_classes()) if is_ade20k else numbers
    stored = read.preprocessing if isinstance(read.preprocessing, Inference) else Inference()
    return UPerNet(config), jax.tree.map(jnp.asarray, read.variables()), names, stored


def _targets(
    images: list[Path], save: Path | None, save_labels: Path | None
) -> tuple[list[Path], list[Path]]:
    """The files that each image's picture and label map go to; none where none are asked for.

    What can't be written is said now, before the work.
    """
    pictures, label_maps = [], []
    if save is not None:
        pictures = picture_paths("--save", save, images)
    if save_labels is not None:
        if not is_folder(save_labels) and save_labels.suffix.lower() != ".png":
            raise ValueError(f"--save-labels {save_labels}: label maps are written as .png files")
        label_maps = result_paths("--save-labels", save_labels, images, ".labels.png")
    if {path.resolve() for path in pictures} & {path.resolve() for path in label_maps}:
        raise ValueError("--save and --save-labels name one file; choose another for one of them")
    return pictures, label_maps

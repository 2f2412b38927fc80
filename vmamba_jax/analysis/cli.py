"""The analyze command: the analyses of image files, as figures and arrays in a folder."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from tyro.conf import Positional, arg

from vmamba_jax.analysis.capture import resolve_block, resolve_stage
from vmamba_jax.analysis.files import label_by_folder, readable_files
from vmamba_jax.analysis.flops import summarize
from vmamba_jax.analysis.resolution import SIZES, Resolution
from vmamba_jax.analysis.views import ResultFolder, Views
from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.pretrained import load_pretrained
from vmamba_jax.convert.source import read_weights
from vmamba_jax.convert.tasks import task_of
from vmamba_jax.imagenet import imagenet_classes
from vmamba_jax.models import VSSM
from vmamba_jax.predict import find_images
from vmamba_jax.preprocessing import IMAGENET_MEAN, Preprocessing
from vmamba_jax.registry import create_model, model_config
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.typing import Variables

View = Literal["erf", "activation", "features", "resolution"]

_err = Console(stderr=True)
_out = Console()


def analyze(
    images: Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGE...")],
    *,
    out: Path,
    checkpoint: Path | None = None,
    step: str | None = None,
    model: str | None = None,
    pretrained: bool = False,
    views: tuple[View, ...] = ("erf", "activation", "features"),
    image_size: tuple[int, ...] = (),
    stages: tuple[int, ...] = (),
    block: int = -1,
    queries: tuple[tuple[int, int], ...] = (),
    pictures: int = 4,
    sizes: tuple[int, ...] = SIZES,
    labelled: bool = False,
    batch_size: int = 1,
    format_: Annotated[Literal["png", "pdf", "svg"], arg(name="format")] = "png",
) -> int:
    """Shows what a model looks at; Ctrl-C keeps what is done.

    Args:
        images: Image files, or folders of them.
        out: A new folder for the figures, and the numbers behind them (.npz, .json).
        checkpoint: The weights: a converted model, the folder of a training run or one of its
            checkpoints, a .pth or a .safetensors file.
        step: Which checkpoint of a training run: best, latest or a number; by default the best,
            or the latest where none was evaluated.
        model: A model's name instead (see the models command); without --pretrained its weights
            are untrained.
        pretrained: Fetch the released weights of --model, once.
        views: erf: the effective receptive field of each stage's centre, over all images;
            activation: with what weight the scan at a position reads the others; features: the
            stages' maps; resolution: time, memory and answers at many image sizes.
        image_size: Side, or height and width, that images are resized and cropped to; by default
            the size the model was made for. Not for the sweep over resolutions.
        stages: The stages to show, from 0; all by default.
        block: The block of each stage whose scan is shown; -1 is the last.
        queries: Positions whose activation maps are shown, as rows and columns in pixels; the
            centre by default.
        pictures: How many images activation and features are drawn for.
        sizes: Sides of the sweep's images; the first is what the others are compared with.
        labelled: IMAGE is one folder with a folder for each class: the sweep tells the accuracy.
        batch_size: Images at a time in the sweep.
        format_: Format of the figures.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib: pip install 'vmamba-jax[demo]'")
    if min(pictures, batch_size, *sizes, *image_size) < 1 or len(image_size) > 2:
        raise ValueError("--pictures, --batch-size, --sizes and --image-size must be positive")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already; choose another --out or delete it")
    paths = find_images(images)
    if not paths:
        raise ValueError("no images: give image files, or folders that hold some")
    size = (image_size[0], image_size[-1]) if image_size else None
    network, variables, names, steps = _read_model(checkpoint, step, model, pretrained, size)
    variables = jax.tree.map(jnp.asarray, variables)  # to the device, once
    config = network.config
    height, width = steps.size
    queries = queries or ((height // 2, width // 2),)
    if any(not (0 <= y < height and 0 <= x < width) for y, x in queries):
        raise ValueError(f"--queries must lie on the image, which is {height}x{width} pixels")
    stages = tuple(resolve_stage(config, s) for s in stages or range(len(config.depths)))
    # What can't be done is said before anything is.
    for side in sizes if "resolution" in views else ():
        summarize(config, side)
    for stage in stages if "activation" in views else ():
        resolve_block(config, stage, block)
    labels = label_by_folder(images, paths, names, config.num_classes) if labelled else None

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as progress, StopRequest() as stop:
        files = readable_files(paths, labels, progress, stop)
        folder = ResultFolder(out, format_, _out)
        show = Views(network, variables, files, steps, progress, stop, folder)
        for view in views:
            match view:
                case "erf":
                    show.receptive_fields(stages)
                case "activation":
                    show.activations(stages, block, queries, pictures)
                case "features":
                    show.features(pictures)
                case "resolution":
                    _print_resolutions(show.resolutions(sizes, labelled, batch_size))
            if stop.name:
                break
    if stop.name:
        _err.print("interrupted: what is written is of the images done before")
        return 130
    return 1 if len(files) < len(paths) else 0


def _read_model(
    checkpoint: Path | None,
    step: str | None,
    name: str | None,
    pretrained: bool,
    size: tuple[int, int] | None,
) -> tuple[VSSM, Variables, Sequence[str] | None, Preprocessing]:
    """The model, its weights, its classes' names where they are known, what images go through."""
    if (checkpoint is None) == (name is None):
        raise ValueError("give either --checkpoint PATH or --model NAME")
    names, steps = None, None
    if checkpoint is not None:
        read = read_weights(checkpoint, image_size=size, step=step)
        config, names = read.config, read.class_names
        steps = read.preprocessing if isinstance(read.preprocessing, Preprocessing) else None
        if not isinstance(config, VMambaConfig):
            raise ValueError(
                f"{checkpoint} holds {task_of(config).holds}: analyze takes classifiers"
            )
        if config.in_chans != len(IMAGENET_MEAN):
            raise ValueError(
                f"{checkpoint} is for images of {config.in_chans} channels, not of RGB"
            )
        network, variables = VSSM(config), read.variables()
    else:
        assert name is not None
        config = model_config(name)
        if pretrained:
            config = config.replace(imgsize=size or config.imgsize)
            network, variables = VSSM(config), load_pretrained(True, config, name)
            names = imagenet_classes()
        else:
            _err.print(f"--model {name} without --pretrained: the weights are untrained")
            network, variables = create_model(name, image_size=size)
    steps = steps or Preprocessing(config.input_size)
    return network, variables, names, steps.replace(image_size=size or steps.size)


def _print_resolutions(rows: Sequence[Resolution]) -> None:
    table = Table(
        "size", "ms per image", "memory (MiB)", "GFLOPs", "drift", "same class", "accuracy"
    )
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(
            str(row.size),
            f"{1e3 * row.seconds:.1f}",
            f"{row.memory / 2**20:.0f}",
            f"{row.flops / 1e9:.2f}",
            f"{row.drift:.3f}",
            f"{row.agreement:.1%}",
            "" if row.accuracy is None else f"{row.accuracy:.1%}",
        )
    _out.print(table)

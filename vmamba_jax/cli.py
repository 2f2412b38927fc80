"""The vmamba-jax command."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from tyro.conf import Positional, arg

from vmamba_jax.analysis.cli import analyze
from vmamba_jax.analysis.flops import summarize
from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.artifact import save_model
from vmamba_jax.convert.export import save_safetensors, save_torch
from vmamba_jax.convert.hugging_face import one_rank_note, save_port
from vmamba_jax.convert.layout import WeightChoice
from vmamba_jax.convert.mapping import is_counter
from vmamba_jax.convert.pretrained import load_pretrained
from vmamba_jax.convert.releases import RELEASES
from vmamba_jax.convert.source import Weights, read_weights, widens
from vmamba_jax.convert.tasks import task_of
from vmamba_jax.detection.cli import detect_objects, evaluate_coco
from vmamba_jax.errors import told
from vmamba_jax.export.cli import export_checkpoint
from vmamba_jax.imagenet import imagenet_classes
from vmamba_jax.local_path import check_arguments
from vmamba_jax.models import VSSM
from vmamba_jax.picture_path import check_picture
from vmamba_jax.predict import Result, as_json, draw, find_images, predict
from vmamba_jax.preprocessing import Preprocessing, imagenet_preprocessing
from vmamba_jax.registry import list_models, model_config
from vmamba_jax.segmentation.cli import segment_images

_Source = Annotated[Path, Positional, arg(metavar="SOURCE")]
_Target = Annotated[Path, Positional, arg(metavar="TARGET")]
_Images = Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGE...")]
_Name = Annotated[str, Positional, arg(metavar="NAME")]

# In a file or a pipe there is no width to fit: nothing is cut.
_out = Console(width=None if sys.stdout.isatty() else 200)
_err = Console(stderr=True)

EXAMPLES = """Examples:

  vmamba-jax train finetune --data.root photos --init-from vssm1_tiny.pth
  vmamba-jax convert vssm1_tiny.pth vmamba_tiny
  vmamba-jax predict photo.jpg --checkpoint vmamba_tiny
  vmamba-jax segment photo.jpg --checkpoint upernet.pth --save overlay.png
  vmamba-jax detect photo.jpg --checkpoint mask_rcnn.pth --save found.png
  vmamba-jax coco-eval coco --split val2017 --checkpoint mask_rcnn.pth
  vmamba-jax analyze photos --checkpoint vmamba_tiny --out figures
  vmamba-jax export vmamba_tiny.npz --checkpoint vmamba_tiny
  vmamba-jax models
  vmamba-jax summary vmamba_tiny_s1l8

Words are completed in bash after: eval "$(vmamba-jax --tyro-print-completion bash)"
"""


def main() -> None:
    """Runs a sub-command; a fault that the user can mend ends in one line and status 1."""
    if sys.argv[1:2] == ["train"]:  # its options depend on its preset
        sys.exit(train())
    try:
        check_arguments(sys.argv[1:])
        status = tyro.extras.subcommand_cli_from_dict(
            {
                "train": train,
                "convert": convert,
                "predict": classify,
                "segment": segment_images,
                "detect": detect_objects,
                "coco-eval": evaluate_coco,
                "analyze": analyze,
                "export": export_checkpoint,
                "models": models,
                "summary": summary,
            },
            prog="vmamba-jax",
            description=f"VMamba in JAX.\n\n{EXAMPLES}",
        )
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        _err.print(f"[red]error:[/red] {_escape(told(error))}", soft_wrap=True, highlight=False)
        status = 1
    except KeyboardInterrupt:
        _err.print("interrupted")
        status = 130
    sys.exit(status)


def train() -> int:
    """Trains, evaluates and times; `vmamba-jax train --help` lists presets and options."""
    from vmamba_jax.training.cli import main as run  # noqa: PLC0415 (slow, and of no other command)

    del sys.argv[1]
    return run(prog="vmamba-jax train")


def convert(
    source: _Source,
    target: _Target,
    *,
    weights: WeightChoice = "auto",
    entry: str | None = None,
    prefix: str | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, ...] | None = None,
    in_chans: int | None = None,
    step: str | None = None,
    to: Literal["orbax", "safetensors", "pth", "huggingface"] | None = None,
) -> int:
    """Converts a checkpoint, from PyTorch or back to it.

    Args:
        source: A .pth file of any VMamba release or training run, a .safetensors file, a folder of
            the Hugging Face port, a model that this command wrote, or the folder of a training
            run or one of its checkpoints.
        target: Where to: FILE.safetensors or FILE.pth for PyTorch's names, else a folder with a
            model for this package (Orbax) or, with --to huggingface, for the Hugging Face port.
        weights: Which ones, where a training run saved two: the averaged (ema), the plain (model),
            or auto: the averaged if there are any.
        entry: The entry of the file that holds the model, where several do.
        prefix: What the model's names begin with, where one entry holds several models.
        num_classes: Replace the head by a new one of so many classes.
        image_size: Resize the position embedding, if there is one, for images of this height and
            width, or of one number for both.
        in_chans: Fit weights for RGB images to so many channels: their sum for one, repeated and
            scaled for more.
        step: Which checkpoint of a training run: best, latest or a number; by default the best,
            or the latest where none was evaluated.
        to: The format of TARGET, where its name does not say it.
    """
    suffixes = {".safetensors": "safetensors", ".pth": "pth", ".pt": "pth"}
    form = to or suffixes.get(target.suffix, "" if target.suffix else "orbax")
    if not form:
        raise ValueError(
            f"{target}: {target.suffix} files are not written, but {', '.join(suffixes)} files and "
            "folders; for a folder of this name, add --to orbax or --to huggingface"
        )
    if target.exists():
        raise ValueError(f"{target}: exists already; choose another name or delete it")
    with _err.status(f"reading {source}"):
        read = read_weights(
            source,
            weights,
            num_classes,
            _size(image_size),
            in_chans=in_chans,
            entry=entry,
            prefix=prefix,
            step=step,
        )
    config = read.config
    if form == "huggingface" and not isinstance(config, VMambaConfig):
        raise ValueError(
            f"{source}: it holds {task_of(config).holds}, and the Hugging Face port has only "
            "classifiers; write a folder of this package, a .safetensors or a .pth file"
        )
    with _err.status(f"writing {target}"):
        match form:
            case "safetensors":
                save_safetensors(target, read.state_dict)
            case "pth":
                save_torch(target, read.state_dict)
            case "huggingface":
                assert isinstance(config, VMambaConfig)
                save_port(target, read.state_dict, config, read.class_names)
            case _:
                save_model(
                    target,
                    read.variables(),
                    read.config,
                    read.provenance,
                    read.class_names,
                    read.preprocessing,
                )
    _report(read, target, form)
    return 0


def classify(
    images: _Images,
    *,
    checkpoint: Path | None = None,
    step: str | None = None,
    model: str | None = None,
    pretrained: bool = False,
    image_size: tuple[int, ...] | None = None,
    batch_size: int = 16,
    top: int = 5,
    json_: Annotated[bool, arg(name="json")] = False,
    save: Path | None = None,
) -> int:
    """Classifies images; ends with status 1 if one could not be read.

    Args:
        images: Image files, or folders of them.
        checkpoint: The weights: the folder of a training run or one of its checkpoints, a
            converted model, a .pth or a .safetensors file.
        step: Which checkpoint of a training run: best, latest or a number; by default the best,
            or the latest where none was evaluated.
        model: A released model's name instead (see the models command); needs --pretrained.
        pretrained: Fetch the released weights of --model, once.
        image_size: Height and width of the centre crop, or one number for both; by default the
            size that the model was evaluated at.
        batch_size: Images at a time.
        top: How many classes to show.
        json_: Print JSON instead of a table.
        save: Write a picture of the images with their classes as bars.
    """
    if min(batch_size, top) < 1:
        raise ValueError("--batch-size and --top must be positive")
    paths = find_images(images)
    if not paths:
        raise ValueError("no images: give image files, or folders that hold some")
    if save is not None:
        check_picture("--save", save, paths)
    network, variables, names, steps = _classifier(
        checkpoint, step, model, pretrained, _size(image_size)
    )
    results: list[Result] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("classifying", total=len(paths))
        for result in predict(
            network,
            variables,
            paths,
            names,
            steps,
            batch_size=batch_size,
            top=min(top, len(names)),
        ):
            results.append(result)
            progress.advance(task)
            if result.error is not None:
                _err.print(
                    f"[red]unreadable:[/red] {_escape(result.path)}: {_escape(result.error)}",
                    soft_wrap=True,
                )
    if json_:
        print(json.dumps([as_json(result) for result in results], indent=1))
    else:
        _print_results(results)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        draw(results, save, network.config.in_chans)
        _err.print(f"picture: {_escape(save)}")
    return 1 if any(result.error is not None for result in results) else 0


def models() -> int:
    """Lists the models that have a name."""
    table = Table("name", "params (M)", "GFLOPs", "ImageNet top-1 (%)", "released checkpoint")
    table.columns[0].no_wrap = True
    table.columns[4].overflow = "fold"
    for column in table.columns[1:4]:
        column.justify = "right"
    for name in list_models():
        config = model_config(name)
        parts, release = summarize(config, config.input_size[0]), RELEASES.get(name)
        table.add_row(
            name,
            f"{sum(part.params for part in parts) / 1e6:.1f}",
            f"{sum(part.flops for part in parts) / 1e9:.1f}",
            f"{release.top1:.1f}" if release else "",
            f"{release.tag}/{release.file}" if release else "",
        )
    table.caption = "top-1 as published by the VMamba authors"
    _out.print(table)
    return 0


def summary(name: _Name, *, image_size: int | None = None) -> int:
    """Shows the stages of a model: shapes, parameters, operations.

    Args:
        name: One of the names that the models command lists.
        image_size: Side of the image; by default the size the model is made for.
    """
    config = model_config(name)
    size = image_size or config.input_size[0]
    parts = summarize(config, size)
    table = Table(title=f"{name} at {size}x{size}")
    for column in ("part", "output (H, W, C)", "params", "GFLOPs"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in parts:
        shape = " x ".join(map(str, part.output_shape))
        table.add_row(part.name, shape, f"{part.params:,}", f"{part.flops / 1e9:.3f}")
    table.add_section()
    params, flops = sum(p.params for p in parts), sum(p.flops for p in parts)
    table.add_row("total", "", f"{params:,}", f"{flops / 1e9:.3f}")
    table.caption = "a multiply-add counts once; the scan 9BLDN + BDL"
    _out.print(table)
    return 0


def _size(sides: tuple[int, ...] | None) -> tuple[int, int] | None:
    if sides is not None and len(sides) not in (1, 2):
        raise ValueError("--image-size takes one number, or a height and a width")
    return None if sides is None else (sides[0], sides[-1])


def _classifier(
    checkpoint: Path | None,
    step: str | None,
    name: str | None,
    pretrained: bool,
    size: tuple[int, int] | None,
) -> tuple[VSSM, dict, list[str], Preprocessing]:
    """The model, its weights, its classes' names and what images go through."""
    if (checkpoint is None) == (name is None):
        raise ValueError("give either --checkpoint PATH or --model NAME --pretrained")
    if checkpoint is not None:
        read = read_weights(checkpoint, image_size=size, step=step)
        config, names = read.config, read.class_names
        if not isinstance(config, VMambaConfig):
            task = task_of(config)
            raise ValueError(f"{checkpoint} holds {task.holds}: run it with `{task.command}`")
        variables = read.variables()
        steps = read.preprocessing if isinstance(read.preprocessing, Preprocessing) else None
        if read.provenance.get("layout") == "training run":
            _err.print(f"weights: {_escape(_which(read.provenance))}", highlight=False)
    else:
        assert name is not None
        if not pretrained:
            raise ValueError(
                f"--model {name} needs --pretrained: untrained weights predict nothing"
            )
        config = model_config(name).replace(imgsize=size or model_config(name).imgsize)
        variables, names, steps = load_pretrained(True, config, name), None, None
    if config.num_classes == 0:
        raise ValueError(f"{checkpoint or name} has no classification head")
    if names is None:
        imagenet = config.num_classes == len(imagenet_classes())
        numbers = [f"class {i}" for i in range(config.num_classes)]
        names = list(imagenet_classes()) if imagenet else numbers
    if steps is None:
        steps = imagenet_preprocessing(config.input_size, config.in_chans)
    return VSSM(config), variables, names, steps.replace(image_size=size or steps.size)


def _which(provenance: dict[str, Any]) -> str:
    """Which of the weights that there are."""
    average = ", moving average" if provenance.get("averaged") else ""
    return f"{provenance.get('weights')}{average}"


def _report(read: Weights, target: Path, form: str) -> None:
    config = read.config
    table = Table("tensors", "what became of them", "for example")
    table.columns[0].justify = "right"
    kept = Counter(change.action for change in read.changes)
    for action in ("mapped", "renamed", "reshaped", "resized", "adapted", "initialised"):
        if kept[action]:
            example = next(change for change in read.changes if change.action == action)
            text = example.source if action == "mapped" else f"{example.source} -> {example.target}"
            text = example.target if not example.source else text
            table.add_row(str(kept[action]), action, _escape(f"{text}  {example.why}".strip()))
    for why, count in Counter(c.why for c in read.changes if c.action == "left out").items():
        example = next(c.source for c in read.changes if c.action == "left out" and c.why == why)
        table.add_row(str(count), f"left out: {_escape(why)}", _escape(example))
    _out.print(table)
    rounded = [
        array.dtype.name
        for key, array in read.state_dict.items()
        if not widens(array.dtype) and not is_counter(key)
    ]
    if form == "orbax" and rounded:
        kinds = ", ".join(sorted(set(rounded)))
        _out.print(f"not kept: {len(rounded)} tensors of {kinds} are rounded to float32")
    if (
        form == "huggingface"
        and isinstance(config, VMambaConfig)
        and (note := one_rank_note(config))
    ):
        _out.print(f"note: {note}", soft_wrap=True, highlight=False)
    about = read.provenance
    vmamba = config if isinstance(config, VMambaConfig) else config.backbone
    head = "" if vmamba is config else f"{task_of(config).network.__name__} on "
    lines = {
        "layout": about.get("layout"),
        "weights": _which(about),
        "prefix": about.get("prefix") or "none",
        "model": f"{head}depths {vmamba.depths}, dims {vmamba.stage_dims}, {vmamba.forward_type}, "
        f"{config.num_classes} classes",
        "written": f"{target} ({form})",
    }
    for label, value in lines.items():
        _out.print(f"{label}: {_escape(value)}", soft_wrap=True, highlight=False)


def _print_results(results: list[Result]) -> None:
    table = Table("image", "class", "probability")
    table.columns[2].justify = "right"
    for result in results:
        for i, prediction in enumerate(result.predictions):
            image = _escape(result.path) if i == 0 else ""
            table.add_row(image, _escape(prediction.name), f"{prediction.probability:.1%}")
        table.add_section()
    if table.row_count:
        _out.print(table)


def _escape(text: object) -> str:
    """Text from files and file names, which may hold what rich takes for markup."""
    return str(text).replace("[", r"\[")


if __name__ == "__main__":
    main()

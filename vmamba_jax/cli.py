"""The vmamba-jax command."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from tyro.conf import Positional, arg

from vmamba_jax.analysis.cli import analyze
from vmamba_jax.analysis.flops import summarize
from vmamba_jax.convert.artifact import save_model
from vmamba_jax.convert.export import save_safetensors, save_torch
from vmamba_jax.convert.hugging_face import one_rank_note, save_port
from vmamba_jax.convert.layout import WeightChoice
from vmamba_jax.convert.mapping import is_counter
from vmamba_jax.convert.pretrained import RELEASES, load_pretrained
from vmamba_jax.convert.source import Weights, read_weights, widens
from vmamba_jax.models import VSSM
from vmamba_jax.predict import Result, as_json, draw, find_images, imagenet_classes, predict
from vmamba_jax.registry import list_models, model_config

_Source = Annotated[Path, Positional, arg(metavar="SOURCE")]
_Target = Annotated[Path, Positional, arg(metavar="TARGET")]
_Images = Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGE...")]
_Name = Annotated[str, Positional, arg(metavar="NAME")]

# In a file or a pipe there is no width to fit: nothing is cut.
_out = Console(width=None if sys.stdout.isatty() else 200)
_err = Console(stderr=True)


def main() -> None:
    """Runs a sub-command; a fault that the user can mend ends in one line and status 1."""
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            {
                "convert": convert,
                "predict": classify,
                "analyze": analyze,
                "models": models,
                "summary": summary,
            },
            prog="vmamba-jax",
            description="VMamba in JAX: convert PyTorch checkpoints, classify and analyze images.",
        )
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        _err.print(f"[red]error:[/red] {_escape(error)}", soft_wrap=True, highlight=False)
        status = 1
    except KeyboardInterrupt:
        _err.print("interrupted")
        status = 130
    sys.exit(status)


def convert(
    source: _Source,
    target: _Target,
    *,
    weights: WeightChoice = "auto",
    entry: str | None = None,
    prefix: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    to: Literal["orbax", "safetensors", "pth", "huggingface"] | None = None,
) -> int:
    """Converts a checkpoint, from PyTorch or back to it.

    Args:
        source: A .pth file of any VMamba release or training run, a .safetensors file, a folder of
            the Hugging Face port, or a model that this command wrote.
        target: Where to: FILE.safetensors or FILE.pth for PyTorch's names, else a folder with a
            model for this package (Orbax) or, with --to huggingface, for the Hugging Face port.
        weights: Which ones, where a training run saved two: the averaged (ema), the plain (model),
            or auto: the averaged if there are any.
        entry: The entry of the file that holds the model, where several do.
        prefix: What the model's names begin with, where one entry holds several models.
        num_classes: Replace the head by a new one of so many classes.
        image_size: Resize the position embedding, if there is one, for images of this side.
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
        read = read_weights(source, weights, num_classes, image_size, entry=entry, prefix=prefix)
    with _err.status(f"writing {target}"):
        match form:
            case "safetensors":
                save_safetensors(target, read.state_dict)
            case "pth":
                save_torch(target, read.state_dict)
            case "huggingface":
                save_port(target, read.state_dict, read.config, read.class_names)
            case _:
                save_model(target, read.variables(), read.config, read.provenance, read.class_names)
    _report(read, target, form)
    return 0


def classify(
    images: _Images,
    *,
    checkpoint: Path | None = None,
    model: str | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    batch_size: int = 16,
    top: int = 5,
    json_: Annotated[bool, arg(name="json")] = False,
    save: Path | None = None,
) -> int:
    """Classifies images; ends with status 1 if one could not be read.

    Args:
        images: Image files, or folders of them.
        checkpoint: The weights: a converted model, a .pth or a .safetensors file.
        model: A released model's name instead (see the models command); needs --pretrained.
        pretrained: Fetch the released weights of --model, once.
        image_size: Side of the centre crop; by default the size the model was made for.
        batch_size: Images at a time.
        top: How many classes to show.
        json_: Print JSON instead of a table.
        save: Write a picture of the images with their classes as bars.
    """
    if min(batch_size, top, image_size or 1) < 1:
        raise ValueError("--batch-size, --top and --image-size must be positive")
    paths = find_images(images)
    if not paths:
        raise ValueError("no images: give image files, or folders that hold some")
    network, variables, names, size = _classifier(checkpoint, model, pretrained, image_size)
    results: list[Result] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("classifying", total=len(paths))
        for result in predict(
            network,
            variables,
            paths,
            names,
            image_size=size,
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
        draw(results, save)
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
        parts, release = summarize(config, config.imgsize), RELEASES.get(name)
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
    size = image_size or config.imgsize
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


def _classifier(
    checkpoint: Path | None, name: str | None, pretrained: bool, image_size: int | None
) -> tuple[VSSM, dict, list[str], int]:
    """The model, its weights, its classes' names and its image size."""
    if (checkpoint is None) == (name is None):
        raise ValueError("give either --checkpoint PATH or --model NAME --pretrained")
    if checkpoint is not None:
        read = read_weights(checkpoint, image_size=image_size)
        config, variables, names = read.config, read.variables(), read.class_names
    else:
        assert name is not None
        if not pretrained:
            raise ValueError(
                f"--model {name} needs --pretrained: untrained weights predict nothing"
            )
        config = model_config(name).replace(imgsize=image_size or model_config(name).imgsize)
        variables, names = load_pretrained(True, config, name), None
    if config.num_classes == 0:
        raise ValueError(f"{checkpoint or name} has no classification head")
    if names is None:
        imagenet = config.num_classes == len(imagenet_classes())
        numbers = [f"class {i}" for i in range(config.num_classes)]
        names = list(imagenet_classes()) if imagenet else numbers
    return VSSM(config), variables, names, image_size or config.imgsize


def _report(read: Weights, target: Path, form: str) -> None:
    config = read.config
    table = Table("tensors", "what became of them", "for example")
    table.columns[0].justify = "right"
    kept = Counter(change.action for change in read.changes)
    for action in ("mapped", "renamed", "reshaped", "resized", "initialised"):
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
    if form == "huggingface" and (note := one_rank_note(config)):
        _out.print(f"note: {note}", soft_wrap=True, highlight=False)
    about = read.provenance
    lines = {
        "layout": about.get("layout"),
        "weights": f"{about.get('weights')}{' (averaged)' if about.get('averaged') else ''}",
        "prefix": about.get("prefix") or "none",
        "model": f"depths {config.depths}, dims {config.stage_dims}, {config.forward_type}, "
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

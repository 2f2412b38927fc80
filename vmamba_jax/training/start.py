"""What a run starts from and what it must go on as: weights, architecture, classes, settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.artifact import describe_model, describe_saved
from vmamba_jax.convert.identity import differing_fields
from vmamba_jax.convert.pretrained import fit_weights, open_pretrained
from vmamba_jax.convert.releases import RELEASES
from vmamba_jax.convert.source import Weights
from vmamba_jax.data import ImageSource
from vmamba_jax.errors import CheckpointError
from vmamba_jax.imagenet import in_words
from vmamba_jax.models.vssm import VSSM
from vmamba_jax.registry import model_config
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.config import RunConfig, differences, from_json, to_json
from vmamba_jax.training.setup import preprocessing_of


class RunError(RuntimeError):
    """A run that can't be resumed as asked; the message says why and what to do."""


def initial_weights(config: RunConfig, step: str | None = None) -> Weights | None:
    """The weights that `config.init_from` names, as their file has them; None if it names none.

    Args:
        config: the run.
        step: which checkpoint, where it names a run; see `load_model`.

    Raises:
        CheckpointError: if there are none, or they are damaged.
        OSError: if they can't be read.
    """
    if config.init_from is None:
        return None
    source = True if config.init_from == "released" else config.init_from
    return open_pretrained(source, config.model.name, step)


def architecture_of(config: RunConfig, weights: Weights | None = None) -> VMambaConfig:
    """The architecture that a run trains: the one named, else the run's own, else the weights'.

    Args:
        config: the run.
        weights: what it starts from.

    Raises:
        ValueError: if nothing says it, or the name is unknown.
    """
    if config.model.name is not None:
        return model_config(config.model.name)
    folder = config.run / "checkpoints"
    if steps := complete_steps(folder):
        return describe_saved(folder / str(steps[-1])).config
    if config.init_from in RELEASES:
        return model_config(config.init_from)
    weights = weights or initial_weights(config)
    if weights is None:
        raise ValueError("which model? Name one with --model.name, or weights with --init-from")
    return weights.config


def fitted(config: RunConfig, weights: Weights, architecture: VMambaConfig) -> Weights:
    """Weights as an architecture takes them, with a new head where the classes differ.

    Raises:
        CheckpointError: if they are of another architecture.
    """
    name = config.model.name or "the run's model"
    return fit_weights(weights, config.init_from or config.run, architecture, name, config.seed)


def about_model(config: RunConfig, model: VSSM, source: ImageSource) -> dict[str, Any]:
    """What a run keeps beside its weights, so that each checkpoint is a model."""
    provenance = {"run": config.run.name, "init_from": config.init_from}
    return describe_model(
        model.config, provenance, source.class_names, preprocessing_of(config.data)
    )


def check_same_labels(weights: Weights, what: str, names: Sequence[str], where: str) -> None:
    """Checks that a class means the same to weights and to a data set.

    Args:
        weights: of a classifier.
        what: the weights' name, for messages.
        names: the data set's classes.
        where: the data set's name, for messages.

    Raises:
        CheckpointError: they have other numbers of classes, or other classes where both name them.
    """
    classes = weights.config.num_classes
    if classes != len(names):
        raise CheckpointError(
            f"{what} tells {classes} classes apart and {where} has {len(names)}: evaluate it on "
            "images of its own classes, or fine-tune it on these first"
        )
    ours, theirs = in_words(weights.class_names or names), in_words(names)
    others = [
        f"{i}: {a} and {b}" for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b
    ]
    if others:
        raise CheckpointError(
            f"{what} and {where} have other classes: {'; '.join(others[:4])}"
            + (f"; and {len(others) - 4} more" if len(others) > 4 else "")
            + ". Give the images' classes the names, and so the order, that they have in the model"
        )


def check_same_run(
    config: RunConfig, saved: dict[str, Any], architecture: VMambaConfig, source: ImageSource
) -> None:
    """Refuses to go on with a run that was something else.

    Args:
        config: the run as it is asked for.
        saved: its configuration at the last checkpoint, as JSON types.
        architecture: what it is to train.
        source: the training images.

    Raises:
        RunError: naming every setting that is another one.
    """
    before = from_json(RunConfig, saved)
    latest = describe_saved(
        config.run / "checkpoints" / str(complete_steps(config.run / "checkpoints")[-1])
    )
    changed = differences(
        to_json(_identity_of(before, architecture)), to_json(_identity_of(config, architecture))
    )
    changed += [
        f"{field}: {getattr(latest.config, field)} -> {getattr(architecture, field)}"
        for field in differing_fields(latest.config, architecture)
        if field != "in_chans"  # the images' own
    ]
    if latest.class_names not in (None, list(source.class_names)):
        changed.append(f"classes: {_few(latest.class_names)} -> {_few(source.class_names)}")
    if changed:
        raise RunError(
            f"{config.run} holds a run with other settings ({'; '.join(changed)}): give the same "
            "ones to go on with it, another folder with --run to keep both, or delete it"
        )


def say_which(console: Console, label: str, config: RunConfig, weights: Weights) -> None:
    """Says which weights they are, and what was done to them."""
    about = weights.provenance
    which = f" ({about['weights']})" if about.get("layout") == "training run" else ""
    average = ", moving average" if about.get("averaged") else ""
    console.print(f"{label} {config.init_from}{which}{average}", soft_wrap=True, highlight=False)
    made = (c.why for c in weights.changes if c.action in ("initialised", "resized", "adapted"))
    for why in dict.fromkeys(made):
        console.print(f"  {why}", soft_wrap=True, highlight=False)


def _few(names: Sequence[str] | None) -> str:
    names = names or []
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _identity_of(config: RunConfig, architecture: VMambaConfig) -> RunConfig:
    """The part of a configuration that an interrupted run must be resumed with.

    Everything else (where the data lies, by which means and on how many devices and workers the
    same is computed, how long the run is, what is logged) may change. The architecture is compared
    by itself.
    """
    blank = RunConfig()
    # Only batch statistics are other ones in a batch that comes in parts.
    steps = config.optimizer.accumulation_steps if architecture.norm_layer == "bn" else 1
    return dataclasses.replace(
        blank,
        seed=config.seed,
        model=dataclasses.replace(
            config.model,
            name=blank.model.name,
            use_checkpoint=blank.model.use_checkpoint,
            scan_blocks=blank.model.scan_blocks,
        ),
        optimizer=dataclasses.replace(config.optimizer, accumulation_steps=steps),
        data=dataclasses.replace(
            config.data,
            root=blank.data.root,
            workers=blank.data.workers,
            eval_batch_size=blank.data.eval_batch_size,
            damaged_is_fatal=blank.data.damaged_is_fatal,
        ),
    )

"""What a run starts from and what it must go on as: weights, architecture, classes, settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from rich.console import Console

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.artifact import describe_model, describe_saved
from vmamba_jax.convert.identity import differing_fields
from vmamba_jax.convert.pretrained import fit_weights, open_pretrained
from vmamba_jax.convert.releases import RELEASES
from vmamba_jax.convert.source import Weights, vmamba_of
from vmamba_jax.convert.tasks import ImageSteps, NetworkConfig
from vmamba_jax.errors import CheckpointError
from vmamba_jax.imagenet import in_words
from vmamba_jax.registry import model_config
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.config import EvalConfig, RunConfig, differences, from_json, to_json
from vmamba_jax.training.segmentation_config import (
    AnyRun,
    SegmentationConfig,
    SegmentationEvalConfig,
)

EvalRun = TypeVar("EvalRun", EvalConfig, SegmentationEvalConfig)


class RunError(RuntimeError):
    """A run that can't be resumed as asked; the message says why and what to do."""


def initial_weights(config: RunConfig, step: str | None = None) -> Weights[VMambaConfig] | None:
    """The classifier that `config.init_from` names, as its file has it; None if it names none.

    Of a segmenter or detector it is the backbone.

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
    return vmamba_of(open_pretrained(source, config.model.name, step))


def weights_to_evaluate(config: EvalRun) -> tuple[EvalRun, str | None]:
    """The run with what is evaluated as its `init_from`, and which of its checkpoints.

    Raises:
        CheckpointError: if nothing is named and there is no run.
    """
    if config.init_from is not None:
        return config, None
    if not complete_steps(config.run / "checkpoints"):
        raise CheckpointError(
            f"{config.run} holds no checkpoint: train first, name another run with --run, or "
            "weights with --init-from"
        )
    return dataclasses.replace(config, init_from=str(config.run)), config.step


def architecture_of(
    config: RunConfig, weights: Weights[VMambaConfig] | None = None
) -> VMambaConfig:
    """The architecture that a run trains: the one named, else the run's own, else the weights'.

    Args:
        config: the run.
        weights: what it starts from.

    Raises:
        RunError: if the folder holds a run of another task.
        ValueError: if nothing says it, or the name is unknown.
    """
    if config.model.name is not None:
        return model_config(config.model.name)
    folder = config.run / "checkpoints"
    if steps := complete_steps(folder):
        held = describe_saved(folder / str(steps[-1])).config
        if not isinstance(held, VMambaConfig):
            raise _another_task(config)
        return held
    if config.init_from in RELEASES:
        return model_config(config.init_from)
    weights = weights or initial_weights(config)
    if weights is None:
        raise ValueError("which model? Name one with --model.name, or weights with --init-from")
    return weights.config


def fitted(
    config: RunConfig, weights: Weights[VMambaConfig], architecture: VMambaConfig
) -> Weights[VMambaConfig]:
    """Weights as an architecture takes them, with a new head where the classes differ.

    Raises:
        CheckpointError: if they are of another architecture.
    """
    name = config.model.name or "the run's model"
    return fit_weights(weights, config.init_from or config.run, architecture, name, config.seed)


def about_model(
    config: AnyRun,
    architecture: NetworkConfig,
    class_names: Sequence[str],
    preprocessing: ImageSteps | None = None,
) -> dict[str, Any]:
    """What a run keeps beside its weights, so that each checkpoint is a model."""
    provenance = {"run": config.run.name, "init_from": config.init_from}
    return describe_model(architecture, provenance, class_names, preprocessing)


def check_same_labels(weights: Weights[Any], what: str, names: Sequence[str], where: str) -> None:
    """Checks that a class means the same to weights and to a data set.

    Args:
        weights: of a classifier or segmenter.
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
    config: AnyRun,
    saved: dict[str, Any],
    architecture: NetworkConfig,
    class_names: Sequence[str],
) -> None:
    """Refuses to go on with a run that was something else.

    Args:
        config: the run as it is asked for.
        saved: its configuration at the last checkpoint, as JSON types.
        architecture: what it is to train.
        class_names: names of the classes of its images.

    Raises:
        RunError: naming every setting that is another one.
    """
    kind = SegmentationConfig if isinstance(config, SegmentationConfig) else RunConfig
    if kind is not kind_of_run(saved):
        raise _another_task(config)
    before = from_json(kind, saved)
    latest = describe_saved(
        config.run / "checkpoints" / str(complete_steps(config.run / "checkpoints")[-1])
    )
    was, now = _vmamba(latest.config), _vmamba(architecture)
    changed = differences(
        to_json(_identity_of(before, architecture)), to_json(_identity_of(config, architecture))
    )
    changed += [
        f"{field}: {getattr(was, field)} -> {getattr(now, field)}"
        for field in differing_fields(was, now)
        if field != "in_chans"  # the images' own
    ]
    if latest.class_names not in (None, list(class_names)):
        changed.append(f"classes: {_few(latest.class_names)} -> {_few(class_names)}")
    if changed:
        raise RunError(
            f"{config.run} holds a run with other settings ({'; '.join(changed)}): give the same "
            "ones to go on with it, another folder with --run to keep both, or delete it"
        )


def kind_of_run(saved: dict[str, Any]) -> type[RunConfig] | type[SegmentationConfig]:
    """Which configuration a run was trained with, from its JSON form."""
    return SegmentationConfig if "updates" in saved else RunConfig


def say_which(console: Console, label: str, config: AnyRun, weights: Weights[Any]) -> None:
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


def _vmamba(architecture: NetworkConfig) -> VMambaConfig:
    return architecture if isinstance(architecture, VMambaConfig) else architecture.backbone


def _another_task(config: AnyRun) -> RunError:
    return RunError(f"{config.run} holds a run of another task: choose another folder with --run")


def _identity_of(config: AnyRun, architecture: NetworkConfig) -> AnyRun:
    """The part of a configuration that an interrupted run must be resumed with.

    Everything else (where the data lies, by which means and on how many devices and workers the
    same is computed, how it is evaluated, how long the run is, what is logged) may change. The
    architecture is compared by itself.
    """
    is_segmenter = isinstance(config, SegmentationConfig)
    blank: Any = SegmentationConfig() if is_segmenter else RunConfig()
    # Only batch statistics are other ones in a batch that comes in parts; a segmenter's heads have
    # some.
    in_parts = is_segmenter or _vmamba(architecture).norm_layer == "bn"
    evaluation = ("eval_mode", "eval_stride") if is_segmenter else ()
    free = ("root", "workers", "eval_batch_size", "damaged_is_fatal", *evaluation)
    optimizer: Any = config.optimizer
    model: Any = config.model
    data: Any = config.data
    return dataclasses.replace(
        blank,
        seed=config.seed,
        model=dataclasses.replace(
            model,
            name=blank.model.name,
            use_checkpoint=blank.model.use_checkpoint,
            scan_blocks=blank.model.scan_blocks,
            **({} if is_segmenter else {"recompute": blank.model.recompute}),
        ),
        optimizer=dataclasses.replace(
            optimizer, accumulation_steps=optimizer.accumulation_steps if in_parts else 1
        ),
        data=dataclasses.replace(data, **{name: getattr(blank.data, name) for name in free}),
    )

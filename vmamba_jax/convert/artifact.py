"""A model on disk: weights and all that it takes to use them, in one Orbax checkpoint.

Converted models and the checkpoints of training runs are folders of one kind, so that whatever
reads the one reads the other:

- ``variables``: the weights, and ``ema``: their moving average, where a run keeps one;
- ``model``: architecture, class names, preprocessing and provenance, as JSON.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.layout import WeightChoice
from vmamba_jax.convert.tasks import (
    CLASSIFICATION,
    ImageSteps,
    NetworkConfig,
    task_named,
    task_of,
)
from vmamba_jax.errors import CheckpointError
from vmamba_jax.local_path import local_path
from vmamba_jax.preprocessing import Preprocessing, from_json
from vmamba_jax.registry import model_config
from vmamba_jax.run_folder import choose_step, complete_steps, describe_step
from vmamba_jax.typing import Variables

_SETTINGS = "meta"  # of the run, in its checkpoints; see `vmamba_jax.checkpoint`


class SavedModel(NamedTuple):
    """What `save_model` keeps.

    Attributes:
        variables: NumPy arrays in the tree that the network's ``apply`` takes.
        config: the architecture.
        provenance: where the weights came from, as JSON types.
        class_names: names of the classes, where they were known.
        preprocessing: what images have to go through, where it was known.
    """

    variables: Variables
    config: NetworkConfig
    provenance: dict[str, Any]
    class_names: list[str] | None
    preprocessing: ImageSteps | None = None


def describe_model(
    config: NetworkConfig,
    provenance: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: ImageSteps | None = None,
) -> dict[str, Any]:
    """What is kept beside the weights, as JSON types; arguments as of `save_model`."""
    return {
        "task": task_of(config).name,
        "config": dataclasses.asdict(config),
        "provenance": dict(provenance or {}),
        "class_names": None if class_names is None else list(class_names),
        "preprocessing": None if preprocessing is None else dataclasses.asdict(preprocessing),
    }


def save_model(
    path: str | os.PathLike[str],
    variables: Variables,
    config: NetworkConfig,
    provenance: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: ImageSteps | None = None,
) -> None:
    """Writes a model; the folder appears only when it is complete.

    Args:
        path: a folder that does not exist yet.
        variables: variable collections, on devices or host.
        config: the architecture they belong to.
        provenance: where they came from, as JSON types.
        class_names: names of the classes in the head's order.
        preprocessing: what images have to go through.

    Raises:
        CheckpointError: if something is at `path` already.
        OSError: if it can't be written.
    """
    path = local_path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another name or delete it")
    about = describe_model(config, provenance, class_names, preprocessing)
    tree = jax.tree.map(np.asarray, variables)
    path.parent.mkdir(parents=True, exist_ok=True)
    args = ocp.args.Composite(variables=ocp.args.PyTreeSave(tree), model=ocp.args.JsonSave(about))
    with only_news(), ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(path, args=args)


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a training run, or the one of its checkpoints."""
    return (path / "checkpoints").is_dir() or bool(complete_steps(path))


def load_model(
    path: str | os.PathLike[str], *, step: str | None = None, weights: WeightChoice = "auto"
) -> SavedModel:
    """Reads what `save_model` or a training run wrote.

    Args:
        path: a folder from `save_model`, the folder of a run, or one of its checkpoints.
        step: which checkpoint of a run: ``"best"``, ``"latest"`` or its number; by default the
            best, or the latest where none was evaluated.
        weights: of a run: ``"ema"`` the moving average, ``"model"`` the weights as trained,
            ``"auto"`` the average if there is one. What one model is known not to be is refused.

    Raises:
        CheckpointError: not such a folder, incomplete, or damaged.
    """
    path = local_path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if is_run(path):
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        path = folder / str(choose_step(folder, step))
    elif step is not None:
        raise CheckpointError(
            f"{path}: one model, and a step is chosen among the checkpoints of a run"
        )
    held = _items(path)
    if weights == "ema" and _SETTINGS in held and "ema" not in held:
        raise CheckpointError(f"{path}: it has no averaged (EMA) weights")
    averaged = "ema" in held and weights != "model"
    try:
        saved = _described(_describe(path))
        provenance = saved.provenance
        if _SETTINGS in held:
            chosen = {"layout": "training run", "weights": describe_step(path)}
            provenance = {**provenance, **chosen, "averaged": averaged}
        elif weights != "auto" and provenance.get("averaged") is (weights == "model"):
            kind = {"ema": "averaged (EMA)", "model": "plain"}[weights]
            raise CheckpointError(f"{path}: one model, and not of {kind} weights")
        variables = _read(path, "ema" if averaged else "variables")
        return saved._replace(variables=variables, provenance=provenance)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from error


def describe_saved(path: Path) -> SavedModel:
    """A model, or one checkpoint of a run, without its weights: `variables` is empty.

    Raises:
        CheckpointError: not such a folder, incomplete, or damaged.
    """
    path = path.absolute()
    _items(path)
    try:
        return _described(_describe(path))
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from error


def weights_handler() -> ocp.PyTreeCheckpointHandler:
    """How weights lie on disk, in converted models and in the checkpoints of runs."""
    # One file an array, and no copy of the arrays: Orbax's defaults hold the whole checkpoint in
    # memory twice more while it is written.
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, handlers.ArrayHandler()),
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )


def _items(path: Path) -> set[str]:
    held = {item for item in ("variables", "ema", "model", _SETTINGS) if (path / item).is_dir()}
    if "variables" not in held or held.isdisjoint(("model", _SETTINGS)):
        raise CheckpointError(
            f"{path}: not a saved model, and no training run; `vmamba-jax convert` and "
            "`save_model` write the one, train.py the other"
        )
    return held


def _describe(path: Path) -> dict[str, Any]:
    """What `describe_model` made, also of a run that an earlier version trained."""
    item = "model" if (path / "model").is_dir() else _SETTINGS
    directory: Any = path / item  # its annotation asks for the path type of another library
    about = dict(ocp.JsonCheckpointHandler().restore(directory))
    if item == "model":
        return about
    name, data = about["model"]["name"], about["data"]
    try:
        config = model_config(name)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: of an earlier version, which kept no architecture beside weights: {error}"
        ) from error
    classes = _shapes(path / "variables")["params"]["head"]["bias"].shape[0]
    return describe_model(
        config.replace(num_classes=classes, imgsize=data["image_size"]),
        preprocessing=Preprocessing(data["image_size"], data["eval_crop"]),
    )


def _described(about: Mapping[str, Any]) -> SavedModel:
    fields = dict(about["config"])
    if "backbone" in fields:
        fields["backbone"] = VMambaConfig(**fields["backbone"])
    # Models saved by earlier versions are classifiers.
    task = task_named(about.get("task", CLASSIFICATION.name))
    config = task.config(**fields)
    names, steps = about.get("class_names"), about.get("preprocessing")
    if names is not None and (
        len(names) != config.num_classes or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"it has {config.num_classes} classes and not as many names")
    if steps is not None:
        if task.preprocessing is None:
            raise ValueError(f"{task.name} keeps no preprocessing")
        steps = from_json(task.preprocessing, steps)
    return SavedModel({}, config, about["provenance"], names, steps)


def _shapes(directory: Any) -> Any:
    return weights_handler().metadata(directory).tree


def _read(path: Path, item: str) -> Variables:
    """One set of weights, as arrays of the host whichever devices wrote them."""
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _shapes(path / item))
    args = ocp.args.Composite(**{item: ocp.args.PyTreeRestore(restore_args=whole)})
    with ocp.Checkpointer(_handler()) as checkpointer:
        return checkpointer.restore(path, args=args)[item]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return CheckpointError(f"{path}: incomplete or damaged ({reason})")


@contextmanager
def only_news() -> Iterator[None]:
    """Keeps Orbax from warning, at each save, that a format it was told not to use is not used."""

    def is_news(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def _handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(
        variables=weights_handler(), ema=weights_handler(), model=ocp.JsonCheckpointHandler()
    )

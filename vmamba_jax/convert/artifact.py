"""A model on disk: weights, architecture and provenance in one Orbax checkpoint."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.tasks import CLASSIFICATION, NetworkConfig, task_named, task_of
from vmamba_jax.errors import CheckpointError
from vmamba_jax.typing import Variables


class SavedModel(NamedTuple):
    """What `save_model` keeps.

    Attributes:
        variables: NumPy arrays in the tree that the network's ``apply`` takes.
        config: the architecture.
        provenance: where the weights came from, as JSON types.
        class_names: names of the classes, where they were known.
    """

    variables: Variables
    config: NetworkConfig
    provenance: dict[str, Any]
    class_names: list[str] | None


def save_model(
    path: str | os.PathLike[str],
    variables: Variables,
    config: NetworkConfig,
    provenance: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a model; the folder appears only when it is complete.

    Args:
        path: a folder that does not exist yet.
        variables: variable collections, on devices or host.
        config: the architecture they belong to.
        provenance: where they came from, as JSON types.
        class_names: names of the classes in the head's order.

    Raises:
        CheckpointError: if something is at `path` already.
        OSError: if it can't be written.
    """
    path = Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another name or delete it")
    about = {
        "task": task_of(config).name,
        "config": dataclasses.asdict(config),
        "provenance": dict(provenance or {}),
        "class_names": None if class_names is None else list(class_names),
    }
    tree = jax.tree.map(np.asarray, variables)
    path.parent.mkdir(parents=True, exist_ok=True)
    args = ocp.args.Composite(variables=ocp.args.PyTreeSave(tree), model=ocp.args.JsonSave(about))
    logger = logging.getLogger("absl")
    logger.addFilter(_is_news)
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            checkpointer.save(path, args=args)
    finally:
        logger.removeFilter(_is_news)


def load_model(path: str | os.PathLike[str]) -> SavedModel:
    """Reads what `save_model` wrote.

    Raises:
        CheckpointError: not such a folder, incomplete, or damaged.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not (path / "model").is_dir() or not (path / "variables").is_dir():
        raise CheckpointError(
            f"{path}: not a saved model; `vmamba-jax convert` and `save_model` write one"
        )
    try:
        with ocp.Checkpointer(_handler()) as checkpointer:
            saved = checkpointer.restore(
                path,
                args=ocp.args.Composite(
                    variables=ocp.args.PyTreeRestore(), model=ocp.args.JsonRestore()
                ),
            )
        about = saved["model"]
        config = _config(about)
        return SavedModel(saved["variables"], config, about["provenance"], about.get("class_names"))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path}: incomplete or damaged ({reason})") from error


def _config(about: dict[str, Any]) -> NetworkConfig:
    fields = dict(about["config"])
    if "backbone" in fields:
        fields["backbone"] = VMambaConfig(**fields["backbone"])
    # Models saved by earlier versions are classifiers.
    return task_named(about.get("task", CLASSIFICATION.name)).config(**fields)


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax warns that there is nothing of the format to merge that we tell it not to use.
    return "Skipping merge of OCDBT" not in record.getMessage()


def _handler() -> ocp.CompositeCheckpointHandler:
    # One file an array, and no copy of the arrays: Orbax's defaults hold the whole checkpoint in
    # memory twice more while it is written.
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, handlers.ArrayHandler()),
    )
    weights = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    return ocp.CompositeCheckpointHandler(variables=weights, model=ocp.JsonCheckpointHandler())

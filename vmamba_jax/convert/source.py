"""Weights from any file we know, brought to today's names, with a report of what was done."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.adapt import (
    replace_head,
    replace_last_layers,
    resize_position_embedding,
)
from vmamba_jax.convert.artifact import load_model
from vmamba_jax.convert.backbone import (
    as_backbone,
    as_classifier,
    backbone_from_torch,
    without_classifier,
)
from vmamba_jax.convert.hugging_face import Port, is_port, load_port
from vmamba_jax.convert.layout import WeightChoice, find_weights
from vmamba_jax.convert.mapping import from_torch, infer_config, is_counter, to_torch
from vmamba_jax.convert.naming import Change, standard_names
from vmamba_jax.convert.tasks import NetworkConfig, task_of
from vmamba_jax.convert.torch_file import SHARDS, load_torch_file
from vmamba_jax.convert.upernet import backbone_of
from vmamba_jax.errors import CheckpointError
from vmamba_jax.typing import Variables

_CHUNK = 1 << 20

Config = TypeVar("Config", bound=NetworkConfig)


@dataclasses.dataclass(frozen=True)
class Weights(Generic[Config]):
    """A network's weights and where they came from.

    Attributes:
        state_dict: arrays under PyTorch's names of today.
        config: the architecture.
        provenance: source, its hash, layout, the weights chosen; as JSON types.
        changes: what became of each tensor of the source.
        class_names: names of the classes, where the source has them.
    """

    state_dict: dict[str, np.ndarray]
    config: Config
    provenance: dict[str, Any]
    changes: list[Change]
    class_names: list[str] | None = None

    def variables(self) -> Variables:
        """The weights as float32 variables for the network's ``apply``."""
        return from_torch(self.state_dict, self.config)


def read_weights(
    path: str | os.PathLike[str],
    weights: WeightChoice = "auto",
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    *,
    entry: str | None = None,
    prefix: str | None = None,
) -> Weights[VMambaConfig]:
    """Reads a VMamba from a PyTorch checkpoint, a safetensors file or a saved model.

    Of a network that has it for its backbone it reads the VMamba alone; `read_network` reads all.

    Args:
        path: a ``.pth`` file of any VMamba release or training run, a ``.safetensors`` file, a
            folder (or an index of shards) of the Hugging Face port, or a folder from `save_model`.
        weights: which ones, where a training run saved two; see `find_weights`.
        num_classes: replace the head by a new one of so many classes, unless it has them.
        image_size: resize the position embedding for images of this side, if there is one.
        seed: of a new head's weights.
        entry: the entry of the file that holds the model, where several do; see `find_weights`.
        prefix: what the model's names begin with, where an entry holds several.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        OSError: if the file can't be opened.
    """
    path = Path(path)
    with _naming(path):
        read = _vmamba_of(_read(path, weights, entry, prefix))
        return _fit_classifier(read, num_classes, image_size, seed)


def read_network(
    path: str | os.PathLike[str],
    weights: WeightChoice = "auto",
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    *,
    entry: str | None = None,
    prefix: str | None = None,
) -> Weights[NetworkConfig]:
    """Reads all of the network in a file: a classifier, or a segmenter or detector with its heads.

    Takes and raises what `read_weights` does. The type of ``config`` tells which network it is.
    """
    path = Path(path)
    with _naming(path):
        read = _read(path, weights, entry, prefix)
        if isinstance(read.config, VMambaConfig):
            classifier = _fit_classifier(_vmamba_of(read), num_classes, image_size, seed)
            return cast("Weights[NetworkConfig]", classifier)
        new_head: list[Change] = []
        if num_classes is not None:
            config = read.config.replace(num_classes=num_classes)
            layers = task_of(config).last_layers(num_classes)
            state_dict, new_head = replace_last_layers(read.state_dict, layers, seed)
            names = None if new_head else read.class_names
            read = dataclasses.replace(
                read, state_dict=state_dict, config=config, class_names=names
            )
        return _finish(read, new_head)


def _fit_classifier(
    read: Weights[VMambaConfig], num_classes: int | None, image_size: int | None, seed: int
) -> Weights[VMambaConfig]:
    state_dict, changes = as_classifier(read.state_dict, read.changes)
    config, new_head, resized = read.config, [], []
    if num_classes is not None:
        config = config.replace(num_classes=num_classes)
        state_dict, new_head = replace_head(state_dict, num_classes, seed)
    if image_size is not None and config.posembed:
        config = config.replace(imgsize=image_size)
        side = image_size // config.patch_size
        state_dict, resized = resize_position_embedding(state_dict, side)
    read = dataclasses.replace(
        read,
        state_dict=state_dict,
        config=config,
        changes=changes,
        class_names=None if new_head else read.class_names,
    )
    return _finish(read, new_head + resized)


def _finish(read: Weights[Config], changed: list[Change]) -> Weights[Config]:
    """Checks the weights, and adds what changed last and what a saved model has to know."""
    from_torch(read.state_dict, read.config)  # strict: every missing, unexpected or misshapen key
    again = {change.target or change.source for change in changed}
    changes = [change for change in read.changes if change.target not in again]
    return dataclasses.replace(
        read,
        provenance={**read.provenance, **_beside_float32(read.state_dict)},
        changes=changes + changed,
    )


def read_backbone(
    path: str | os.PathLike[str],
    out_indices: Sequence[int] | None = None,
    weights: WeightChoice = "auto",
    *,
    entry: str | None = None,
    prefix: str | None = None,
) -> Weights[VMambaConfig]:
    """Reads the backbone in any file that `read_weights` takes.

    Args:
        path: the file or folder.
        out_indices: the stages whose maps are asked for, of those that there are; None: all.
        weights: which ones, where a training run saved two; see `find_weights`.
        entry: the entry of the file that holds the model, where several do; see `find_weights`.
        prefix: what the model's names begin with, where an entry holds several.

    Returns:
        The weights of ``VSSMBackbone(config, out_indices)``. A norm of a map that the file has not
        is new, with its scale at one, and listed as initialised.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        OSError: if the file can't be opened.
    """
    path = Path(path)
    with _naming(path):
        read = _vmamba_of(_read(path, weights, entry, prefix))
        config = read.config.replace(num_classes=0, posembed=False)
        stages = range(len(config.depths))
        out_indices = [i for i in stages if out_indices is None or i in out_indices]
        state_dict, changes = as_backbone(read.state_dict, read.changes, config, out_indices)
        backbone_from_torch(state_dict, config, out_indices)  # strict
    return dataclasses.replace(
        read, state_dict=state_dict, config=config, changes=changes, class_names=None
    )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before whatever is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        prefix = "" if message.startswith(str(path)) else f"{path}: "
        raise CheckpointError(prefix + message) from error
    except (ValueError, OverflowError) as error:  # sizes that JAX has no numbers for
        raise CheckpointError(f"{path}: {error}") from error


def _read(
    path: Path, weights: WeightChoice, entry: str | None, prefix: str | None
) -> Weights[NetworkConfig]:
    """The network in a file, not checked yet."""
    if path.suffix == ".distcp" or (path / ".metadata").exists():
        raise CheckpointError(SHARDS)
    if path.is_dir() and not is_port(path):
        return _read_saved_model(path)
    return _read_file(path, weights, entry, prefix)


def _vmamba_of(read: Weights[NetworkConfig]) -> Weights[VMambaConfig]:
    """A network's backbone as what it is when it stands alone."""
    if isinstance(read.config, VMambaConfig):
        return cast("Weights[VMambaConfig]", read)
    start, why = "backbone.", f"no part of the backbone of {task_of(read.config).holds}"
    changes = [
        change._replace(target=change.target.removeprefix(start))
        if change.target.startswith(start) or not change.target
        else Change(change.source, "", "left out", why)
        for change in read.changes
    ]
    config = read.config.backbone.replace(num_classes=0)
    return Weights(backbone_of(read.state_dict), config, read.provenance, changes)


def _beside_float32(state_dict: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a saved model, float32 throughout, needs to give a state dict's own bits back."""
    counters = {key: array for key, array in state_dict.items() if is_counter(key)}
    dtypes = {
        key: array.dtype.name
        for key, array in state_dict.items()
        if array.dtype != np.float32 and key not in counters and widens(array.dtype)
    }
    return {"dtypes": dtypes, "counters": {key: int(array) for key, array in counters.items()}}


def widens(dtype: np.dtype) -> bool:
    """Whether float32 holds every value of a type."""
    return np.can_cast(dtype, np.float32, "safe")


def _read_saved_model(path: Path) -> Weights[NetworkConfig]:
    saved = load_model(path)
    state_dict = to_torch(saved.variables, saved.config)
    # The file's own types again; exact, since they were widened.
    dtypes = saved.provenance.get("dtypes", {})
    if "dtype" in saved.provenance:  # one for all, in models saved by earlier versions
        weights = (key for key, array in state_dict.items() if array.dtype == np.float32)
        dtypes = dict.fromkeys(weights, saved.provenance["dtype"])
    state_dict |= {key: state_dict[key].astype(np.dtype(name)) for key, name in dtypes.items()}
    state_dict |= {
        key: np.asarray(count, np.int64)
        for key, count in saved.provenance.get("counters", {}).items()
    }
    changes = [Change(key, key, "mapped") for key in state_dict]
    return Weights(state_dict, saved.config, saved.provenance, changes, saved.class_names)


def _read_file(
    path: Path, weights: WeightChoice, entry: str | None, prefix: str | None
) -> Weights[NetworkConfig]:
    port = load_port(path) if is_port(path) else Port([path], load_torch_file(path), {}, None)
    found = find_weights(port.tensors, weights, entry, prefix)
    files, config_fields, class_names = port.files, port.config_fields, port.class_names
    del port  # its optimizer state, as large as the weights twice over
    held = (*found.tensors.values(), *found.heads.values())
    if sum(array.nbytes for array in held) > sum(file.stat().st_size for file in files):
        raise CheckpointError("damaged: its tensors are views of one another, larger than the file")
    state_dict, changes = standard_names(found.tensors)
    changes = [change._replace(source=found.prefix + change.source) for change in changes]
    if found.heads:
        state_dict, changes = without_classifier(state_dict, changes)
        state_dict = {f"backbone.{key}": array for key, array in state_dict.items()} | found.heads
        changes = [c._replace(target=c.target and f"backbone.{c.target}") for c in changes]
        changes += [Change(key, key, "mapped") for key in found.heads]
    changes += [Change(name, "", "left out", why) for name, why in found.left_out.items()]
    stated = {**found.config_fields, **config_fields}
    config = infer_config(state_dict)
    if isinstance(config, VMambaConfig):
        config = config.replace(**stated)
    else:
        config = config.replace(backbone=config.backbone.replace(**stated))
    class_names = found.class_names if class_names is None else class_names
    if class_names is not None and len(class_names) != config.num_classes:
        class_names = None
    provenance = {
        "source": path.name,
        "sha256": sha256(*files),
        "layout": found.layout,
        "weights": found.entry or "state dict",
        "prefix": found.prefix,
        "averaged": found.averaged,
        "stated": sorted(stated),
    }
    return Weights(state_dict, config, provenance, changes, class_names)


def sha256(*paths: Path) -> str:
    """Hash of the content of files, one after the other, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()

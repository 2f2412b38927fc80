"""Weights from any file we know, brought to today's names, with a report of what was done."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.adapt import (
    replace_head,
    replace_input_channels,
    replace_last_layers,
    resize_position_embedding,
)
from vmamba_jax.convert.artifact import is_run, load_model
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
from vmamba_jax.convert.tasks import ImageSteps, NetworkConfig, task_of
from vmamba_jax.convert.torch_file import SHARDS, load_torch_file
from vmamba_jax.convert.vmamba import BACKBONE, backbone_of
from vmamba_jax.errors import CheckpointError
from vmamba_jax.local_path import local_path
from vmamba_jax.preprocessing import Preprocessing, for_channels
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
        preprocessing: what images have to go through, where the source says it.
    """

    state_dict: dict[str, np.ndarray]
    config: Config
    provenance: dict[str, Any]
    changes: list[Change]
    class_names: list[str] | None = None
    preprocessing: ImageSteps | None = None

    def variables(self) -> Variables:
        """The weights as float32 variables for the network's ``apply``."""
        return from_torch(self.state_dict, self.config)


def read_weights(
    path: str | os.PathLike[str],
    weights: WeightChoice = "auto",
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    *,
    in_chans: int | None = None,
    entry: str | None = None,
    prefix: str | None = None,
    step: str | None = None,
) -> Weights[Any]:
    """Reads a network from a PyTorch checkpoint, a safetensors file, a saved model or a run.

    The type of ``config`` tells which network it is: `VMambaConfig` a classifier, or a bare
    backbone made one; `UPerNetConfig` a segmenter; `MaskRCNNConfig` a detector.

    Args:
        path: a ``.pth`` file of any VMamba release or training run, a ``.safetensors`` file, a
            folder (or an index of shards) of the Hugging Face port, a folder from `save_model`, or
            the folder of a training run of this package or one of its checkpoints.
        weights: which ones, where a training run saved two; see `find_weights`.
        num_classes: replace the last layers by new ones of so many classes, unless they have them.
        image_size: resize the position embedding, if there is one, for images of this height and
            width, or of one number for both.
        seed: of new layers' weights.
        in_chans: fit weights for RGB images to so many channels; see `replace_input_channels`.
        entry: the entry of the file that holds the model, where several do; see `find_weights`.
        prefix: what the model's names begin with, where an entry holds several.
        step: which checkpoint of a run of this package; see `load_model`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        OSError: if the file can't be opened.
    """
    path = local_path(path)
    with _naming(path):
        read = _read(path, weights, entry, prefix, step)
        return adapt_weights(read, num_classes, image_size, in_chans, seed)


def adapt_weights(
    read: Weights[Any],
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    seed: int = 0,
) -> Weights[Any]:
    """Fits weights to other classes or images; arguments as of `read_weights`.

    Raises:
        CheckpointError: they can't be fitted to so many channels.
        ValueError: naming every key that is missing, unexpected, or of another shape.
    """
    config, preprocessing = read.config, read.preprocessing
    is_classifier = isinstance(config, VMambaConfig)
    state_dict, changes = read.state_dict, read.changes
    new_head, resized, channels = [], [], []
    if is_classifier:
        state_dict, changes = as_classifier(state_dict, changes)
    if num_classes is not None:
        config = config.replace(num_classes=num_classes)
        if is_classifier:
            state_dict, new_head = replace_head(state_dict, num_classes, seed)
        else:
            layers = task_of(config).last_layers(num_classes)
            state_dict, new_head = replace_last_layers(state_dict, layers, seed)
    if in_chans is not None:
        start = "" if is_classifier else BACKBONE
        config = _with_channels(config, in_chans)
        state_dict, channels = replace_input_channels(state_dict, in_chans, start)
    if image_size is not None and is_classifier and config.posembed:
        config = config.replace(imgsize=image_size)
        patches = config.feature_size(*config.input_size, stage=0)
        state_dict, resized = resize_position_embedding(state_dict, *patches)
    from_torch(state_dict, config)  # strict: every missing, unexpected or misshapen key
    if isinstance(preprocessing, Preprocessing) and image_size is not None:
        preprocessing = preprocessing.replace(image_size=image_size)
    if isinstance(preprocessing, Preprocessing) and channels and in_chans is not None:
        mean, std = (for_channels(v, in_chans) for v in (preprocessing.mean, preprocessing.std))
        preprocessing = preprocessing.replace(mean=mean, std=std)
    made = [*channels, *resized, *new_head]
    changed = {change.target or change.source for change in made}
    return dataclasses.replace(
        read,
        state_dict=state_dict,
        config=config,
        provenance={**read.provenance, **_beside_float32(state_dict)},
        changes=[change for change in changes if change.target not in changed] + made,
        class_names=None if new_head else read.class_names,
        preprocessing=preprocessing,
    )


def vmamba_of(read: Weights[Any]) -> Weights[VMambaConfig]:
    """A network's backbone as what it is when it stands alone; a classifier stays what it is."""
    if isinstance(read.config, VMambaConfig):
        return read
    why = f"no part of the backbone of {task_of(read.config).holds}"
    changes = [
        change._replace(target=change.target.removeprefix(BACKBONE))
        if change.target.startswith(BACKBONE) or not change.target
        else Change(change.source, "", "left out", why)
        for change in read.changes
    ]
    config = read.config.backbone.replace(num_classes=0)
    return Weights(backbone_of(read.state_dict), config, read.provenance, changes)


def read_backbone(
    path: str | os.PathLike[str],
    out_indices: Sequence[int] | None = None,
    weights: WeightChoice = "auto",
    *,
    entry: str | None = None,
    prefix: str | None = None,
    step: str | None = None,
) -> Weights[VMambaConfig]:
    """Reads the backbone in any file that `read_weights` takes.

    Args:
        path: the file or folder.
        out_indices: the stages whose maps are asked for, of those that there are; None: all.
        weights: which ones, where a training run saved two; see `find_weights`.
        entry: the entry of the file that holds the model, where several do; see `find_weights`.
        prefix: what the model's names begin with, where an entry holds several.
        step: which checkpoint of a run of this package; see `load_model`.

    Returns:
        The weights of ``VSSMBackbone(config, out_indices)``. A norm of a map that the file has not
        is new, with its scale at one, and listed as initialised.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        OSError: if the file can't be opened.
    """
    path = local_path(path)
    with _naming(path):
        read = vmamba_of(_read(path, weights, entry, prefix, step))
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
    path: Path, weights: WeightChoice, entry: str | None, prefix: str | None, step: str | None
) -> Weights[NetworkConfig]:
    """The network in a file, not checked yet."""
    if path.suffix == ".distcp" or (path / ".metadata").exists():
        raise CheckpointError(SHARDS)
    if path.is_dir() and (is_run(path) or not is_port(path)):
        if entry is not None or prefix is not None:
            raise CheckpointError(
                "an entry or a prefix is chosen inside a file, and this is a folder of vmamba_jax"
            )
        return _read_saved_model(path, step, weights)
    if step is not None:
        raise CheckpointError("a step is chosen among the checkpoints of a run of vmamba_jax")
    return _read_file(path, weights, entry, prefix)


def _with_channels(config: Any, in_chans: int) -> Any:
    if isinstance(config, VMambaConfig):
        return config.replace(in_chans=in_chans)
    return config.replace(backbone=config.backbone.replace(in_chans=in_chans))


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


def _read_saved_model(
    path: Path, step: str | None, weights: WeightChoice
) -> Weights[NetworkConfig]:
    saved = load_model(path, step=step, weights=weights)
    state_dict = to_torch(saved.variables, saved.config)
    # The file's own types again; exact, since they were widened.
    dtypes = saved.provenance.get("dtypes", {})
    if "dtype" in saved.provenance:  # one for all, in models saved by earlier versions
        floats = (key for key, array in state_dict.items() if array.dtype == np.float32)
        dtypes = dict.fromkeys(floats, saved.provenance["dtype"])
    state_dict |= {key: state_dict[key].astype(np.dtype(name)) for key, name in dtypes.items()}
    state_dict |= {
        key: np.asarray(count, np.int64)
        for key, count in saved.provenance.get("counters", {}).items()
    }
    changes = [Change(key, key, "mapped") for key in state_dict]
    return Weights(
        state_dict, saved.config, saved.provenance, changes, saved.class_names, saved.preprocessing
    )


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
    changes = [change._replace(source=found.sources[change.source]) for change in changes]
    if found.heads:
        state_dict, changes = without_classifier(state_dict, changes)
        state_dict = {f"{BACKBONE}{key}": array for key, array in state_dict.items()} | found.heads
        changes = [c._replace(target=c.target and f"{BACKBONE}{c.target}") for c in changes]
        changes += [Change(found.sources[key], key, "mapped") for key in found.heads]
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

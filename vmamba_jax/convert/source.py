"""Weights from any file we know, brought to today's names, with a report of what was done."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.adapt import (
    replace_head,
    replace_input_channels,
    resize_position_embedding,
)
from vmamba_jax.convert.artifact import is_run, load_model
from vmamba_jax.convert.hugging_face import Port, is_port, load_port
from vmamba_jax.convert.layout import WeightChoice, find_weights
from vmamba_jax.convert.mapping import from_torch, infer_config, is_counter, to_torch
from vmamba_jax.convert.naming import Change, standard_names
from vmamba_jax.convert.torch_file import SHARDS, load_torch_file
from vmamba_jax.errors import CheckpointError
from vmamba_jax.preprocessing import Preprocessing, for_channels
from vmamba_jax.typing import Variables

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's weights and where they came from.

    Attributes:
        state_dict: arrays under PyTorch's names of today.
        config: the architecture.
        provenance: source, its hash, layout, the weights chosen; as JSON types.
        changes: what became of each tensor of the source.
        class_names: names of the classes, where the source has them.
        preprocessing: what images have to go through, where the source says it.
    """

    state_dict: dict[str, np.ndarray]
    config: VMambaConfig
    provenance: dict[str, Any]
    changes: list[Change]
    class_names: list[str] | None = None
    preprocessing: Preprocessing | None = None

    def variables(self) -> Variables:
        """The weights as float32 variables for ``VSSM(config).apply``."""
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
) -> Weights:
    """Reads a model from a PyTorch checkpoint, a safetensors file, a saved model or a run.

    Args:
        path: a ``.pth`` file of any VMamba release or training run, a ``.safetensors`` file, a
            folder (or an index of shards) of the Hugging Face port, a folder from `save_model`, or
            the folder of a training run of this package or one of its checkpoints.
        weights: which ones, where a training run saved two; see `find_weights`.
        num_classes: replace the head by a new one of so many classes, unless it has them.
        image_size: resize the position embedding, if there is one, for images of this height and
            width, or of one number for both.
        seed: of a new head's weights.
        in_chans: fit weights for RGB images to so many channels; see `replace_input_channels`.
        entry: the entry of the file that holds the model, where several do; see `find_weights`.
        prefix: what the model's names begin with, where an entry holds several.
        step: which checkpoint of a run of this package; see `load_model`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
        OSError: if the file can't be opened.
    """
    path = Path(path)
    try:
        if path.suffix == ".distcp" or (path / ".metadata").exists():
            raise CheckpointError(SHARDS)
        if path.is_dir() and (is_run(path) or not is_port(path)):
            read = _read_saved_model(path, step, weights)
        elif step is not None:
            raise CheckpointError("a step is chosen among the checkpoints of a run of vmamba_jax")
        else:
            read = _read_file(path, weights, entry, prefix)
        return adapt_weights(read, num_classes, image_size, in_chans, seed)
    except CheckpointError as error:
        message = str(error)
        prefix = "" if message.startswith(str(path)) else f"{path}: "
        raise CheckpointError(prefix + message) from error
    except (ValueError, OverflowError) as error:  # sizes that JAX has no numbers for
        raise CheckpointError(f"{path}: {error}") from error


def adapt_weights(
    read: Weights,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    seed: int = 0,
) -> Weights:
    """Fits weights to other classes or images; arguments as of `read_weights`.

    Raises:
        ValueError: naming every key that is missing, unexpected, or of another shape.
    """
    config, state_dict, preprocessing = read.config, read.state_dict, read.preprocessing
    new_head, resized, channels = [], [], []
    if num_classes is not None:
        config = config.replace(num_classes=num_classes)
        state_dict, new_head = replace_head(state_dict, num_classes, seed)
    if in_chans is not None:
        config = config.replace(in_chans=in_chans)
        state_dict, channels = replace_input_channels(state_dict, in_chans)
    if image_size is not None and config.posembed:
        config = config.replace(imgsize=image_size)
        patches = config.feature_size(*config.input_size, stage=0)
        state_dict, resized = resize_position_embedding(state_dict, *patches)
    from_torch(state_dict, config)  # strict: every missing, unexpected or misshapen key
    if preprocessing is not None and image_size is not None:
        preprocessing = preprocessing.replace(image_size=image_size)
    if preprocessing is not None and channels and in_chans is not None:
        mean, std = (for_channels(v, in_chans) for v in (preprocessing.mean, preprocessing.std))
        preprocessing = preprocessing.replace(mean=mean, std=std)
    made = [*channels, *resized, *new_head]
    changed = {change.target or change.source for change in made}
    changes = [change for change in read.changes if change.target not in changed]
    return dataclasses.replace(
        read,
        state_dict=state_dict,
        config=config,
        provenance={**read.provenance, **_beside_float32(state_dict)},
        changes=changes + made,
        class_names=None if new_head else read.class_names,
        preprocessing=preprocessing,
    )


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


def _read_saved_model(path: Path, step: str | None, weights: WeightChoice) -> Weights:
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


def _read_file(path: Path, weights: WeightChoice, entry: str | None, prefix: str | None) -> Weights:
    port = load_port(path) if is_port(path) else Port([path], load_torch_file(path), {}, None)
    found = find_weights(port.tensors, weights, entry, prefix)
    files, config_fields, class_names = port.files, port.config_fields, port.class_names
    del port  # its optimizer state, as large as the weights twice over
    if sum(array.nbytes for array in found.tensors.values()) > sum(
        file.stat().st_size for file in files
    ):
        raise CheckpointError("damaged: its tensors are views of one another, larger than the file")
    state_dict, changes = standard_names(found.tensors)
    changes += [Change(name, "", "left out", why) for name, why in found.left_out.items()]
    if "classifier.norm.weight" not in state_dict and "classifier.head.weight" not in state_dict:
        filled, identity = _identity_norm(state_dict)
        state_dict, changes = state_dict | filled, changes + identity
    stated = {**found.config_fields, **config_fields}
    config = infer_config(state_dict).replace(**stated)
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


def _identity_norm(
    state_dict: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """A backbone has no classifier; its features need none, and pooling needs its norm's shape."""
    last = max((key for key in state_dict if key.endswith("blocks.0.norm.weight")), default=None)
    if last is None:
        return {}, []
    dim = state_dict[last].shape[0]
    norm = {
        "classifier.norm.weight": np.ones(dim, np.float32),
        "classifier.norm.bias": np.zeros(dim, np.float32),
    }
    why = "a backbone without classifier; its stages' features are exact"
    return norm, [Change("", key, "initialised", why) for key in norm]


def sha256(*paths: Path) -> str:
    """Hash of the content of files, one after the other, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()

"""Folders of VMamba's Hugging Face port: config.json beside a safetensors file or its shards."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmamba_jax.config import VMambaConfig, parse_forward_type
from vmamba_jax.convert.export import save_safetensors
from vmamba_jax.convert.naming import hugging_face_name
from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.convert.safetensors_file import load_safetensors
from vmamba_jax.errors import CheckpointError
from vmamba_jax.local_path import local_path

_CONFIG, _FILE, _INDEX = "config.json", "model.safetensors", ".index.json"
_MAX_JSON_BYTES = 1 << 22  # it takes up to 30 times that in memory
_EPSILON = 1e-5  # of every LayerNorm of this package


class Port(NamedTuple):
    """What such a folder holds.

    Attributes:
        files: the files of its tensors, sorted.
        tensors: arrays under the names there; an `Opaque` for one that can't be read.
        config_fields: fields of `VMambaConfig` that leave no trace in the weights.
        class_names: names of the classes, where it has them for 0, 1, ...
    """

    files: list[Path]
    tensors: Mapping[str, np.ndarray | Opaque]
    config_fields: dict[str, Any]
    class_names: list[str] | None


def is_port(path: Path) -> bool:
    """Whether a path is such a folder, an index of shards, or a safetensors file."""
    if path.is_dir():
        return (path / _CONFIG).is_file()
    return path.name.endswith((_INDEX, ".safetensors"))


def load_port(path: Path) -> Port:
    """Reads a folder, an index or a safetensors file, the latter with or without a config beside.

    Raises:
        CheckpointError: a file is missing, damaged, or not of a VMamba that this package builds.
        OSError: a file can't be opened.
    """
    if path.is_dir():
        whole = path / _FILE
        path = whole if whole.exists() else path / (_FILE + _INDEX)
        if not path.exists():
            raise CheckpointError(f"it has neither {_FILE} nor {_FILE + _INDEX} beside {_CONFIG}")
    if path.name.endswith(_INDEX):
        files, tensors = _load_shards(path)
    else:
        files, tensors = [path], load_safetensors(path)
    about = path.parent / _CONFIG
    stated = _load_json(about) if about.is_file() else {}
    if stated.get("model_type") != "vmamba":
        return Port(files, tensors, {}, None)  # its names tell whether there is a VMamba in it
    if stated.get("layer_norm_eps", _EPSILON) != _EPSILON:
        raise CheckpointError(f"{_CONFIG}: layer_norm_eps must be {_EPSILON}")
    fields: dict[str, Any] = {
        "ssm_act_layer": stated.get("hidden_act"),
        "mlp_act_layer": stated.get("mlp_act"),
    }
    fields = {key: value for key, value in fields.items() if isinstance(value, str)}
    size = stated.get("image_size")  # one number, or a height and a width
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(type(side) is int and 0 < side <= 1 << 14 for side in sides):
        fields["imgsize"] = tuple(size) if isinstance(size, list) else size
    return Port(files, tensors, fields, _class_names(stated.get("id2label")))


def save_port(
    path: Path, state_dict: dict[str, np.ndarray], config: VMambaConfig, names: list[str] | None
) -> None:
    """Writes a folder that the port loads; it appears only when it is complete.

    Args:
        path: a folder that does not exist yet.
        state_dict: arrays under PyTorch's names.
        config: the architecture they belong to.
        names: names of the classes.

    Raises:
        CheckpointError: `path` exists, or the port has no such architecture.
        OSError: it can't be written.
    """
    if local_path(path).exists():
        raise CheckpointError(f"{path}: exists already; choose another name or delete it")
    variant = parse_forward_type(config.forward_type)
    faults = {
        f"forward_type {config.forward_type}": variant.operator == "m0"
        or (variant.scan_order, variant.out_norm) != ("cross2d", "layernorm")
        or not variant.gate_act
        or variant.out_act,
        f"norm_layer {config.norm_layer}": config.norm_layer == "bn",
        "a gated MLP": config.gmlp,
        "a position embedding": config.posembed,
        "post_norm": config.post_norm,
        f"downsample_version {config.downsample_version}": config.downsample_version == "none",
    }
    if missing := [fault for fault, applies in faults.items() if applies]:
        raise CheckpointError(f"{path}: the Hugging Face port lacks {', '.join(missing)}")
    labels = names or [f"LABEL_{i}" for i in range(config.num_classes)]
    about = {
        "model_type": "vmamba",
        "architectures": ["VMambaForImageClassification" if config.num_classes else "VMambaModel"],
        "image_size": config.imgsize,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "embed_dim": config.stage_dims[0],
        "hidden_sizes": list(config.stage_dims),
        "depths": list(config.depths),
        "ssm_state_size": config.ssm_d_state,
        "ssm_ratio": config.ssm_ratio,
        "ssm_dt_rank": config.ssm_dt_rank,
        "ssm_conv_kernel": config.ssm_conv,
        "ssm_conv_bias": config.ssm_conv_bias,
        "ssm_use_gate": variant.gate,
        "mlp_ratio": config.mlp_ratio,
        "hidden_act": config.ssm_act_layer,
        "mlp_act": config.mlp_act_layer,
        "layer_norm_eps": _EPSILON,
        "patch_norm": config.patch_norm,
        "channel_first": True,
        "patch_embed_version": config.patchembed_version,
        "downsample_version": config.downsample_version,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        renamed = {hugging_face_name(key, config): array for key, array in state_dict.items()}
        save_safetensors(part / _FILE, renamed)
        (part / _CONFIG).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def one_rank_note(config: VMambaConfig) -> str | None:
    """What a user of the port has to know of a model whose delta rank differs between stages."""
    if len({config.dt_rank(stage) for stage in range(len(config.depths))}) == 1:
        return None
    return (
        "the port gives every stage the first one's rank of delta, and this model has a rank a "
        "stage: set config.ssm_dt_rank = 'auto' on the loaded config, and load the model with it"
    )


def _load_shards(index: Path) -> tuple[list[Path], dict[str, np.ndarray | Opaque]]:
    shards = _load_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index.name}: it has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(f"{index.name}: {str(shard)[:80]!r} is no file beside it")
    files = [index.parent / shard for shard in sorted(set(shards.values()))]
    tensors: dict[str, np.ndarray | Opaque] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{index.name}: its shard {file.name[:80]} is missing")
        loaded = load_safetensors(file)
        tensors |= {name: array for name, array in loaded.items() if shards.get(name) == file.name}
    if lost := [name for name in shards if name not in tensors]:
        raise CheckpointError(f"{index.name}: {lost[0][:80]!r} is not in the shard it names")
    return files, tensors


def _load_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path.name}: larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: damaged ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: damaged: it is no JSON object")
    return value


def _class_names(labels: object) -> list[str] | None:
    if not isinstance(labels, dict) or not labels:
        return None
    given = [labels.get(str(i)) for i in range(len(labels))]
    names = [name for name in given if isinstance(name, str)]
    generic = [f"LABEL_{i}" for i in range(len(labels))]
    return None if len(names) != len(labels) or names == generic else names

"""Chooses the weights inside a loaded checkpoint, whichever program saved it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from vmamba_jax.convert.locate import Located, locate
from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.convert.tasks import recognise
from vmamba_jax.errors import CheckpointError

WeightChoice = Literal["auto", "model", "ema"]

# Words in the name of an entry or in a prefix that say: a moving average.
_AVERAGED = {"ema", "swa", "average", "averaged"}
# What only one program writes -> its name, for the report.
_PROGRAMS = (
    ("pytorch-lightning_version", "Lightning"),
    ("averaging_state", "Lightning"),
    ("message_hub", "mmengine"),
    ("meta", "mmengine"),
    ("ds_version", "DeepSpeed"),
    ("network_weights", "nnU-Net"),
    ("arch", "timm"),
)


@dataclasses.dataclass(frozen=True)
class FoundWeights:
    """The weights of a checkpoint.

    Attributes:
        layout: the program that wrote it, where it can be told (``"Lightning"``, ``"mmengine"``,
            ...); else ``"state dict"``, ``"released"`` or ``"training"``.
        entry: the key they were under, inner ones after ``/``; empty for a bare state dict.
        prefix: what their names begin with there, such as ``"module.backbone."``.
        averaged: whether they are a moving average of the weights trained.
        tensors: a VMamba's arrays under the names they have there, less prefix and wrappers.
        heads: the other arrays of the network whose backbone it is, under names less what comes
            before ``backbone.``; empty for a bare VMamba.
        sources: the names of `tensors` and `heads` -> the names in the file.
        left_out: what else the checkpoint holds, entries in entries after ``/`` -> why it is left
            out.
        class_names: names of the classes, where mmengine's record of the data set has them.
        config_fields: fields of `VMambaConfig` that leave no trace in the weights and that the
            training configuration inside the checkpoint states.
    """

    layout: str
    entry: str
    prefix: str
    averaged: bool
    tensors: dict[str, np.ndarray]
    heads: dict[str, np.ndarray]
    sources: dict[str, str]
    left_out: dict[str, str]
    class_names: list[str] | None
    config_fields: dict[str, Any]


def find_weights(
    checkpoint: object,
    weights: WeightChoice = "auto",
    entry: str | None = None,
    prefix: str | None = None,
) -> FoundWeights:
    """Finds the weights in what `load_torch_file` returned.

    Args:
        checkpoint: the loaded object.
        weights: which ones, where a training run saved two: the model as trained, its exponential
            moving average, or ``"auto"``: the average if there is one.
        entry: the entry that holds them, where several hold a VMamba; ``"outer/inner"`` for one
            in another.
        prefix: what their names begin with, where one entry holds several VMambas.

    Raises:
        CheckpointError: there are none, or not those asked for, or several to choose from.
    """
    if isinstance(checkpoint, Opaque):
        raise CheckpointError(
            f"it holds a whole pickled object ({checkpoint.name}) and not a state dict. Re-save "
            "it where its code is installed: torch.save({'model': model.state_dict()}, FILE)"
        )
    if isinstance(checkpoint, np.ndarray):
        raise CheckpointError("it holds one tensor and no state dict")
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise CheckpointError("it holds no state dict")
    located = locate(checkpoint)
    if not located:
        raise CheckpointError(
            "no VMamba state dict is in it (names layers.I.blocks.J beside patch_embed); its "
            f"entries are: {_contents(checkpoint)}"
        )
    averaged = {id(one): _is_averaged(one, checkpoint) for one in located}
    chosen = _choose(located, averaged, weights, entry, prefix)
    left_out = dict.fromkeys(chosen.beside, f"no part of a VMamba under {chosen.prefix!r}")
    parts = recognise(chosen.heads).parts
    heads, sources = {}, dict(chosen.sources)
    for inner, (name, value) in chosen.heads.items():
        if inner.partition(".")[0] in parts:
            heads[inner], sources[inner] = value, name
            del left_out[name]
    left_out |= _other_entries(checkpoint, chosen, located)
    return FoundWeights(
        layout=_layout(checkpoint, chosen, bool(left_out)),
        entry=chosen.entry,
        prefix=chosen.prefix,
        averaged=bool(averaged[id(chosen)]),
        tensors=_only_arrays(chosen.tensors),
        heads=_only_arrays(heads),
        sources=sources,
        left_out=left_out,
        class_names=_class_names(checkpoint),
        config_fields=_config_fields(checkpoint),
    )


def _is_averaged(one: Located, checkpoint: Mapping[Any, Any]) -> bool | None:
    """Whether a set is an average of weights; None where the file does not say."""
    # Two programs swap the sets as they save, so that whoever loads state_dict gets the average.
    swapped = checkpoint.get("ema_state_dict") or None
    if isinstance(swapped, dict) and one.path in (("state_dict",), ("ema_state_dict",)):
        if not isinstance(checkpoint.get("state_dict"), dict):
            return True
        # mmengine's EMAHook. Its average is a module with a counter around the model; programs
        # without either use the same two keys for what they say.
        wrapped = any(name == "steps" or str(name).startswith("module.") for name in swapped)
        if not (wrapped or "meta" in checkpoint or "message_hub" in checkpoint):
            return None
        return one.path == ("state_dict",)
    if "averaging_state" in checkpoint and isinstance(checkpoint.get("current_model_state"), dict):
        return one.path == ("state_dict",)  # Lightning's WeightAveraging
    if one.prefix.endswith("module.") and f"{one.prefix[:-7]}n_averaged" in one.beside:
        return True  # torch's AveragedModel
    words = re.split(r"[^a-z0-9]+", f"{one.entry}.{one.prefix}".lower())
    return not _AVERAGED.isdisjoint(words)


def _choose(
    located: list[Located],
    averaged: Mapping[int, bool | None],
    weights: WeightChoice,
    entry: str | None,
    prefix: str | None,
) -> Located:
    held = "; ".join(map(str, located[:4]))
    named = [
        one
        for one in located
        if entry in (None, one.entry)
        and (prefix is None or prefix.removesuffix(".") == one.prefix.removesuffix("."))
    ]
    if not named:
        raise CheckpointError(f"no VMamba is under that entry or prefix; it holds: {held}")
    if len(named) > 1 and any(averaged[id(one)] is None for one in named):
        raise CheckpointError(
            "it does not say which of its two sets of weights is the average: choose with "
            "--entry state_dict or --entry ema_state_dict"
        )
    averages = [one for one in named if averaged[id(one)]]
    plain = [one for one in named if not averaged[id(one)]]
    wanted = {"auto": averages or plain, "ema": averages, "model": plain}[weights]
    if not wanted:
        asked = {"ema": "averaged (EMA)", "model": "plain"}[weights]
        raise CheckpointError(f"it has no {asked} weights; it holds: {held}")
    if len(wanted) > 1:
        shown = "; ".join(map(str, wanted[:4]))
        option = "--entry" if len({one.path for one in wanted}) > 1 else "--prefix"
        raise CheckpointError(f"it holds {len(wanted)} VMambas: {shown}. Choose with {option}")
    return wanted[0]


def _only_arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    for name, value in tensors.items():
        if isinstance(value, Opaque) and value.fault:
            raise CheckpointError(f"its weight {name[:80]!r} is {value.fault}")
        if not isinstance(value, np.ndarray):
            kind = value.name if isinstance(value, Opaque) else type(value).__name__
            raise CheckpointError(f"its weight {name[:80]!r} is no tensor but {kind[:80]}")
    return dict(tensors)


def _contents(checkpoint: Mapping[Any, Any]) -> str:
    shown = [
        f"{str(key)[:40]} (an object of {value.name[:80]})"
        if isinstance(value, Opaque)
        else str(key)[:40]
        for key, value in list(checkpoint.items())[:8]
    ]
    return ", ".join(shown) + (", ..." if len(checkpoint) > len(shown) else "")


def _layout(checkpoint: Mapping[Any, Any], chosen: Located, has_more: bool) -> str:
    if any(name.startswith("embeddings.") for name in chosen.tensors):
        return "Hugging Face"
    if not chosen.path:
        return "state dict"
    for key, program in _PROGRAMS:
        if key in checkpoint:
            return program
    return "training" if has_more or chosen.path != ("model",) else "released"


def _other_entries(
    checkpoint: Mapping[Any, Any], chosen: Located, located: list[Located]
) -> dict[str, str]:
    """What lies beside the entry of the weights, and beside each that it is in."""
    left_out, entry = {}, checkpoint
    for depth, inside in enumerate(chosen.path):
        above = chosen.path[:depth]
        start = "".join(f"{str(key)[:40]}/" for key in above)
        inside_it = (one.path for one in located if one.path[:depth] == above)
        vmambas = {path[depth] for path in inside_it if len(path) > depth}
        for key, value in entry.items():
            if key != inside:
                left_out[f"{start}{str(key)[:512]}"] = _why_left_out(value, key in vmambas)
        entry = entry[inside]
    return left_out


def _why_left_out(value: object, is_a_vmamba: bool) -> str:
    if isinstance(value, Opaque):
        return f"an object of {value.name}, not run"
    if is_a_vmamba:
        return "another set of weights; --weights or --entry chooses"
    return "training state"


def _class_names(checkpoint: Mapping[Any, Any]) -> list[str] | None:
    about = checkpoint.get("meta")
    names = _below(_below(about, "dataset_meta"), "classes") or _below(about, "CLASSES")
    if not isinstance(names, list | tuple) or len(names) > 1 << 15:
        return None
    whole = all(isinstance(name, str) and 0 < len(name) < 200 for name in names)
    return [" ".join(name.split()) for name in names] if whole else None


def _below(node: object, key: str) -> Any:
    items = node.items if isinstance(node, Opaque) else node
    return items.get(key) if isinstance(items, dict) else None


def _config_fields(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    model = _below(checkpoint.get("config"), "MODEL")
    stated = {
        "forward_type": _below(_below(model, "VSSM"), "SSM_FORWARDTYPE"),
        "ssm_act_layer": _below(_below(model, "VSSM"), "SSM_ACT_LAYER"),
        "mlp_act_layer": _below(_below(model, "VSSM"), "MLP_ACT_LAYER"),
    }
    return {
        field: value
        for field, value in stated.items()
        if isinstance(value, str) and len(value) < 80  # it may end in an error's line
    }

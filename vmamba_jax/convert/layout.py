"""Finds the weights inside a loaded checkpoint, whichever program saved it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from vmamba_jax.convert.torch_file import Opaque
from vmamba_jax.errors import CheckpointError

WeightChoice = Literal["auto", "model", "ema"]

# Keys under which training programs keep a state dict, the averaged one and the plain one.
_EMA_KEYS = ("model_ema", "state_dict_ema")
_MODEL_KEYS = ("model", "state_dict")
# Prefixes that a wrapper puts before every name: DistributedDataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_BACKBONE = "backbone."


@dataclasses.dataclass(frozen=True)
class FoundWeights:
    """The weights of a checkpoint.

    Attributes:
        layout: ``"state dict"``, ``"released"``, ``"training"`` or ``"mmengine"``.
        chosen: the key they were under; empty for a bare state dict.
        tensors: arrays under the names they have there, less the wrappers' prefixes.
        left_out: what else the checkpoint holds -> why it is left out.
        config_fields: fields of `VMambaConfig` that leave no trace in the weights and that the
            training configuration inside the checkpoint states.
    """

    layout: str
    chosen: str
    tensors: dict[str, np.ndarray]
    left_out: dict[str, str]
    config_fields: dict[str, Any]


def find_weights(checkpoint: object, weights: WeightChoice = "auto") -> FoundWeights:
    """Finds the weights in what `load_torch_file` returned.

    Args:
        checkpoint: the loaded object.
        weights: which ones, where a training run saved two: the model as trained, its exponential
            moving average, or ``"auto"``: the average if there is one.

    Raises:
        CheckpointError: there are none, or not those asked for.
    """
    if isinstance(checkpoint, Opaque):
        raise CheckpointError(
            f"it holds a whole pickled object ({checkpoint.name}) and not a state dict. Re-save "
            "it where its code is installed: torch.save({'model': model.state_dict()}, FILE)"
        )
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise CheckpointError("it holds no state dict")
    left_out: dict[str, str] = {}
    if any(isinstance(value, np.ndarray) for value in checkpoint.values()):
        if weights == "ema":
            raise CheckpointError("it is a bare state dict: it has no averaged (EMA) weights")
        layout, chosen, tensors = "state dict", "", checkpoint
    else:
        chosen = _choose(checkpoint, weights)
        tensors = checkpoint[chosen]
        for key, value in checkpoint.items():
            if key != chosen:
                left_out[str(key)] = _why_left_out(key, value)
        layout = "mmengine" if chosen == "state_dict" else "training" if left_out else "released"
    tensors = _unwrapped(tensors, chosen)
    if any(name.startswith(_BACKBONE) for name in tensors):
        left_out |= {
            name: "belongs to a head on top of the backbone"
            for name in tensors
            if not name.startswith(_BACKBONE)
        }
        tensors = {
            name.removeprefix(_BACKBONE): array
            for name, array in tensors.items()
            if name.startswith(_BACKBONE)
        }
    return FoundWeights(layout, chosen, tensors, left_out, _config_fields(checkpoint))


def _choose(checkpoint: Mapping[Any, Any], weights: WeightChoice) -> str:
    averaged = [key for key in _EMA_KEYS if isinstance(checkpoint.get(key), dict)]
    plain = [key for key in _MODEL_KEYS if isinstance(checkpoint.get(key), dict)]
    wanted = {"auto": averaged + plain, "ema": averaged, "model": plain}[weights]
    if not wanted:
        held = ", ".join(sorted(str(key)[:40] for key in checkpoint)[:12])
        asked = {"ema": "averaged (EMA) ", "model": "plain "}.get(weights, "")
        raise CheckpointError(f"it has no {asked}weights; its entries are: {held}")
    return wanted[0]


def _unwrapped(tensors: Mapping[Any, Any], chosen: str) -> dict[str, np.ndarray]:
    if not tensors:
        raise CheckpointError(f"its entry {chosen!r} is empty")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            kind = value.name if isinstance(value, Opaque) else type(value).__name__
            raise CheckpointError(f"its weight {str(name)[:80]!r} is no tensor but {kind[:80]}")
    names = list(tensors)
    while wrapper := next((w for w in _WRAPPERS if all(n.startswith(w) for n in names)), None):
        names = [name.removeprefix(wrapper) for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def _why_left_out(key: object, value: object) -> str:
    if isinstance(value, Opaque):
        return f"an object of {value.name}, not run"
    if key in _EMA_KEYS + _MODEL_KEYS:
        return "the other set of weights; --weights chooses"
    if key == "ema_state_dict":  # mmengine saves the average as state_dict, the plain ones here
        return "the weights before averaging"
    return "training state"


def _config_fields(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    def below(node: object, key: str) -> Any:
        items = node.items if isinstance(node, Opaque) else node
        return items.get(key) if isinstance(items, dict) else None

    model = below(checkpoint.get("config"), "MODEL")
    stated = {
        "forward_type": below(below(model, "VSSM"), "SSM_FORWARDTYPE"),
        "ssm_act_layer": below(below(model, "VSSM"), "SSM_ACT_LAYER"),
        "mlp_act_layer": below(below(model, "VSSM"), "MLP_ACT_LAYER"),
    }
    return {field: value for field, value in stated.items() if isinstance(value, str)}

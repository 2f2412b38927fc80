"""The folder of a training run: where its checkpoints lie, and what evaluations found of them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import orbax.checkpoint as ocp

from vmamba_jax.errors import CheckpointError

_METRICS = Path("metrics", "metrics")  # in a checkpoint; Orbax itself wrote it there once


def complete_steps(folder: Path) -> list[int]:
    """Numbers of the checkpoints in a folder whose save has ended, sorted."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def best_step(metrics: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the highest score, the last one of equals; None if none was evaluated.

    A segmenter's score is its mean IoU, a classifier's its accuracy.

    Args:
        metrics: step -> what an evaluation found; empty where there was none.
    """
    evaluated = {
        step: found[score]
        for step, found in metrics.items()
        for score in ("mean_iou", "accuracy")
        if score in found
    }
    return max(evaluated, key=lambda step: (evaluated[step], step), default=None)


def choose_step(folder: Path, which: str | None = None) -> int:
    """The checkpoint that is asked for.

    Args:
        folder: where a run's checkpoints lie.
        which: ``"best"`` of those that were evaluated, ``"latest"``, or the number of an update.
            None: the best, or the latest where none was evaluated.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    steps = complete_steps(folder)
    found = f"found: {', '.join(map(str, steps)) or 'none'}"
    if not steps:
        raise CheckpointError(f"{folder} holds no complete checkpoint")
    best = best_step({step: read_metrics(folder / str(step)) for step in steps})
    match which:
        case None:
            return best or steps[-1]
        case "latest":
            return steps[-1]
        case "best":
            if best is None:
                raise CheckpointError(
                    f"{folder}: none of its checkpoints was evaluated, so there is no best one; "
                    f"take the latest or one by its number ({found})"
                )
            return best
    if not which.isdecimal():
        raise CheckpointError(f"a checkpoint is best, latest or a number, not {which!r} ({found})")
    if int(which) not in steps:
        raise CheckpointError(f"{folder} holds no complete checkpoint of step {which} ({found})")
    return int(which)


def describe_step(checkpoint: Path) -> str:
    """Such as ``"update 870, the best, accuracy 93.3 %"``."""
    step, folder = int(checkpoint.name), checkpoint.parent
    metrics = {known: read_metrics(folder / str(known)) for known in complete_steps(folder)}
    kinds = {"the best": best_step(metrics), "the latest": max(metrics, default=None)}
    words = [f"update {step}", *(kind for kind, of in kinds.items() if of == step)]
    if "accuracy" in metrics.get(step, {}):
        words.append(f"accuracy {100 * metrics[step]['accuracy']:.1f} %")
    return ", ".join(words)


def read_metrics(checkpoint: Path) -> dict[str, float]:
    """What an evaluation of a checkpoint found; empty if there was none."""
    try:
        found = json.loads((checkpoint / _METRICS).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_metrics(checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Keeps what an evaluation found beside the weights that it is of."""
    path = checkpoint / _METRICS
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(dict(metrics)), encoding="utf-8")
    part.replace(path)

"""A model small enough to compile in seconds, and a few updates of it; also run as a process.

``python -m tiny pair HOST:PORT INDEX STEPS FOLDER`` is one of two processes that train it together
and save it; ``python -m tiny train OPTIONS`` is train.py with the model registered as "tiny"; there
TINY_SIGNALS, such as "evaluate SIGINT 2", has the process send itself signals in a phase, and
TINY_FILL, such as "save /disk", fill a disk.
"""

import itertools
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.artifact import describe_model
from vmamba_jax.data import mix
from vmamba_jax.models import VSSM
from vmamba_jax.registry import register_model
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training import evaluate, loop
from vmamba_jax.training.cli import main
from vmamba_jax.training.metrics import MetricsLog
from vmamba_jax.training.optimizer import OptimizerConfig, make_optimizer
from vmamba_jax.training.sharding import MeshConfig, make_mesh, put_batch
from vmamba_jax.training.state import TrainState, abstract_state, create_state, make_state
from vmamba_jax.training.step import Batch, make_train_step

CONFIG = VMambaConfig(
    num_classes=10,
    patch_size=8,
    depths=(1,),
    dims=(32,),
    ssm_d_state=1,
    ssm_ratio=1.0,
    forward_type="v05_noz",
    mlp_ratio=4.0,
    drop_path_rate=0.0,
    downsample_version="v3",
    patchembed_version="v1",
)
RANDOM = CONFIG.replace(depths=(2,), drop_path_rate=0.3, mlp_drop_rate=0.1)
"""All that is random in training, on: the second block's branches are skipped, values dropped."""
SMALLEST = CONFIG.replace(dims=(16,), mlp_ratio=1.0)
"""What compiles soonest."""
SHAPE = (32, 32, 3)
_BATCH = 16


def batch(step: int) -> dict[str, np.ndarray]:
    """One global batch of noise with labels, a pure function of the step."""
    rng = np.random.default_rng(step)
    return {
        "image": rng.standard_normal((_BATCH, *SHAPE), np.float32),
        "label": rng.integers(0, 10, _BATCH, np.int32),
    }


def train_steps(
    mesh: Mesh,
    steps: int,
    *,
    config: VMambaConfig = RANDOM,
    accumulation_steps: int = 1,
    mixing: bool = True,
    restore: Checkpoints | None = None,
) -> tuple[TrainState, list[float]]:
    """Trains with dropped paths and values and mixed images, from the seed or a checkpoint.

    Returns:
        The state, and every loss.
    """
    optimizer = make_optimizer(OptimizerConfig(), config)
    model = VSSM(config)

    def augment(key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        alpha = 1.0 if mixing else 0.0
        return mix(
            key,
            batch["image"],
            batch["label"],
            num_classes=10,
            mixup_alpha=alpha,
            cutmix_alpha=alpha,
        )

    init = make_state(model, optimizer, image_shape=SHAPE, seed=0, ema=True)
    train_step = make_train_step(
        model, optimizer, augment, mesh, ema_decay=0.9, accumulation_steps=accumulation_steps
    )
    index, count = jax.process_index(), jax.process_count()
    losses = []
    with jax.set_mesh(mesh):
        if restore is None:
            state, start = create_state(init, mesh), 0
        else:
            restored = restore.restore(abstract_state(init, mesh).items())
            state, start = TrainState.from_items(restored), restore.latest_step or 0
        for step in range(start, start + steps):
            part = {name: np.split(array, count)[index] for name, array in batch(step).items()}
            state, metrics = train_step(state, put_batch(part, mesh), np.float32(1e-2))
            losses.append(float(metrics["loss"]))
    return state, losses


def _pair(address: str, index: str, steps: str, folder: str) -> None:
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    state, losses = train_steps(make_mesh(MeshConfig(2, 2)), int(steps))
    position: Any = SimpleNamespace(get_state=lambda: {"next_batch": int(steps)})
    with Checkpoints(folder) as checkpoints:
        about = describe_model(RANDOM)
        checkpoints.save(int(steps), state.items(), model=about, data_iterator=position, config={})
    print(*losses)


_PHASES: dict[str, tuple[Any, str]] = {
    "open": (loop, "open_task"),
    "restore": (Checkpoints, "restore"),
    "compile": (loop, "put_batch"),  # just before the first update, in which the signal comes
    "save": (Checkpoints, "save"),
    "evaluate": (evaluate, "put_batch"),
}


def _send_signals(phase: str, name: str, times: str) -> None:
    """Has this process send itself signals, once, when it enters a phase of a run."""
    owner, function = _PHASES[phase]
    original = getattr(owner, function)

    def send() -> None:
        for _ in range(int(times)):
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(0.05)

    def entered(*args: Any, **options: Any) -> Any:
        setattr(owner, function, original)
        print(f"signalled at {time.time()}", flush=True)
        if phase == "compile":
            threading.Timer(0.2, send).start()
        else:
            send()
        return original(*args, **options)

    setattr(owner, function, entered)


def _fill_disk(phase: str, folder: str) -> None:
    """Has this process fill the disk of a folder when it enters a phase for the fourth time.

    The run lies in that folder, and its first checkpoint is whole by then: it's saved beside the
    training, and slower on a slow machine.
    """
    phases = {"save": Checkpoints, "write": MetricsLog, "sync": MetricsLog}
    original, calls = getattr(phases[phase], phase), itertools.count(1)

    def entered(*args: Any, **options: Any) -> Any:
        if next(calls) == 4:
            while not complete_steps(Path(folder, "run", "checkpoints")):
                time.sleep(0.01)
            with suppress(OSError), Path(folder, "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(512))
        return original(*args, **options)

    setattr(phases[phase], phase, entered)


def _train(*options: str) -> int:
    register_model("tiny", RANDOM)
    register_model("smallest", SMALLEST)
    if "TINY_SIGNALS" in os.environ:
        _send_signals(*os.environ["TINY_SIGNALS"].split())
    if "TINY_FILL" in os.environ:
        _fill_disk(*os.environ["TINY_FILL"].split())
    sys.argv[1:] = ["--model.name=tiny", "--model.drop-path-rate=0.3", *options]
    return main()


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    sys.exit({"train": _train, "pair": _pair}[command](*arguments))

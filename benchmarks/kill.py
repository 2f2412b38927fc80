"""A run of two processes, killed at seeded random moments: is a checkpoint lost, or a number wrong?

    python benchmarks/kill.py [--kills 50] [--seed 0]

A small model learns the digits in two processes that share its parameters (fsdp 2), with
stochastic depth, Mixup and CutMix, and saves after every update. At each moment both processes, or
one of them, get SIGKILL, and the same command starts again. A run that comes to its end is compared
with one that was never killed, and begins anew. A checkpoint is lost if the newest one is older
than one that was seen whole; a continuation is wrong if any loss, held-out result or weight has
another bit.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _measure import report

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert import load_model
from vmamba_jax.registry import register_model
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.cli import main as train
from vmamba_jax.training.metrics import read_rows

OPTIONS = [
    *("--model.name=small", "--model.drop-path-rate=0.3", "--data.mixup=0.8", "--data.cutmix=1.0"),
    *("--data.batch-size=240", "--epochs=40", "--save-every=1", "--keep=2", "--log-every=1"),
    *("--mesh.fsdp=2", "--mesh.process-count=2"),
]
EARLY, AFTER = 0.3, 4.0
"""Share of the moments before the first update, uniform in the time that it takes to come; the
others are uniform in so many seconds after it."""
PATIENCE = 300.0
"""Seconds that a process may live on after its peer was killed."""


def child(options: list[str]) -> int:
    """One of the two processes."""
    config = VMambaConfig(
        patch_size=8,
        depths=(2,),
        dims=(16,),
        mlp_ratio=1.0,
        ssm_d_state=1,
        ssm_ratio=1.0,
        forward_type="v05_noz",
        downsample_version="v3",
        patchembed_version="v1",
    )
    register_model("small", config)
    sys.argv[1:] = [*OPTIONS, *options]
    return train()


def start(run: Path) -> list[subprocess.Popen[bytes]]:
    """Both processes; what they say is in files beside the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # A program that one process reads back may order its collectives otherwise than the other.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # Starting is what takes long here.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    processes = []
    for index in range(2):
        options = [f"--run={run}", f"--mesh.coordinator=127.0.0.1:{port}"]
        command = [sys.executable, __file__, "child", *options, f"--mesh.process-index={index}"]
        with run.with_name(f"{run.name}.{index}.log").open("ab") as log:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return processes


def outcome(run: Path) -> dict[str, Any]:
    """All that a finished run must have again."""
    rows = read_rows(run)
    weights = load_model(run, step="latest").variables
    return {
        "losses": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "held out": [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
        "weights": json.dumps(
            {name: np.asarray(leaf).tobytes().hex() for name, leaf in _leaves(weights)}
        ),
    }


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name in sorted(tree) for leaf in _leaves(tree[name], f"{path}/{name}")]


def updates(run: Path) -> int:
    """How far a run has come, by its record."""
    return max((row["step"] for row in read_rows(run)), default=0)


def main() -> None:
    """Kills, starts again, compares."""
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        reference, begun = folder / "reference", time.perf_counter()
        processes = start(reference)
        while not updates(reference):
            assert all(process.poll() is None for process in processes), "the run has failed"
            time.sleep(0.05)
        begin = time.perf_counter() - begun
        assert [process.wait() for process in processes] == [0, 0], "the run has failed"
        expected = outcome(reference)
        run, rows, lost, wrong, finished = folder / "run", [], 0, 0, 0
        while len(rows) < arguments.kills:
            early = rng.random() < EARLY
            moment = rng.uniform(0, begin if early else AFTER)
            victims = [[0, 1], [1, 0], [0], [1]][rng.choice(4, p=[0.4, 0.4, 0.1, 0.1])]
            before = updates(run)
            processes, begun = start(run), time.perf_counter()
            seen, since = 0, begun if early else None
            while since is None or time.perf_counter() - since < moment:
                if since is None and updates(run) > before:
                    since = time.perf_counter()
                seen = max([seen, *complete_steps(run / "checkpoints")])
                if all(process.poll() is not None for process in processes):
                    break
                time.sleep(0.02)
            codes = [process.poll() for process in processes]
            if codes == [0, 0]:
                finished += 1
                differing = [
                    name for name, value in outcome(run).items() if value != expected[name]
                ]
                wrong += len(differing)
                print(
                    f"a run has ended, {', '.join(differing) or 'nothing'} is another", flush=True
                )
                shutil.rmtree(run)
                continue
            for victim in victims:
                processes[victim].kill()
            killed = time.perf_counter()
            try:
                for process in processes:
                    process.wait(PATIENCE)
            finally:
                for process in processes:
                    process.kill()
            newest = max(complete_steps(run / "checkpoints"), default=0)
            lost += newest < seen
            rows.append(
                {
                    "moment (s)": round(moment, 2),
                    "after": "the start" if early else "an update",
                    "killed": victims,
                    "at update": before,
                    "came to": updates(run),
                    "seen whole": seen,
                    "newest after": newest,
                    "peer ended after (s)": round(time.perf_counter() - killed, 2),
                    "statuses": [process.returncode for process in processes],
                }
            )
            print(len(rows), rows[-1], flush=True)
        while finished == 0 or run.exists():  # what is under way must end right, too
            processes = start(run)
            assert [process.wait() for process in processes] == [0, 0], "the run can't go on"
            finished += 1
            wrong += sum(value != expected[name] for name, value in outcome(run).items())
            shutil.rmtree(run)
    report(
        "kill",
        rows,
        command=f"python benchmarks/kill.py --kills {arguments.kills} --seed {arguments.seed}",
        kills=len(rows),
        updates_of_a_run=len(expected["losses"]),
        seconds_to_begin=round(begin, 1),
        finished_runs_compared=finished,
        lost_checkpoints=int(lost),
        wrong_continuations=int(wrong),
    )
    sys.exit(1 if lost or wrong else 0)


if __name__ == "__main__":
    main()

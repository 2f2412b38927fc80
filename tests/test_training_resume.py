"""A run that was stopped or killed goes on as if nothing had happened, bit for bit."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest

from vmamba_jax.training.metrics import read_rows

pytestmark = pytest.mark.xdist_group("resume")  # its tests share a run

# Three epochs of 29 updates, with checkpoints that do not fall on their ends.
_OPTIONS = [
    *("--epochs=3", "--eval-every=3", "--save-every=23", "--log-every=1"),
    *("--data.mixup=0.8", "--data.cutmix=1.0"),
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """One device, as most people have."""
    return processes.environment(1)


def _start(run: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return processes.start("train", f"--run={run}", *_OPTIONS, *options, environment=environment)


def _finish(run: Path, environment: dict[str, str], *options: str) -> str:
    return processes.finish([_start(run, environment, *options)])[0]


def _wait_for(run: Path, process: subprocess.Popen[str], step: int) -> None:
    """Until that update is on record."""
    while not any(row["step"] >= step for row in read_rows(run)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run) if "loss" in row]


def _weights(run: Path) -> dict[str, Any]:
    """Every array of the last checkpoint, as the bytes on disk decode to."""
    folder = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as reader:
        return {
            item: jax.device_get(reader.restore(folder / item)) for item in ("variables", "ema")
        }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted")
    _finish(run, environment)
    return run


def _assert_same_run(run: Path, reference: Path) -> None:
    assert _losses(run) == _losses(reference)
    np.testing.assert_equal(_weights(run), _weights(reference))


@pytest.mark.exhaustive
def test_a_run_stopped_by_sigterm_is_saved_and_resumes_exactly(
    uninterrupted: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    process = _start(tmp_path, environment)
    _wait_for(tmp_path, process, 33)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    last = _losses(tmp_path)[-1][0]
    assert f"stopped by SIGTERM, update {last} is saved: the same command goes on" in output
    assert 33 <= last < 87
    assert f"resuming {tmp_path} after update {last} of 87" in _finish(tmp_path, environment)
    _assert_same_run(tmp_path, uninterrupted)


@pytest.mark.exhaustive
def test_a_killed_run_resumes_exactly_from_its_last_checkpoint(
    uninterrupted: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    process = _start(tmp_path, environment)
    _wait_for(tmp_path, process, 60)
    process.kill()
    process.communicate(timeout=120)
    output = _finish(tmp_path, environment)
    assert "resuming" in output
    _assert_same_run(tmp_path, uninterrupted)

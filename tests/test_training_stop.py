"""Whatever two processes are doing, a signal to one of them stops both, and they go on exactly."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import processes
import pytest

from vmamba_jax.convert import load_model
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.metrics import read_rows

pytestmark = pytest.mark.xdist_group("stop")  # its tests share a run

# Two epochs of five updates, and saves that do not fall on their ends.
_OPTIONS = [
    *("--model.name=smallest", "--epochs=2", "--save-every=3", "--log-every=1"),
    *("--data.batch-size=240", "--data.eval-batch-size=24", "--data.mixup=0.8"),
    *("--mesh.fsdp=2", "--mesh.process-count=2"),
]


def _environment(signals: str = "") -> dict[str, str]:
    told = {"TINY_SIGNALS": signals} if signals else {}
    return processes.environment(1, JAX_ENABLE_COMPILATION_CACHE="false", **told)


def _run(run: Path, signals: str = "", told: Sequence[int] = (0, 1)) -> list[str]:
    """Both processes, those of them that are `told` with signals, from start to end."""
    address = processes.free_address()
    started = [
        processes.start(
            *("train", f"--run={run}", *_OPTIONS, f"--mesh.coordinator={address}"),
            f"--mesh.process-index={index}",
            environment=_environment(signals if index in told else ""),
        )
        for index in range(2)
    ]
    return processes.finish(started)


def _stop(run: Path, signals: str, told: Sequence[int]) -> None:
    outputs = _run(run, signals, told)
    ended = time.time()
    name = signals.split()[1]
    saved = max(complete_steps(run / "checkpoints"), default=0)
    where = f"update {saved} is saved" if saved else "nothing was trained yet"
    assert f"stopped by {name}, {where}: the same command goes on from there" in outputs[0]
    signalled = [float(at) for at in re.findall(r"signalled at (\S+)", "".join(outputs))]
    print(f"{signals}, to {told}: ended after {ended - max(signalled):.1f} s")


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run) if "loss" in row]


def _assert_same(run: Path, reference: Path) -> None:
    assert _losses(run) == _losses(reference)
    for item in ("accuracy", "val_loss"):
        assert [row[item] for row in read_rows(run) if item in row] == [
            row[item] for row in read_rows(reference) if item in row
        ]
    jax.tree.map(
        np.testing.assert_array_equal,
        *(load_model(path, step="latest").variables for path in (run, reference)),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted")
    _run(run)
    assert len(_losses(run)) == 10
    return run


def test_a_signal_to_one_process_stops_both_as_they_begin(tmp_path: Path) -> None:
    _stop(tmp_path, "compile SIGTERM 1", told=[1])
    assert complete_steps(tmp_path / "checkpoints") == [1]
    _stop(tmp_path, "restore SIGTERM 2", told=[0, 1])
    assert complete_steps(tmp_path / "checkpoints") == [1]
    assert [step for step, _ in _losses(tmp_path)] == [1]


@pytest.mark.exhaustive
def test_a_run_goes_on_exactly_whatever_it_was_stopped_in(
    uninterrupted: Path, tmp_path: Path
) -> None:
    def saved() -> int:
        return max(complete_steps(tmp_path / "checkpoints"), default=0)

    _stop(tmp_path, "open SIGTERM 1", told=[0])
    assert saved() == 0
    assert not (tmp_path / "config.json").exists()
    _stop(tmp_path, "compile SIGTERM 2", told=[0, 1])
    assert saved() == 1
    _stop(tmp_path, "save SIGTERM 1", told=[1])
    assert 3 <= saved() <= 5
    _stop(tmp_path, "evaluate SIGINT 2", told=[0])
    assert saved() == 5
    assert not any("accuracy" in row for row in read_rows(tmp_path))
    _stop(tmp_path, "compile SIGINT 1", told=[1])
    assert 6 <= saved() <= 7
    _run(tmp_path)
    _assert_same(tmp_path, uninterrupted)


@pytest.mark.exhaustive
def test_a_process_whose_peer_is_killed_says_so_and_ends(tmp_path: Path) -> None:
    address = processes.free_address()
    options = [*_OPTIONS, "--epochs=2000", f"--mesh.coordinator={address}", f"--run={tmp_path}"]
    first, second = (
        processes.start(
            "train",
            *options,
            f"--mesh.process-index={index}",
            environment=_environment(),
        )
        for index in range(2)
    )
    while not any(row["step"] >= 7 for row in read_rows(tmp_path)):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    second.kill()
    second.communicate()
    output = first.communicate(timeout=200)[0]
    assert first.returncode not in (0, None)
    assert "another process of this run seems to be gone" in output
    assert complete_steps(tmp_path / "checkpoints")[-1] >= 6

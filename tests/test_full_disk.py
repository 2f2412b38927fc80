"""A full disk ends a run with what to do; the last checkpoint is whole, and the run goes on."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest

from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.metrics import MetricsLog, read_rows

_SIZE = 2**24
_OPTIONS = [
    *("--model.name=smallest", "--data.batch-size=240", "--data.eval-batch-size=360"),
    *("--epochs=1.6", "--save-every=2", "--log-every=1", "--keep=2"),
]


def _write_until_it_fails(folder: Path, row: dict[str, float]) -> None:
    """No file may grow beyond 16 kB: the disk looks full."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(folder) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, unlimited[1]))
        try:
            for step in range(2000):
                log.write({"step": step, **row})
                log.sync()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize(
    ("first", "row"),
    [("metrics.jsonl", dict.fromkeys("abcd", 1 / 3)), ("events.out.tfevents.*", {"a": 1})],
)
def test_a_record_that_cannot_be_written_says_so(
    first: str, row: dict[str, float], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="make room, and the same command goes on") as error:
        _write_until_it_fails(tmp_path, row)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    # Of the two files the one that grows faster was too large first.
    largest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    assert largest.match(first)
    assert len(read_rows(tmp_path)) > 50
    with MetricsLog(tmp_path, resume_at=40) as log:
        log.write({"step": 41, **row})
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(42))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("phase", ["save", "write", "sync"])
def test_a_run_on_a_full_disk_goes_on_once_there_is_room(phase: str, small_disk: Path) -> None:
    run = small_disk / "run"
    environment = processes.environment(1)

    def start(**more: str) -> subprocess.Popen[str]:
        return processes.start(
            "train", *_OPTIONS, f"--run={run}", environment={**environment, **more}
        )

    failing = start(TINY_FILL=f"{phase} {small_disk}")
    output = failing.communicate(timeout=600)[0]
    assert failing.returncode == 1, output
    last = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "make room" in last
    assert "No space left" in last or "RESOURCE_EXHAUSTED" in last
    saved = complete_steps(run / "checkpoints")[-1]
    (small_disk / "filler").unlink()
    (output,) = processes.finish([start()])
    assert f"after update {saved} of 8" in output
    assert [row["step"] for row in read_rows(run) if "loss" in row] == list(range(1, 9))

"""The speed that a run reports."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console

from vmamba_jax.training import report
from vmamba_jax.training.config import RunConfig
from vmamba_jax.training.metrics import read_rows


def test_a_pause_is_no_part_of_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    metrics = {
        "loss": jnp.float32(1),
        "grad_norm": jnp.float32(1),
        "skipped": jnp.int32(0),
        "skipped_in_a_row": jnp.int32(0),
    }
    config = RunConfig(run=tmp_path, log_every=2)
    console = Console(quiet=True)
    with report.Report(config, console, start=0, total=6, steps_per_epoch=3) as given:
        for step in range(1, 7):
            now[0] += 2.0
            given.update(step, 1e-3, metrics)
            given.flush()
            if step == 3:
                with given.paused():
                    now[0] += 1000.0
    speeds = [row["images_per_second"] for row in read_rows(tmp_path)]
    assert speeds == [config.data.batch_size / 2.0] * 3

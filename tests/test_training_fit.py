"""What is computed again where the run leaves it to the memory of its devices."""

import io
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import SMALLEST, batch

from vmamba_jax.training import fit
from vmamba_jax.training.config import DataConfig, ModelConfig, RunConfig
from vmamba_jax.training.setup import build_learner
from vmamba_jax.training.sharding import MeshConfig, make_mesh, put_batch
from vmamba_jax.training.state import create_state


def learner_for(
    available: int | None, monkeypatch: pytest.MonkeyPatch, recompute: Any = "auto"
) -> tuple[Any, str]:
    """What a device of so many bytes gets, of steps that need 3, 2 and 1 byte."""
    needs = iter((3, 2, 1))
    monkeypatch.setattr(fit, "bytes_of", lambda compiled: {"temporaries": next(needs)})
    monkeypatch.setattr(fit, "_memory_here", lambda mesh: available)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    images = batch(0)["image"]
    config = RunConfig(
        model=ModelConfig(recompute=recompute),
        data=DataConfig(batch_size=len(images), image_size=images.shape[1]),
    )
    said = io.StringIO()
    learner = fit.learner_that_fits(
        config,
        lambda choice: build_learner(choice, SMALLEST, num_classes=10, mesh=mesh),
        mesh,
        Console(file=said),
    )
    return learner, said.getvalue()


def test_the_first_that_fits_is_taken_and_compiled_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner, said = learner_for(2, monkeypatch)
    assert learner.model.recompute == "convolutions"
    assert "again in the backward pass: convolutions" in said
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = create_state(learner.init, mesh)
        photographs = {"image": np.zeros(batch(0)["image"].shape, np.uint8)}
        batches = [put_batch(batch(step) | photographs, mesh) for step in range(2)]
        caplog.clear()
        with jax.log_compiles():
            for each in batches:
                state, metrics = learner.train_step(state, each, np.float32(1))
    assert not any("Compiling jit(sharded_step)" in line for line in caplog.messages)
    assert np.isfinite(metrics["loss"])
    assert int(state.step) == 2


def test_a_device_that_does_not_say_its_memory_gets_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner, said = learner_for(None, monkeypatch)
    assert learner.model.recompute == "activations"
    assert said == ""


def test_what_is_asked_for_is_not_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, said = learner_for(2, monkeypatch, "blocks")
    assert learner.model.recompute == "blocks"
    assert said == ""

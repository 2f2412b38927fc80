"""Checkpoints: other device counts, what is kept, and what a failed save costs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import CONFIG, SHAPE

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.convert import load_model
from vmamba_jax.convert.artifact import describe_model
from vmamba_jax.errors import CheckpointError
from vmamba_jax.models import VSSM
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.registry import register_model
from vmamba_jax.training.optimizer import OptimizerConfig, make_optimizer
from vmamba_jax.training.sharding import MeshConfig, make_mesh
from vmamba_jax.training.state import TrainState, abstract_state, create_state, make_state

_OPTIMIZER = make_optimizer(OptimizerConfig(), CONFIG)
_STEPS = Preprocessing((24, 40), 0.9, (0.5,), (0.25,))
_ABOUT = describe_model(CONFIG, {"init_from": "elsewhere"}, [*"abcdefghij"], _STEPS)
_INIT = make_state(VSSM(CONFIG), _OPTIMIZER, image_shape=SHAPE, seed=3, ema=True)


class _Position:
    """Stands for a data iterator."""

    def __init__(self, next_batch: int = 0) -> None:
        self.state: dict[str, Any] = {"next_batch": next_batch}

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A fresh state over all eight devices, half of them sharing the parameters."""
    return create_state(_INIT, make_mesh(MeshConfig(2, 4)))


def _at(state: TrainState, step: int) -> TrainState:
    return dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding))


def _save(checkpoints: Checkpoints, state: TrainState, step: int) -> None:
    checkpoints.save(
        step, _at(state, step).items(), model=_ABOUT, data_iterator=_Position(step), config={}
    )


@pytest.mark.parametrize(("data", "fsdp"), [(1, 4), (1, 1)])
def test_a_state_saved_on_eight_devices_is_restored_on_fewer(
    data: int, fsdp: int, state: TrainState, tmp_path: Path
) -> None:
    mesh = make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])
    position = _Position()
    with Checkpoints(tmp_path) as checkpoints:
        _save(checkpoints, state, 7)
        checkpoints.wait()
        items = abstract_state(_INIT, mesh).items()
        restored = TrainState.from_items(checkpoints.restore(items, data_iterator=position))
    assert position.state == {"next_batch": 7}
    expected = jax.tree.leaves(_at(state, 7))
    for ours, theirs in zip(jax.tree.leaves(restored), expected, strict=True):
        assert len(ours.sharding.device_set) == data * fsdp
        if jax.numpy.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)  # noqa: PLW2901
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_the_latest_and_the_best_are_kept(state: TrainState, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, None), (5, 0.6)):
            _save(checkpoints, state, step)
            if accuracy is not None:
                checkpoints.record(step, {"accuracy": accuracy})
        assert checkpoints.best_step == 2
        assert checkpoints.latest_step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # it is on disk which one is the best
        _save(checkpoints, state, 6)
        checkpoints.wait()
        assert checkpoints.best_step == 2
        checkpoints.record(6, {"accuracy": 0.95})
        _save(checkpoints, state, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]


def test_a_save_that_was_cut_short_is_cleared_away(state: TrainState, tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        _save(checkpoints, state, 1)
    cut_short = tmp_path / "2.orbax-checkpoint-tmp"
    (cut_short / "variables").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        _save(checkpoints, state, 2)
        checkpoints.wait()
        assert checkpoints.latest_step == 2
    assert not cut_short.exists()


def test_a_full_disk_costs_no_earlier_checkpoint(state: TrainState, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        _save(checkpoints, state, 1)
    # In a process of its own, where no file may grow beyond 4 kB: the disk looks full.
    program = (
        "import resource, sys\n"
        "import test_checkpoint as t\n"
        "state = t.create_state(t._INIT, t.make_mesh(t.MeshConfig()))\n"
        "limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit))\n"
        "try:\n"
        "    with t.Checkpoints(sys.argv[1], keep=1) as checkpoints:\n"
        "        t._save(checkpoints, state, 2)\n"
        "except t.CheckpointError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "could not be written" in done.stdout
    assert "step 1 is intact" in done.stdout
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step == 1
        mesh = make_mesh(MeshConfig(1, 1), jax.devices()[:1])
        items = abstract_state(_INIT, mesh).items()
        assert int(checkpoints.restore(items)["training"]["step"]) == 1
        _save(checkpoints, state, 2)  # there is room again
        checkpoints.wait()
        assert checkpoints.latest_step == 2


def test_a_checkpoint_of_another_model_is_refused(state: TrainState, tmp_path: Path) -> None:
    other = CONFIG.replace(dims=(16,))
    optimizer = make_optimizer(OptimizerConfig(), other)
    init = make_state(VSSM(other), optimizer, image_shape=SHAPE, seed=0, ema=True)
    with Checkpoints(tmp_path) as checkpoints:
        _save(checkpoints, state, 1)
        checkpoints.wait()
        with pytest.raises(
            CheckpointError,
            match=r"another model.*params/head/kernel is \(32, 10\) there and \(16, 10\) here",
        ):
            checkpoints.restore(abstract_state(init, make_mesh(MeshConfig())).items())


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="no complete checkpoint of step 9"),
    ):
        checkpoints.config(step=9)


def _equal(one: Any, other: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), one, other)


def test_every_checkpoint_of_a_run_is_a_model(state: TrainState, tmp_path: Path) -> None:
    later = dataclasses.replace(state, ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        _save(checkpoints, state, 1)
        checkpoints.record(1, {"accuracy": 0.5})
        _save(checkpoints, later, 2)
    saved = load_model(tmp_path / "run")
    assert saved.config == CONFIG
    assert saved.class_names == [*"abcdefghij"]
    assert saved.preprocessing == _STEPS
    assert saved.provenance == {
        "init_from": "elsewhere",
        "layout": "training run",
        "weights": "update 1, the best, accuracy 50.0 %",
        "averaged": True,
    }
    _equal(saved.variables, state.ema)
    for path, step in (("run", "latest"), ("run", "2"), ("run/checkpoints", "2")):
        _equal(load_model(tmp_path / path, step=step).variables, later.ema)
    one = tmp_path / "run" / "checkpoints" / "2"
    _equal(load_model(one).variables, later.ema)
    _equal(load_model(one, weights="model").variables, later.variables)
    for step, message in (("3", "of step 3"), ("last", "best, latest or a number")):
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "run", step=step)
    with pytest.raises(CheckpointError, match="chosen among the checkpoints of a run"):
        load_model(one, step="2")
    (one / "model" / "metadata").write_text(json.dumps({**_ABOUT, "class_names": ["a"]}))
    with pytest.raises(CheckpointError, match="10 classes and not as many names"):
        load_model(one)


def test_checkpoints_of_an_earlier_version_are_models_too(
    state: TrainState, tmp_path: Path
) -> None:
    register_model("tiny of an earlier version", CONFIG.replace(num_classes=1000))
    settings: dict[str, Any] = {
        "model": {"name": "tiny of an earlier version"},
        "data": {"image_size": 32, "eval_crop": 0.75},
    }

    def save(folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["accuracy"])
        with ocp.CheckpointManager(folder, options=options) as manager:
            items = {name: ocp.args.StandardSave(tree) for name, tree in state.items().items()} | {
                "meta": ocp.args.JsonSave(settings),
                "data": ocp.args.JsonSave({"next_batch": 7}),
            }
            manager.save(7, args=ocp.args.Composite(**items), metrics={"accuracy": 0.25})

    save(tmp_path / "checkpoints")
    saved = load_model(tmp_path)
    assert saved.config == CONFIG.replace(imgsize=32)  # ten classes, as the head has
    assert saved.preprocessing == Preprocessing(32, 0.75)
    assert saved.class_names is None
    assert saved.provenance["weights"] == "update 7, the best, the latest, accuracy 25.0 %"
    _equal(saved.variables, state.ema)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best_step == 7
        items = abstract_state(_INIT, make_mesh(MeshConfig(4, 2))).items()
        _equal(checkpoints.restore(items)["ema"], state.ema)
    settings["model"]["name"] = "nonesuch"
    save(tmp_path / "other" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"earlier version.*unknown model 'nonesuch'"):
        load_model(tmp_path / "other")

"""The optimizer against the released PyTorch recipe: a golden run, parameter groups, schedule."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipe

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert import from_torch, to_torch
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.models import VSSM
from vmamba_jax.registry import model_config
from vmamba_jax.training.optimizer import (
    OptimizerConfig,
    Schedule,
    clip_by_global_norm,
    is_decayed,
    learning_rate_scale,
    make_optimizer,
    make_schedule,
)
from vmamba_jax.training.sharding import MeshConfig, make_mesh, put_batch
from vmamba_jax.training.state import create_state, make_state, with_weights
from vmamba_jax.training.step import make_train_step

_GOLDEN = np.load(Path(__file__).parent / "data" / "train_run.npz")
_META = json.loads(str(_GOLDEN["meta"]))


def _golden_config() -> VMambaConfig:
    return VMambaConfig(**_META["config"])


def _golden_schedule() -> Schedule:
    s = _META["schedule"]
    return Schedule(s["base"], s["warmup"], s["min"], s["warm_steps"], s["steps"])


def test_twelve_updates_follow_the_pytorch_run() -> None:
    config = _golden_config()
    optimizer = make_optimizer(OptimizerConfig(clip_norm=_META["clip"]), config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch, channels, height, width = _META["batch"]
    model = VSSM(config)
    init = make_state(model, optimizer, image_shape=(height, width, channels), seed=0, ema=True)
    weights = from_torch(recipe.state_dict(_META["shapes"], _META["seed"]), config)
    state = with_weights(create_state(init, mesh), weights)
    train_step = make_train_step(
        model,
        optimizer,
        lambda key, batch: (batch["image"], batch["target"]),
        mesh,
        ema_decay=_META["ema_decay"],
    )
    schedule = _golden_schedule()
    losses, norms = [], []
    with jax.set_mesh(mesh):
        for t in range(_META["steps"]):
            images = recipe.normal(f"batch{t}", _META["batch"], _META["seed"])
            targets = recipe.normal(f"target{t}", (batch, config.num_classes), _META["seed"])
            host = {
                "image": images.transpose(0, 2, 3, 1),
                "target": np.asarray(jax.nn.softmax(2 * targets, axis=-1)),
            }
            state, metrics = train_step(state, put_batch(host, mesh), np.float32(schedule(t)))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, _GOLDEN["loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, _GOLDEN["grad_norm"], rtol=1e-4)
    assert [schedule(t) for t in range(_META["steps"])] == _GOLDEN["lr"].tolist()
    for tree, dots in ((state.variables, "final_dot"), (state.ema, "final_ema_dot")):
        assert tree is not None
        arrays = to_torch(tree, config)
        for key, expected in zip(_GOLDEN["keys"].tolist(), _GOLDEN[dots], strict=True):
            probe = recipe.probe(key, arrays[key].shape, _META["seed"]).astype(np.float64)
            limit = 1e-4 * np.linalg.norm(arrays[key]) * np.linalg.norm(probe)
            assert abs(float((arrays[key] * probe).sum()) - expected) <= limit, key


def test_the_released_learning_rates_are_met_exactly() -> None:
    schedule = make_schedule(OptimizerConfig(), batch_size=1024, steps_per_epoch=1251, epochs=300.0)
    ours = [schedule.at(mark) for mark in _GOLDEN["released_marks"].tolist()]
    assert ours == _GOLDEN["released_lr"].tolist()


def test_the_schedule_repeats_its_first_rate_as_the_released_runs_did() -> None:
    schedule = _golden_schedule()
    assert schedule(0) == schedule(1) == schedule.at(0)
    assert schedule(5) == schedule.at(4)


def test_the_same_parameters_are_exempt_from_decay_as_in_pytorch() -> None:
    exempt = [w.key for w in weight_table(_golden_config()) if not is_decayed(w)]
    assert sorted(exempt) == sorted(_META["no_decay"])


def test_state_space_parameters_can_be_exempt_too() -> None:
    table = weight_table(_golden_config())
    decayed = {w.key for w in table if is_decayed(w)}
    decayed_less = {w.key for w in table if is_decayed(w, decay_ssm=False)}
    assert {key.rsplit(".", 1)[1] for key in decayed - decayed_less} == {"A_logs", "dt_projs_bias"}


def test_clipping_divides_by_the_norm_plus_a_millionth() -> None:
    gradient: Any = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    clip = clip_by_global_norm(2.0)
    clipped: Any
    unchanged: Any
    clipped, state = clip.update(gradient, clip.init(gradient))
    np.testing.assert_allclose(clipped["b"], [4 * 2.0 / (5 + 1e-6)], rtol=1e-6)
    assert float(optax.tree.get(state, "grad_norm")) == 5.0
    unchanged, _ = clip_by_global_norm(6.0).update(gradient, clip.init(gradient))
    np.testing.assert_array_equal(unchanged["a"], gradient["a"])


def test_layer_decay_slows_each_earlier_block_by_one_factor() -> None:
    model = model_config("vmamba_tiny_s1l8")
    config = OptimizerConfig(layer_decay=0.5)
    scales = {w.key: learning_rate_scale(w.path, config, model.depths) for w in weight_table(model)}
    assert scales["classifier.head.weight"] == scales["classifier.norm.weight"] == 1.0
    assert scales["layers.3.blocks.1.norm.weight"] == 0.5
    assert scales["layers.3.blocks.0.norm.weight"] == 0.25
    assert (
        scales["layers.2.downsample.1.weight"] == scales["layers.2.blocks.7.norm.weight"] == 0.125
    )
    assert scales["patch_embed.0.weight"] == 0.5 ** (sum(model.depths) + 1)


def test_head_only_moves_nothing_but_the_last_layer() -> None:
    config = _golden_config()
    variables = from_torch(recipe.state_dict(_META["shapes"], _META["seed"]), config)
    params = jax.tree.map(jnp.asarray, variables["params"])
    optimizer = make_optimizer(OptimizerConfig(head_only=True), config)
    with jax.numpy_dtype_promotion("standard"):
        ones = jax.tree.map(jnp.ones_like, params)
        state = jax.jit(optimizer.init)(params)
        updates, state = jax.jit(optimizer.update)(ones, state, params, learning_rate=0.1)
    moved = {
        key for key, array in to_torch({"params": updates}, config).items() if np.any(array != 0)
    }
    assert moved == {"classifier.head.weight", "classifier.head.bias"}
    head = params["head"]["kernel"].size + params["head"]["bias"].size
    np.testing.assert_allclose(float(optax.tree.get(state, "grad_norm")), head**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"layer_decay": 0.0}, "layer_decay"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)  # pyright: ignore[reportArgumentType]


def test_a_run_that_is_all_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warm-up"):
        make_schedule(OptimizerConfig(), batch_size=8, steps_per_epoch=10, epochs=20.0)

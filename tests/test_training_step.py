"""One update: what is skipped, what is counted, and how evaluation counts."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, SHAPE, batch

from vmamba_jax.models import VSSM
from vmamba_jax.training.config import PRESETS, RunConfig, differences, from_json, to_json
from vmamba_jax.training.evaluate import evaluate
from vmamba_jax.training.optimizer import OptimizerConfig, make_optimizer
from vmamba_jax.training.sharding import MeshConfig, make_mesh, put_batch
from vmamba_jax.training.state import TrainState, create_state, make_state
from vmamba_jax.training.step import TrainStep, make_eval_step, make_train_step

_MODEL = VSSM(CONFIG)


def _one_hot(key: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return batch["image"], jax.nn.one_hot(batch["label"], CONFIG.num_classes)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, TrainState, TrainStep]:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(), CONFIG)
    init = make_state(_MODEL, optimizer, image_shape=SHAPE, seed=0, ema=True)
    return mesh, create_state(init, mesh), make_train_step(_MODEL, optimizer, _one_hot, mesh)


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.copy(), state)


def test_an_update_without_a_finite_gradient_is_left_out_and_counted(
    trained: tuple[Any, TrainState, TrainStep],
) -> None:
    mesh, fresh, train_step = trained
    good, bad = batch(0), batch(1)
    bad["image"][3, 5, 5, 0] = np.nan
    with jax.set_mesh(mesh):
        state, metrics = train_step(_copy(fresh), put_batch(bad, mesh), np.float32(1e-3))
        assert not np.isfinite(metrics["loss"])
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 1)
        for tree in ("variables", "ema", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, tree), getattr(fresh, tree))
        assert int(state.step) == 1
        state, metrics = train_step(state, put_batch(good, mesh), np.float32(1e-3))
    assert np.isfinite(metrics["loss"])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)


def test_evaluation_counts_every_image_once_whatever_the_padding() -> None:
    mesh = make_mesh(MeshConfig())
    variables = _MODEL.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    eval_step = make_eval_step(_MODEL, mesh)
    images = np.concatenate([batch(i)["image"] for i in range(2)])[:21]
    labels = np.concatenate([batch(i)["label"] for i in range(2)])[:21]
    logits: Any = _MODEL.apply(variables, jnp.asarray(images))
    ranks = (logits > np.take_along_axis(np.asarray(logits), labels[:, None], 1)).sum(axis=1)

    def padded(size: int) -> list[dict[str, np.ndarray]]:
        parts = []
        for start in range(0, 21, size):
            indices = np.arange(start, start + size)
            inside = np.minimum(indices, 20)
            parts.append({"image": images[inside], "label": labels[inside], "mask": indices < 21})
        return parts

    for size in (8, 24):
        result = evaluate(eval_step, variables, padded(size), mesh)
        assert result.images == 21
        assert result.accuracy == np.mean(ranks < 1)
        assert result.accuracy_top5 == np.mean(ranks < 5)


class _Given(nn.Module):
    """Answers with the image's own numbers as logits."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        return images[:, 0, 0, :]


def test_equal_logits_and_rows_that_are_not_finite_are_no_hits() -> None:
    rows = np.zeros((8, 7), np.float32)  # all equal: the first class alone, the first five
    rows[1:4] = np.arange(7)
    rows[2, 0], rows[3, 1] = np.nan, -np.inf
    rows[4, 3] = 1.0
    batch = {
        "image": rows[:, None, None, :],
        "label": np.array([6, 6, 6, 6, 3, 0, 4, 5], np.int32),
        "mask": np.ones(8, bool),
    }
    mesh = make_mesh(MeshConfig())
    result = evaluate(make_eval_step(_Given(), mesh), {}, [batch], mesh)
    assert result.accuracy == 3 / 8  # rows 1, 4 and 5
    assert result.accuracy_top5 == 4 / 8  # and row 6


def test_a_held_out_split_without_readable_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no readable image"):
        evaluate(lambda variables, batch: {}, {}, [], make_mesh(MeshConfig()))


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name: str) -> None:
    preset = PRESETS[name]
    assert from_json(RunConfig, to_json(preset)) == preset


def test_the_presets_are_the_released_recipe() -> None:
    rates = {
        size: PRESETS[f"imagenet-{size}"].model.drop_path_rate for size in ("tiny", "small", "base")
    }
    assert rates == {"tiny": 0.2, "small": 0.3, "base": 0.5}
    recipe = PRESETS["imagenet-tiny"]
    assert (recipe.epochs, recipe.data.batch_size, recipe.data.label_smoothing) == (300, 1024, 0.1)
    assert recipe.optimizer == OptimizerConfig(
        learning_rate=5e-4,
        warmup_learning_rate=5e-7,
        min_learning_rate=5e-6,
        warmup_epochs=20.0,
        weight_decay=0.05,
        clip_norm=5.0,
        ema_decay=0.9999,
    )


def test_differences_name_every_value_that_changed() -> None:
    changed = from_json(RunConfig, {"seed": 3, "data": {"batch_size": 64}})
    assert differences(to_json(RunConfig()), to_json(changed)) == [
        "data.batch_size: 48 -> 64",
        "seed: 0 -> 3",
    ]


def test_an_unknown_option_in_a_saved_configuration_is_named() -> None:
    with pytest.raises(ValueError, match=r"'batchsize'.*Did you mean 'batch_size'"):
        from_json(RunConfig, {"data": {"batchsize": 3}})

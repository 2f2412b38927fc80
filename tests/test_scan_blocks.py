"""Blocks in a loop: the same parameters, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax import create_model

SMALL = {"depths": (2,), "dims": (8,), "image_size": 16}


def test_looped_blocks_give_the_same_logits_and_gradients():
    model, variables = create_model(
        "vmamba_digits", drop_path_rate=0.0, use_checkpoint=True, **SMALL
    )
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)

    def loss(variables, model):
        return (model.apply(variables, images, train=True) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = step(variables, model)
    actual = step(variables, model.clone(scan_blocks=True))
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_looped_blocks_are_initialised_alike_and_drop_paths():
    model, variables = create_model("vmamba_digits", drop_path_rate=0.9, **SMALL)
    looped = model.clone(scan_blocks=True)
    images = jnp.ones((2, 16, 16, 3))
    again = jax.eval_shape(looped.init, jax.random.key(0), images)
    assert jax.tree.structure(again) == jax.tree.structure(variables)

    @jax.jit
    def train(key):
        return looped.apply(variables, images, train=True, rngs={"dropout": key})

    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)))


def test_batch_norm_cannot_loop():
    model, variables = create_model("vmamba_digits", norm_layer="bn", **SMALL)
    with pytest.raises(ValueError, match="scan_blocks needs norm_layer"):
        model.clone(scan_blocks=True).apply(variables, jnp.ones((1, 16, 16, 3)))

"""LayerNorm against Flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.ops import layer_norm
from vmamba_jax.ops.residuals import POLICIES


def flax_layer_norm(x, scale, bias):
    module = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)
    # Flax leaves the ranks to NumPy's promotion.
    with jax.numpy_rank_promotion("allow"):
        return jnp.asarray(module.apply({"params": {"scale": scale, "bias": bias}}, x))


def draw(shape, mean=0.0):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(mean, 2, size=shape), jnp.float32),
        jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
        jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
        jnp.asarray(rng.normal(size=shape), jnp.float32),
    )


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 96), (1, 1, 1, 1)])
def test_output_and_gradients_equal_flax(shape):
    *inputs, dy = draw(shape)
    expected, expected_vjp = jax.vjp(flax_layer_norm, *inputs)
    actual, actual_vjp = jax.vjp(layer_norm, *inputs)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    for ours, theirs in zip(actual_vjp(dy), expected_vjp(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_large_mean_does_not_cancel():
    x, scale, bias, _ = draw((4, 64), mean=1e4)
    wide = np.asarray(x, np.float64)
    standard = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        layer_norm(x, scale, bias), standard * np.asarray(scale) + np.asarray(bias), atol=5e-3
    )


def test_bfloat16_is_normalised_and_returned_in_float32():
    x, scale, bias, dy = draw((3, 32))
    half = x.astype(jnp.bfloat16)
    actual, vjp = jax.vjp(layer_norm, half, scale, bias)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, layer_norm(half.astype(jnp.float32), scale, bias))
    assert [d.dtype for d in vjp(dy)] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_of_a_narrower_quotient_a_gradient_keeps_no_more_than_that():
    x, scale, bias, dy = draw((2, 3, 4, 96))
    block = jax.checkpoint(layer_norm, static_argnums=(3,), policy=POLICIES["convolutions"])
    actual, vjp = jax.vjp(lambda *inputs: block(*inputs, jnp.bfloat16), x, scale, bias)
    kept = {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(vjp) if leaf.size > 96}
    # ... and one deviation a position, which is too few numbers to be listed.
    assert kept == {("bfloat16", x.shape)}
    expected, expected_vjp = jax.vjp(layer_norm, x, scale, bias)
    np.testing.assert_allclose(actual, expected, atol=2**-8 * np.abs(expected).max())
    for ours, theirs in zip(vjp(dy), expected_vjp(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2**-7 * np.abs(theirs).max())


def test_gradients_of_a_rounded_quotient_are_those_of_the_reverse_and_forward_mode_alike():
    x, scale, bias, dy = draw((2, 8))

    def rounded(*inputs):
        return layer_norm(*inputs, jnp.bfloat16)

    _, vjp = jax.vjp(rounded, x, scale, bias)
    tangents = (dy, scale[::-1], bias[::-1])
    _, tangent = jax.jvp(rounded, (x, scale, bias), tangents)
    along = sum((d * t).sum() for d, t in zip(vjp(dy), tangents, strict=True))
    np.testing.assert_allclose((tangent * dy).sum(), along, rtol=1e-5)

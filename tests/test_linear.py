"""The linear layer against the product it stands for, and what a block keeps for its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax import model_config
from vmamba_jax.models import VSSM
from vmamba_jax.models.layers import Dense, activations
from vmamba_jax.ops import add_bias, linear
from vmamba_jax.ops.residuals import POLICIES, keep


def draw(*shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=shape), rng.normal(size=(shape[-1], 5)), rng.normal(size=5)
    return tuple(jnp.asarray(a, dtype) for a in (x, kernel, bias))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 8, 7), (0, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_are_those_of_the_product(shape, with_bias):
    x, kernel, bias = draw(*shape)
    inputs = (x, kernel, bias)[: 2 + with_bias]
    actual, vjp = jax.vjp(linear, *inputs)
    dy = np.random.default_rng(1).normal(size=actual.shape).astype(np.float32)
    wide_x, wide_kernel, wide_bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
    rows, dy_rows = wide_x.reshape(-1, 7), dy.reshape(-1, 5)
    np.testing.assert_allclose(actual, wide_x @ wide_kernel + with_bias * wide_bias, atol=1e-5)
    expected = (dy @ wide_kernel.T, rows.T @ dy_rows, dy_rows.sum(axis=0))
    for ours, theirs in zip(vjp(jnp.asarray(dy)), expected[: 2 + with_bias], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 8, 7), (0, 7)])
def test_a_bias_alone_is_added_at_each_position(shape):
    x, _, _ = draw(*shape)
    bias = jnp.arange(7.0)
    y, vjp = jax.vjp(add_bias, x, bias)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    dx, dbias = vjp(dy)
    np.testing.assert_array_equal(y, np.asarray(x) + np.asarray(bias))
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_allclose(dbias, dy.reshape(-1, 7).sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", activations)
def test_an_activation_with_a_bias_is_that_of_the_sum(name, dtype):
    x, _, _ = draw(2, 3, 8, 7, dtype=dtype)
    bias = jnp.linspace(-1, 1, 7, dtype=dtype)
    expected, expected_vjp = jax.vjp(activations[name], x + bias[None, None, None])
    actual, vjp = jax.vjp(activations[name], x, bias)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, expected)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    dx, dbias = vjp(dy)
    assert dx.dtype == dbias.dtype == dtype
    np.testing.assert_array_equal(dx, *expected_vjp(dy))
    sums = dx.astype(jnp.float32).sum(axis=(0, 1, 2))
    rounding = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(dbias.astype(jnp.float32), sums, rounding, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_layer_with_an_activation_is_the_layer_and_then_the_activation(use_bias, dtype):
    x, kernel, bias = draw(2, 3, 8, 7)
    params = {"kernel": kernel, "bias": bias} if use_bias else {"kernel": kernel}
    layer = Dense(5, use_bias, dtype=dtype)
    activated = layer.clone(act_layer="gelu").apply({"params": params}, x)
    plain = layer.apply({"params": params}, x)
    assert isinstance(plain, jax.Array)
    assert isinstance(activated, jax.Array)
    assert plain.dtype == dtype
    rounding = 1e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(activated, activations["gelu"](plain), rounding, rounding)


def test_bfloat16_stays_and_its_bias_gradient_is_summed_in_float32():
    x, kernel, bias = draw(4096, 7, dtype=jnp.bfloat16)
    y, vjp = jax.vjp(linear, x, kernel, bias)
    gradients = vjp(jnp.ones_like(y))
    assert {a.dtype for a in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(gradients[2], np.full(5, 4096))


def test_what_is_not_marked_is_computed_again():
    @partial(jax.checkpoint, policy=POLICIES["activations"])
    def block(x):
        return jnp.tanh(keep(jnp.sin(jnp.exp(x))))

    x = jnp.linspace(0, 1, 8)
    program = str(jax.make_jaxpr(jax.grad(lambda x: block(x).sum()))(x))
    assert program.count("= sin ") == 1  # kept
    assert program.count("= exp ") == 2


@pytest.mark.parametrize(
    "use_checkpoint", [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
def test_a_step_keeps_what_is_dear_of_each_block_and_no_more(use_checkpoint):
    def maps(depth):
        config = model_config("vmamba_tiny_s1l8").replace(
            depths=(depth,), dims=96, num_classes=0, use_checkpoint=use_checkpoint
        )
        # In a loop: of blocks one after another XLA for CPU finds what is computed twice, and keeps
        # it.
        model = VSSM(config, scan_blocks=True)
        images = jax.ShapeDtypeStruct((2, 112, 112, 3), jnp.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

        def loss(params, images):
            return jnp.asarray(model.apply({"params": params}, images)).sum()

        memory = jax.jit(jax.grad(loss)).lower(params, images).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes / (2 * 28 * 28 * 96 * 4)

    # Some 9 maps, 4 of them in the MLP (17 if nothing were computed again), or the input alone; and
    # the parameters and their gradients, which are stacked, take the room of 1.2.
    assert (maps(8) - maps(2)) / 6 < (3 if use_checkpoint else 11)

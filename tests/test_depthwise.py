"""The depthwise convolution against XLA's grouped one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.ops import depthwise_conv


def grouped(x, kernel):
    padding = (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("height", [7, 17, 30])  # rows at a time: all or half; one; a third
def test_output_and_gradients_equal_the_grouped_convolution(size, height):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, 6, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 5)), jnp.float32)
    expected, expected_vjp = jax.vjp(grouped, x, kernel)
    actual, actual_vjp = jax.vjp(depthwise_conv, x, kernel)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    dy = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    for ours, theirs in zip(actual_vjp(dy), expected_vjp(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_an_empty_batch_has_a_gradient_of_zero():
    y, vjp = jax.vjp(depthwise_conv, jnp.zeros((0, 7, 6, 5)), jnp.ones((3, 3, 5)))
    dx, dkernel = vjp(y)
    assert dx.shape == (0, 7, 6, 5)
    np.testing.assert_array_equal(dkernel, np.zeros((3, 3, 5)))


def test_bfloat16_is_summed_and_returned_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 5, 5, 3)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3)), jnp.bfloat16)
    exact = depthwise_conv(x.astype(jnp.float32), kernel.astype(jnp.float32))
    actual = depthwise_conv(x, kernel)
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, exact)

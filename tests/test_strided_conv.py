"""The strided convolution and both of its gradients against each other and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vmamba_jax.ops import _cpu, strided_conv

# Kernel, stride, padding: patch embedding v1, both halves of v2 and downsampling v3, v2, more.
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
SHAPES = [(4, 4, 0), (3, 2, 1), (2, 2, 0), (5, 4, 1), (3, 1, 1), (1, 3, 0), (3, 2, 2)]


def arrays(size, stride, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 13, 10, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 5)), jnp.float32)
    y = strided_conv(x, kernel, stride=stride, padding=padding)
    return x, kernel, jnp.asarray(rng.normal(size=y.shape), jnp.float32)


@pytest.mark.parametrize(("size", "stride", "padding"), SHAPES)
def test_each_output_is_its_windows_product_with_the_kernel(size, stride, padding):
    x, kernel, dy = arrays(size, stride, padding)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), *((padding, padding),) * 2, (0, 0)))
    actual = strided_conv(x, kernel, stride=stride, padding=padding)
    assert actual.shape == dy.shape
    for row in range(dy.shape[1]):
        for column in range(dy.shape[2]):
            window = padded[:, row * stride :, column * stride :][:, :size, :size]
            expected = np.einsum("bijp,ijpc->bc", window, np.asarray(kernel, np.float64))
            np.testing.assert_allclose(actual[:, row, column], expected, atol=2e-5)


@pytest.mark.parametrize("at_a_time", [1, 2])
@pytest.mark.parametrize(("size", "stride", "padding"), SHAPES)
def test_the_one_of_products_and_its_transposes_are_the_convolutions(
    size, stride, padding, at_a_time, monkeypatch
):
    x, kernel, dy = arrays(size, stride, padding)
    values = dy[0, ..., 0].size * kernel[..., 0].size
    monkeypatch.setattr(_cpu, "WINDOWS", at_a_time * values)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, ((padding,) * 2,) * 2, dimension_numbers=DIMENSIONS
        )

    by_convolutions, vjp = jax.vjp(convolve, x, kernel)
    by_products, vjp_of_products = jax.vjp(
        lambda x, kernel: _cpu.strided_conv(x, kernel, stride, padding), x, kernel
    )
    np.testing.assert_allclose(by_products, by_convolutions, atol=5e-5)
    for ours, theirs in zip(vjp_of_products(dy), vjp(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


@pytest.mark.parametrize(("size", "stride", "padding"), SHAPES)
def test_the_gradient_is_that_of_finite_differences(size, stride, padding):
    x, kernel, _ = arrays(size, stride, padding)

    @jax.jit
    def convolve(x, kernel):
        return strided_conv(x, kernel, stride=stride, padding=padding)

    with jax.enable_x64(True):
        check_grads(convolve, (x.astype(jnp.float64), kernel.astype(jnp.float64)), 1, ["rev"])


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 2, 2, 3)])
def test_without_images_or_room_for_a_window_the_gradients_are_zero(shape):
    x, kernel = jnp.ones(shape), jnp.ones((3, 3, 3, 5))
    y, vjp = jax.vjp(lambda x, kernel: strided_conv(x, kernel, stride=2, padding=0), x, kernel)
    assert y.size == 0
    for gradient, like in zip(vjp(y), (x, kernel), strict=True):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(like))


def test_only_on_a_cpu_the_gradient_is_free_of_convolutions():
    # Within a loop XLA's take many times as long as the products.
    x, kernel, dy = arrays(3, 2, 1)

    def gradient(x, kernel, dy):
        return jax.vjp(lambda x, k: strided_conv(x, k, stride=2, padding=1), x, kernel)[1](dy)

    traced = jax.jit(gradient).trace(x, kernel, dy)
    convolutions = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("convolution(")
        for platform in ("cpu", "tpu")
    }
    assert convolutions == {"cpu": 0, "tpu": 2}

"""GELU against its definition by the error function, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax.models.layers import gelu

# Around zero, around -8, where it is cut off, and far out on both sides.
POINTS = [*np.linspace(-9, 9, 181), -8.0, np.nextafter(np.float32(-8), -9), -1e30, 1e30]


def test_values_are_exact_to_rounding():
    expected = [0.5 * x * math.erfc(-x / math.sqrt(2)) for x in POINTS]
    np.testing.assert_allclose(gelu(jnp.asarray(POINTS, jnp.float32)), expected, 2e-6, 1e-6)


def test_slopes_are_exact_to_rounding():
    expected = [
        0.5 * math.erfc(-x / math.sqrt(2)) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        for x in np.clip(POINTS, -100, 100)
    ]
    slopes = jax.vmap(jax.grad(gelu))(jnp.asarray(POINTS, jnp.float32))
    np.testing.assert_allclose(slopes, expected, 2e-6, 1e-6)


def test_infinities_have_their_limits_and_nan_stays():
    values = gelu(jnp.asarray([-jnp.inf, jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(values, [0, np.inf, np.nan])

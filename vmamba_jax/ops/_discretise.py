"""What every implementation of the selective scan does first: the step size, in a wide dtype."""

import jax
import jax.numpy as jnp

from vmamba_jax.ops._exact import einsum
from vmamba_jax.ops.wide import widened
from vmamba_jax.typing import Array, Float


def lift(
    delta: Float[Array, "B L K C_or_R"], delta_proj: Float[Array, "K C R"] | None
) -> Float[Array, "B L K C"]:
    """``delta_proj @ delta`` in delta's dtype; without `delta_proj`, `delta`."""
    if delta_proj is None:
        return delta
    return einsum("blkr,kcr->blkc", delta, delta_proj.astype(delta.dtype))


def step_size(
    delta: Float[Array, "B L *route"],
    delta_bias: Float[Array, "*route"] | None,
    delta_softplus: bool,
) -> Float[Array, "B L *route"]:
    """``softplus(delta + bias)`` in float32, or wider if `delta` is.

    A and the step size meet in an exponential and the state runs over thousands of steps:
    neither survives a 16-bit mantissa.
    """
    delta = widened(delta)
    if delta_bias is not None:
        delta = delta + delta_bias.astype(delta.dtype)[None, None]
    return softplus(delta) if delta_softplus else delta


def softplus_and_slope(
    x: Float[Array, "*any"],
) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """``log(1 + exp(x))`` and its derivative, the sigmoid, within 2 ulp.

    Half the time of `jax.nn.softplus` on a CPU: one exponential serves both, and the logarithm is
    ``log1p(e) = 2 artanh(e / (2 + e))``, a short series because e <= 1, but for float64. Not for
    automatic differentiation: `softplus` and `sigmoid` are.
    """
    e = jnp.exp(-jnp.abs(x))
    slope = jnp.where(x < 0, e, 1) / (1 + e)
    if x.dtype == jnp.float64:
        return jnp.maximum(x, 0) + jnp.log1p(e), slope
    w = e / (2 + e)
    square = w * w
    series = jnp.full_like(x, 1 / 13)
    for n in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / n
    return jnp.maximum(x, 0) + 2 * w * series, slope


@jax.custom_jvp
def softplus(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """``log(1 + exp(x))``: see `softplus_and_slope`."""
    return softplus_and_slope(x)[0]


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    # Said here, since what JAX derives from the maximum and the absolute value is wrong where they
    # tie: at zero the second derivative would be zero.
    (x,), (dx,) = primals, tangents
    return softplus(x), sigmoid(x) * dx


@jax.custom_jvp
def sigmoid(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """``1 / (1 + exp(-x))``: see `softplus_and_slope`."""
    return softplus_and_slope(x)[1]


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = sigmoid(x)
    return y, y * (1 - y) * dx

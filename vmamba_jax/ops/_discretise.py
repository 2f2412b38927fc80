"""What every implementation of the selective scan does first: the step size, in float32."""

import jax
import jax.numpy as jnp

from vmamba_jax.typing import Array, Float


def step_size(
    delta: Float[Array, "B L *route"],
    delta_bias: Float[Array, "*route"] | None,
    delta_softplus: bool,
) -> Float[Array, "B L *route"]:
    """``softplus(delta + bias)`` in float32, whatever the dtype of `delta`.

    A and the step size meet in an exponential and the state runs over thousands of steps:
    neither survives a 16-bit mantissa.
    """
    delta = delta.astype(jnp.float32)
    if delta_bias is not None:
        delta = delta + delta_bias.astype(jnp.float32)[None, None]
    return jax.nn.softplus(delta) if delta_softplus else delta

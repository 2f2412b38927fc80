"""In which dtype sums, recurrences and functions run: float32, or float64 if that is given."""

from typing import Any

import jax.numpy as jnp

from vmamba_jax.typing import Array


def wide(dtype: Any) -> jnp.dtype:
    """float32, or float64 for that."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def widened(x: Array) -> Array:
    """The same array in the dtype that is wide for it."""
    return x.astype(wide(x.dtype))

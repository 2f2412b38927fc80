"""In which dtype sums and recurrences run."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> jnp.dtype:
    """float32, or float64 for that."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)

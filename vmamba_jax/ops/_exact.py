"""Products in float32 on every device."""

from functools import partial

import jax
import jax.numpy as jnp

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
"""`jnp.einsum`; matrix units would round float32 to bfloat16 or TF32 unasked."""

"""Strict settings for every test: dtype and rank promotion, warnings, shapes, eight CPU devices."""

import os

# Before jax is imported: mesh tests need several devices, and eight fit any mesh shape.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile far longer than they run; unoptimised machine code halves that.
    + " --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotated function of the package checks the shapes and dtypes it is given and returns.
install_import_hook("vmamba_jax", "beartype.beartype")

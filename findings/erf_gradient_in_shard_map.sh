#!/usr/bin/env bash
# JAX 0.12.0.1: the gradient of erf, and so of the exact GELU, can't be traced inside `jax.shard_map`
# with its default `check_vma=True`; the function itself can, and with check_vma=False so can the
# gradient. JAX 0.10.2 traces all of them. Behind it: erf's derivative is a `polynomial` of the
# argument, which varies from device to device, and of constants, which do not.
#
# Seen with JAX 0.12.0.1, Python 3.13:
#   erf: traced
#   gradient of erf: ValueError: Primitive polynomial requires varying manual axes to match
#   gradient of erf, check_vma=False: traced
#
# Needs Python 3.12 or newer and pip. Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/output"
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
split = PartitionSpec("data")


def attempt(name, function, **options):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, **options)
    try:
        jax.jit(mapped).lower(jnp.ones(4))
        print(f"{name}: traced")
    except ValueError as error:
        print(f"{name}: ValueError: {str(error).split(', but got')[0]}")


def slope(x):
    return jax.grad(lambda x: jax.lax.erf(x).sum())(x)


attempt("erf", jax.lax.erf)
attempt("gradient of erf", slope)
attempt("gradient of erf, check_vma=False", slope, check_vma=False)
PYTHON
diff "$folder/output" - <<'EXPECTED'
erf: traced
gradient of erf: ValueError: Primitive polynomial requires varying manual axes to match
gradient of erf, check_vma=False: traced
EXPECTED

#!/usr/bin/env bash
# JAX 0.12.0.1 (and 0.10.2): a Pallas kernel that stands only in the TPU's branch of
# `jax.lax.platform_dependent` keeps the function from being exported for several platforms. For the
# CPU alone, for the TPU alone and for CPU and CUDA it is exported. Behind it: in a program for
# several platforms each branch that any of them takes is lowered for all of them, and a kernel's
# lowering for the CPU raises.
#
# Seen with JAX 0.12.0.1, Python 3.13, and the same with JAX 0.10.2, Python 3.11:
#   cpu: exported
#   tpu: exported
#   cpu, cuda: exported
#   cpu, tpu: ValueError: Only interpret mode is supported on CPU backend.
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
from jax.experimental import pallas as pl


def kernel(x, y):
    y[...] = x[...] + 1


def by_kernel(x):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@jax.jit
def add_one(x):
    return jax.lax.platform_dependent(x, tpu=by_kernel, default=lambda x: x + 1)


for platforms in (["cpu"], ["tpu"], ["cpu", "cuda"], ["cpu", "tpu"]):
    try:
        jax.export.export(add_one, platforms=platforms)(jnp.zeros((8, 128)))
        print(f"{', '.join(platforms)}: exported")
    except ValueError as error:
        print(f"{', '.join(platforms)}: ValueError: {error}")
PYTHON
diff "$folder/output" - <<'EXPECTED'
cpu: exported
tpu: exported
cpu, cuda: exported
cpu, tpu: ValueError: Only interpret mode is supported on CPU backend.
EXPECTED

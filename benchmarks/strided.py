"""The gradient of the strided convolution, ours beside XLA's, by itself and within a loop.

    python benchmarks/strided.py

At the shapes of the tiny model's patch embedding and downsampling, batch 8: all at once, and four
parts of two images one after another, as with accumulated gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
from _measure import compile_timed, interleaved, report

from vmamba_jax.ops import strided_conv

BATCH, PARTS = 8, 4
SHAPES = ((224, 3, 48), (112, 48, 96), (56, 96, 192), (28, 192, 384), (14, 384, 768))
"""Side of the map, channels in, channels out; 3x3, stride 2, padding 1."""


def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """With the derivative that this package writes out."""
    return strided_conv(x, kernel, stride=2, padding=1)


def by_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """With the derivative that JAX derives."""
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def main() -> None:
    """Times every shape and reports milliseconds a batch."""
    rng = np.random.default_rng(0)
    rows = []
    for side, features, out in SHAPES:
        x = jnp.asarray(rng.normal(size=(BATCH, side, side, features)), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(3, 3, features, out)), jnp.float32)
        dy = jnp.asarray(rng.normal(size=ours(x, kernel).shape), jnp.float32)
        runs = {}
        for name, conv in (("ours", ours), ("XLA's", by_xla)):

            def gradient(x, kernel, dy, conv=conv):
                return jax.vjp(conv, x, kernel)[1](dy)

            def in_parts(x, kernel, dy, gradient=gradient):
                def add(total, part):
                    dx, dkernel = gradient(part[0], kernel, part[1])
                    return total + dkernel, dx

                parts = [a.reshape(PARTS, -1, *a.shape[1:]) for a in (x, dy)]
                return jax.lax.scan(add, jnp.zeros_like(kernel), parts)

            for mode, function in (("at once", gradient), ("in a loop", in_parts)):
                compiled, _ = compile_timed(function, x, kernel, dy)
                runs[f"{name}, {mode} (ms)"] = lambda run=compiled, a=(x, kernel, dy): run(*a)
        times = interleaved(runs, rounds=5)
        rows.append(
            {"side": side, "channels": [features, out]}
            | {name: 1e3 * float(np.median(t)) for name, t in times.items()}
        )
    report("strided", rows)


if __name__ == "__main__":
    main()

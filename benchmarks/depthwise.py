"""The depthwise convolution as shifted multiply-adds, beside XLA's grouped convolution.

    python benchmarks/depthwise.py

Forward, and forward with both gradients, at the stage shapes of the tiny model.
"""

import jax
import jax.numpy as jnp
import numpy as np
from _measure import compile_timed, interleaved, report

from vmamba_jax.ops import depthwise_conv

SHAPES = ((8, 56, 56, 96), (8, 28, 28, 192), (8, 14, 14, 384), (8, 7, 7, 768))


def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by `jax.lax.conv_general_dilated`."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def main() -> None:
    """Times every shape and reports nanoseconds an element."""
    rng = np.random.default_rng(0)
    rows = []
    for shape in SHAPES:
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        kernel = jnp.asarray(rng.normal(size=(3, 3, shape[-1])), jnp.float32)
        runs = {}
        for name, conv in (("shifted sums", depthwise_conv), ("grouped", grouped)):

            def both(x, kernel, conv=conv):
                y, vjp = jax.vjp(conv, x, kernel)
                return y, vjp(y)

            for mode, function in (("forward", conv), ("forward and gradients", both)):
                compiled, _ = compile_timed(function, x, kernel)
                runs[f"{name}, {mode} (ns)"] = lambda run=compiled, a=(x, kernel): run(*a)
        times = interleaved(runs, rounds=5)
        rows.append(
            {"shape": list(shape)} | {k: 1e9 * np.median(t) / x.size for k, t in times.items()}
        )
    report("depthwise", rows)


if __name__ == "__main__":
    main()

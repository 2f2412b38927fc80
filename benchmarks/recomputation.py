"""What the backward pass computes again, by `recompute`: operations counted in the jaxpr.

python benchmarks/recomputation.py [MODEL] [--image-size 224]

A multiply-add counts two, any other arithmetic operation one for each element; moving and comparing
count nothing. What a scan's gradient computes again inside is the same for all and does not count.
"""

import argparse
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vmamba_jax import VSSM, model_config
from vmamba_jax.ops.residuals import POLICIES

ARITHMETIC = {
    "add", "add_any", "sub", "mul", "div", "neg", "max", "abs", "exp", "log", "log1p", "logistic",
    "erf", "rsqrt", "sqrt", "square", "integer_pow", "tanh", "reduce_sum", "reduce_max",
}  # fmt: skip
AGAIN = "rematted_computation"


def main() -> None:
    """Prints one row for each choice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="vmamba_tiny_s1l8")
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    size = options.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    config = model_config(options.model).replace(drop_path_rate=0.2, imgsize=size)

    def operations_of(recompute: Any, differentiate: bool) -> dict[bool, float]:
        model = VSSM(config, dtype=jnp.bfloat16, recompute=recompute)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(variables: Any, images: jax.Array) -> jax.Array:
            rngs = {"dropout": jax.random.key(0)}
            return jnp.sum(jnp.asarray(model.apply(variables, images, train=True, rngs=rngs)))

        function = jax.grad(loss) if differentiate else loss
        counted = {False: 0.0, True: 0.0}
        for again, number in operations(jax.make_jaxpr(function)(variables, images).jaxpr):
            counted[again] += number
        return counted

    forward = operations_of("activations", differentiate=False)[False]
    print(f"{options.model}, {size}x{size}, forward: {forward / 1e9:.2f} GFLOP an image")
    for recompute in POLICIES:
        again = operations_of(recompute, differentiate=True)[True]
        print(f"{recompute}: {again / 1e9:.3f} GFLOP again, {again / forward:.1%} of the forward's")


def operations(jaxpr: Any, again: bool = False) -> Iterator[tuple[bool, float]]:
    """(whether it is computed again, number of operations) of each equation."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inside = again or AGAIN in str(equation.source_info.name_stack)
        if name == "cond":  # the choice of a platform, of which the default comes last
            yield from operations(parameters["branches"][-1].jaxpr, inside)
            continue
        called = [getattr(value, "jaxpr", value) for value in parameters.values()]
        called = [value for value in called if hasattr(value, "eqns")]
        if called:
            times = parameters.get("length", 1) if name == "scan" else 1
            for each in called:
                yield from ((a, times * n) for a, n in operations(each, inside))
        elif name == "dot_general":
            ((contracted, _), _) = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            of_each = math.prod(shape[axis] for axis in contracted)
            yield inside, 2.0 * _size(equation.outvars[0]) * of_each
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            yield inside, 2.0 * _size(equation.outvars[0]) * math.prod(kernel) / features
        elif name in ARITHMETIC:
            yield inside, float(max(map(_size, [*equation.invars, *equation.outvars])))


def _size(variable: Any) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


if __name__ == "__main__":
    main()

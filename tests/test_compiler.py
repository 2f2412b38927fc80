"""The compiler's options: taken by this JAX, and worth having."""

from functools import partial

import jax
import jax.numpy as jnp

from vmamba_jax import compiler_options, create_model


def test_a_gradient_needs_less_memory_with_the_options_and_is_the_same():
    model, variables = create_model("vmamba_digits")
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))

    def loss(variables, images):
        logits = jnp.asarray(model.apply(variables, images))
        return jax.nn.log_softmax(logits)[:, 0].sum()

    lowered = jax.jit(jax.grad(loss)).lower(variables, images)
    plain, ours = lowered.compile(), lowered.compile(compiler_options=compiler_options("cpu"))

    def temporaries(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(ours) < 0.7 * temporaries(plain)
    close = partial(jnp.allclose, rtol=1e-4, atol=1e-5)
    pairs = jax.tree.map(close, ours(variables, images), plain(variables, images))
    assert jax.tree.all(pairs)


def test_only_a_cpu_needs_options():
    assert compiler_options() == compiler_options("cpu")
    assert compiler_options("gpu") == compiler_options("tpu") == {}

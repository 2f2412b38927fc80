"""The compiler's options: taken by this JAX, and worth having."""

import jax
import jax.numpy as jnp

from vmamba_jax import compiler_options, create_model


def test_a_model_needs_less_memory_with_the_options_and_gives_the_same():
    model, variables = create_model("vmamba_digits")
    images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    lowered = jax.jit(model.apply).lower(variables, images)
    plain, ours = lowered.compile(), lowered.compile(compiler_options=compiler_options("cpu"))

    def temporaries(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(ours) < temporaries(plain)
    assert jnp.allclose(ours(variables, images), plain(variables, images), atol=1e-6)


def test_only_a_cpu_needs_options():
    assert compiler_options() == compiler_options("cpu")
    assert compiler_options("gpu") == compiler_options("tpu") == {}

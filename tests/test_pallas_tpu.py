"""The TPU kernels: their numbers in interpret mode, and that TPU's own compiler takes them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vmamba_jax.ops import _pallas_tpu, _reference, selective_scan

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

RANK = 3  # of the projection that lifts delta


def make_inputs(batch, length, routes, channels, states, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    wide = (batch, length, routes, channels)
    narrow = (batch, length, routes, states)
    weights = (routes, channels)
    return (
        normal(*wide),
        normal(*wide[:-1], RANK) - 1,
        -jnp.exp(normal(*weights, states, dtype=jnp.float32)),
        normal(*narrow),
        normal(*narrow),
        normal(*weights, dtype=jnp.float32),
        normal(*weights, dtype=jnp.float32),
        normal(*weights, RANK, dtype=jnp.float32),
    )


def output_and_gradients(scan, inputs, dy, *static):
    y, vjp = jax.vjp(lambda *arrays: scan(*arrays, *static), *inputs)
    return y, *vjp(dy.astype(y.dtype))


@pytest.mark.parametrize(
    ("shape", "reverse", "dtype"),
    [
        ((3, 37, 2, 6, 3), False, jnp.float32),  # padded rows; one chunk
        ((1, 67, 4, 5, 1), True, jnp.float32),  # padded rows and steps; two chunks
        ((2, 20, 4, 5, 2), True, jnp.bfloat16),
    ],
)
def test_output_and_every_gradient_equal_the_reference(shape, reverse, dtype):
    inputs = make_inputs(*shape, dtype=dtype)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=shape[:-1]), dtype)
    kernel = partial(_pallas_tpu.selective_scan, interpret=True)
    run = jit(output_and_gradients, static_argnums=(0, 3, 4))
    actual = run(kernel, inputs, dy, True, reverse)
    exact = tuple(a.astype(jnp.float32) for a in inputs)
    expected = run(_reference.selective_scan, exact, dy, True, reverse)
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-7
    for ours, theirs, like in zip(actual, expected, (inputs[0], *inputs), strict=True):
        assert ours.dtype == like.dtype
        error = jnp.abs(ours.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        assert error < tolerance


@pytest.mark.parametrize("batch", [4, 3])
def test_every_device_of_a_mesh_scans_its_part_of_the_batch(batch):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    inputs = make_inputs(batch, 9, 4, 5, 1)
    dy = jnp.ones_like(inputs[0])
    # A batch that can't be split is scanned whole by each.
    split = ("data",) if batch % 2 == 0 else ()
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (split, ()))
    layout = (by_batch, by_batch, whole, by_batch, by_batch, whole, whole, whole)
    kernel = partial(_pallas_tpu.selective_scan, interpret=True)
    run = jit(output_and_gradients, static_argnums=(0, 3, 4))
    expected = run(kernel, inputs, dy, True, False)
    with jax.set_mesh(mesh):
        inputs, dy = jax.device_put(inputs, layout), jax.device_put(dy, by_batch)
        actual = run(kernel, inputs, dy, True, False)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tpus():
    """A v5e host's four chips, to compile for; none need be here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, value)
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


# Stage 1 and stage 4 of the tiny model at 224 pixels, one image a chip; d_state 1 and 16.
@pytest.mark.tpu
@pytest.mark.parametrize("shape", [(4, 3136, 2, 96, 1), (4, 49, 2, 1536, 16)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_compiler_takes_the_kernels_on_a_mesh(tpus, shape, dtype):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=tpus)
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    batched = (True, True, False, True, True, False, False, False)

    def abstract(a, sharding):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    inputs = jax.eval_shape(lambda: make_inputs(*shape, dtype=dtype))
    arguments = tuple(
        abstract(a, by_batch if b else whole) for a, b in zip(inputs, batched, strict=True)
    )
    step = jax.jit(output_and_gradients, static_argnums=(0, 3, 4))
    dy = abstract(inputs[0], by_batch)
    with jax.set_mesh(mesh):
        lowered = step.lower(_pallas_tpu.selective_scan, arguments, dy, True, False)
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    assert text.count("tpu_custom_call") >= 2
    assert "all-gather" not in text
    # No (B, L, K, C, N) array: at d_state 16 that alone is 16 times u.
    u = 4 * np.prod(shape[1:4])
    assert memory.temp_size_in_bytes < 12 * u


def test_without_a_tpu_the_error_names_what_runs():
    with pytest.raises(NotImplementedError, match="sequential"):
        selective_scan(*make_inputs(1, 4, 2, RANK, 1)[:-1], implementation="pallas_tpu")

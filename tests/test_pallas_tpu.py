"""The TPU kernels: their numbers in interpret mode, and that TPU's own compiler takes them."""

import math
import re
from functools import partial
from itertools import pairwise
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vmamba_jax.ops import (
    _pallas_tpu,
    _pallas_tpu_blocks,
    _reference,
    cross_merge,
    cross_scan,
    scan_2d,
    selective_scan,
    selective_scan_2d,
)
from vmamba_jax.ops.scan_order import ROUTES, positions

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

RANK = 3  # of the projection that lifts delta


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def weights_of(routes, channels, states):
    return (
        -jnp.exp(draw(routes, channels, states)),
        draw(routes, channels, seed=1),
        draw(routes, channels, seed=2),
        draw(routes, channels, RANK, seed=3),
    )


def make_map(batch, height, width, channels, states, dtype=jnp.float32):
    """A map, what each position projects to, and the weights of its four routes."""
    x = draw(batch, height, width, channels, dtype=dtype)
    projected = draw(batch, height, width, 4 * (RANK + 2 * states), dtype=dtype)
    *others, lift = weights_of(4, channels, states)
    return (x, projected, *others, lift.astype(dtype))


def make_sequence(batch, length, routes, channels, states, dtype=jnp.float32):
    A, D, bias, lift = weights_of(routes, channels, states)
    narrow = partial(draw, batch, length, routes, states, dtype=dtype)
    delta = draw(batch, length, routes, RANK, dtype=dtype) - 1
    u = draw(batch, length, routes, channels, dtype=dtype)
    return (u, delta, A, narrow(seed=4), narrow(seed=5), D, bias, lift)


def route_by_route(x, projected, A, D, bias, lift, order):
    """Reads the map along each route, scans it by the reference, and merges."""
    states = A.shape[-1]
    read = [cross_scan(p, order)[:, :, k] for k, p in enumerate(jnp.split(projected, 4, -1))]
    delta, b, c = jnp.split(jnp.stack(read, axis=2), (RANK, RANK + states), axis=-1)
    y = _reference.selective_scan(cross_scan(x, order), delta, A, b, c, D, bias, lift, True, False)
    _, height, width, _ = x.shape
    return cross_merge(y, height, width, order)


def output_and_gradients(scan, inputs, dy, *static):
    y, vjp = jax.vjp(lambda *arrays: scan(*arrays, *static), *inputs)
    return y, *vjp(dy.astype(y.dtype))


def assert_alike(actual, expected, inputs, tolerance):
    for ours, theirs, like in zip(actual, expected, inputs, strict=True):
        assert ours.dtype == like.dtype
        error = jnp.abs(ours.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max()
        assert error < tolerance


def text_of(compiled):
    text = compiled.as_text()
    assert text is not None
    return text


fused = partial(_pallas_tpu.selective_scan_2d, interpret=True)
alone = partial(_pallas_tpu.selective_scan, interpret=True)


@pytest.mark.parametrize(
    ("order", "shape", "dtype"),
    [
        ("cross2d", (9, 7, 5, 6, 1), jnp.float32),  # two blocks of rows, one of them filled up
        ("rot90", (2, 3, 2, 640, 2), jnp.float32),  # five blocks of channels
        ("unidi", (1, 1, 67, 5, 1), jnp.float32),  # two chunks, one of them shorter
        ("bidi", (2, 2, 3, 130, 1), jnp.bfloat16),
        ("cross2d", (2, 3, 4, 5, 16), jnp.bfloat16),  # more than a register's lanes of numbers
        ("rot90", (2, 3, 2, 256, 1), jnp.bfloat16),
    ],
)
def test_all_routes_and_every_gradient_equal_the_reference(order, shape, dtype):
    inputs = make_map(*shape, dtype=dtype)
    dy = draw(*shape[:-1], seed=6)
    run = jit(output_and_gradients, static_argnums=(0, 3))
    actual = run(fused, inputs, dy, order)
    exact = tuple(a.astype(jnp.float32) for a in inputs)
    expected = run(route_by_route, exact, dy, order)
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-7
    assert_alike(actual, expected, (dy, *inputs), tolerance)


@pytest.mark.parametrize(
    ("shape", "reverse", "dtype", "vmem"),
    [
        ((3, 37, 1, 6, 3), False, jnp.float32, 2**24),
        ((2, 20, 2, 5, 2), True, jnp.bfloat16, 2**24),
        ((1, 67, 1, 5, 1), False, jnp.float32, 2**21),  # several blocks
        ((9, 67, 1, 256, 1), True, jnp.float32, 2**21),
    ],
)
def test_a_sequence_and_every_gradient_equal_the_reference(
    shape, reverse, dtype, vmem, monkeypatch
):
    monkeypatch.setattr(_pallas_tpu_blocks, "SMALLEST_VMEM", vmem)
    batch, length, _, channels, states = shape
    sizes = _pallas_tpu_blocks.Sizes(batch, length, channels, 1, RANK, states)
    assert (_pallas_tpu_blocks.plan(sizes, 4, 4).block < length) == (vmem == 2**21)
    inputs = make_sequence(*shape, dtype=dtype)
    dy = draw(*shape[:-1], dtype=dtype, seed=6)
    run = jit(output_and_gradients, static_argnums=(0, 3, 4))
    actual = run(alone, inputs, dy, True, reverse)
    exact = tuple(a.astype(jnp.float32) for a in inputs)
    expected = run(_reference.selective_scan, exact, dy, True, reverse)
    tolerance = 2e-6 if dtype == jnp.float32 else 2**-7
    assert_alike(actual, expected, (inputs[0], *inputs), tolerance)


def test_delta_may_be_lifted_already_and_stay_as_it_is():
    u, _, A, b, c, D, bias, _ = make_sequence(2, 9, 1, 6, 2)
    inputs = (u, jnp.abs(draw(*u.shape, seed=7)), A, b, c, D, jnp.abs(bias), None)
    run = jit(lambda scan, inputs: scan(*inputs, False, False), static_argnums=0)
    np.testing.assert_allclose(
        run(alone, inputs), run(_reference.selective_scan, inputs), rtol=1e-5, atol=1e-5
    )


def test_second_derivatives_equal_the_reference():
    inputs = make_map(2, 2, 3, 4, 1)
    tangents = tuple(draw(*a.shape, seed=8) for a in inputs)

    def curvature(scan, inputs, tangents):
        def gradients(inputs):
            return jax.grad(lambda inputs: (scan(*inputs, "cross2d") ** 2).sum())(inputs)

        return jax.jvp(gradients, (inputs,), (tangents,))[1]

    run = jit(curvature, static_argnums=0)
    actual, expected = (run(scan, inputs, tangents) for scan in (fused, route_by_route))
    assert_alike(actual, expected, inputs, 2e-5)


@pytest.mark.parametrize("order", ROUTES)
def test_a_list_of_positions_reads_a_map_as_its_order_does(order):
    height, width = 3, 5
    x = jnp.arange(height * width, dtype=jnp.float32).reshape(1, height, width, 1)
    expected = cross_scan(x, order)[0, :, :, 0].T
    np.testing.assert_array_equal(positions(order, height, width), expected)


@pytest.mark.parametrize(
    ("mesh", "batch", "axes"),
    [
        ({"data": 2, "fsdp": 2}, 8, ("data", "fsdp")),
        ({"data": 2, "model": 2}, 2, ("data",)),
        ({"data": 2, "fsdp": 2}, 3, ()),  # such as the one image of an initialisation
        ({"devices": 4}, 8, ("devices",)),
        ({}, 8, ()),
    ],
)
def test_a_batch_is_split_over_the_axes_that_are_for_it(mesh, batch, axes):
    kinds = (AxisType.Auto,) * len(mesh)
    mesh = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=kinds)
    with jax.sharding.use_abstract_mesh(mesh):
        assert _pallas_tpu._batch_axes(batch) == axes


def test_every_device_of_a_mesh_scans_its_part_of_the_batch():
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=kinds, devices=jax.devices()[:2])
    inputs, dy = make_map(4, 2, 3, 5, 1), draw(4, 2, 3, 5)
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    run = jit(output_and_gradients, static_argnums=(0, 3))
    expected = run(fused, inputs, dy, "cross2d")
    with jax.set_mesh(mesh):
        inputs = jax.device_put(inputs, (by_batch, by_batch, *[whole] * 4))
        lowered = run.lower(fused, inputs, jax.device_put(dy, by_batch), "cross2d")
        compiled = lowered.compile()
        assert "all-gather" not in text_of(compiled)
        actual = compiled(inputs, jax.device_put(dy, by_batch))
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def kernels_for_tpu(side, names=None):
    x = jax.ShapeDtypeStruct((8, side, side, 96), jnp.bfloat16)
    A, *others = weights_of(4, 96, 1)
    x_proj = draw(4, RANK + 2, 96, dtype=jnp.bfloat16)
    D, bias, lift = others

    def scan(x):
        return selective_scan_2d(x, x_proj, lift, bias, A, D, implementation=names)

    lowered = jax.jit(scan).trace(x).lower(lowering_platforms=("tpu",))
    return len(re.findall("tpu_custom_call", lowered.as_text()))


def test_a_tpu_scans_all_routes_of_a_map_at_once_and_one_too_large_by_route(monkeypatch):
    assert kernels_for_tpu(8) == 1
    assert kernels_for_tpu(64) > 1
    monkeypatch.setattr(scan_2d, "platform", lambda: "tpu")
    assert kernels_for_tpu(8, "pallas_tpu") == 1
    assert kernels_for_tpu(8, ("associative", "pallas_tpu")) == 0


# Stages 1 and 4 at 224 pixels, of s1l8 and of the vanilla model.
MAPS = [(56, 96, 1), (7, 768, 1), (56, 192, 16), (7, 1536, 16)]


@pytest.mark.parametrize(("side", "channels", "states"), MAPS)
def test_what_a_scan_needs_crosses_hbm_about_once(side, channels, states, monkeypatch):
    monkeypatch.setattr(_pallas_tpu_blocks, "_chip", lambda: (2**27, 5))  # a v5e, a v6e
    inputs = jax.eval_shape(partial(make_map, 64, side, side, channels, states, jnp.bfloat16))
    dy = jax.ShapeDtypeStruct(inputs[0].shape, jnp.float32)
    moved = {}

    def moves(spec, array, grid):
        """A block is fetched, or written, whenever its index changes."""
        visited = [spec.index_map(*now) for now in np.ndindex(*grid)]
        count = 1 + sum(before != now for before, now in pairwise(visited))
        return count * math.prod(size or 1 for size in spec.block_shape) * array.dtype.itemsize

    def recorded(_, *, grid, in_specs, out_specs, out_shape, name, **_more):
        def record(*operands):
            pairs = zip([*in_specs, *out_specs], [*operands, *out_shape], strict=True)
            moved[name] = sum(moves(*pair, grid) for pair in pairs)
            return [jnp.zeros(a.shape, a.dtype) for a in out_shape]

        return record

    with mock.patch.object(pl, "pallas_call", recorded):
        jax.eval_shape(
            lambda inputs, dy: output_and_gradients(fused, inputs, dy, "cross2d"), inputs, dy
        )
    once = sum(a.size * a.dtype.itemsize for a in inputs)
    assert moved["selective_scan"] < 1.3 * (once + 4 * dy.size)
    assert moved["selective_scan_gradient"] < 1.6 * (2 * once + 4 * dy.size)


CHIPS = ["v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1", "tpu7x:2x2x1"]


@pytest.fixture(scope="module")
def describe():
    """Describes TPUs to compile for; none need be here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, value)
        yield partial(topologies.get_topology_desc, platform="tpu")


@pytest.mark.tpu
@pytest.mark.parametrize(("side", "channels", "states"), MAPS)
@pytest.mark.parametrize("chip", CHIPS)
def test_tpu_compiler_takes_the_kernels(describe, chip, side, channels, states):
    device = describe(topology_name=chip).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    dtype = jnp.bfloat16
    x = jax.ShapeDtypeStruct((16, side, side, channels), dtype, sharding=sharding)
    dy = jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding)
    A, D, bias, lift = weights_of(4, channels, states)
    x_proj = draw(4, RANK + 2 * states, channels, dtype=dtype)

    def step(x, dy):
        def scan(x):
            return selective_scan_2d(x, x_proj, lift.astype(dtype), bias, A, D)

        return output_and_gradients(scan, (x,), dy)

    with jax.default_device(device):
        compiled = jax.jit(step).lower(x, dy).compile()
    assert text_of(compiled).count("tpu_custom_call") >= 2
    # No (B, L, K, C, N) array: at d_state 16 that alone is 64 times x.
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 20 * 4 * x.size


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_compiler_takes_the_kernels_on_a_mesh(describe, dtype):
    devices = describe(topology_name="v5e:2x2").devices
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    inputs = jax.eval_shape(partial(make_map, 4, 14, 14, 128, 1, dtype))
    inputs = tuple(
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for a, sharding in zip(inputs, [by_batch] * 2 + [whole] * 4, strict=True)
    )
    dy = jax.ShapeDtypeStruct(inputs[0].shape, jnp.float32, sharding=by_batch)
    step = jax.jit(output_and_gradients, static_argnums=(0, 3))
    with jax.set_mesh(mesh):
        lowered = step.lower(_pallas_tpu.selective_scan_2d, inputs, dy, "cross2d")
    text = text_of(lowered.compile())
    assert text.count("tpu_custom_call") == 2
    assert "all-gather" not in text


def test_without_a_tpu_the_error_names_what_runs():
    with pytest.raises(NotImplementedError, match="sequential"):
        selective_scan(*make_sequence(1, 4, 2, RANK, 1)[:-1], implementation="pallas_tpu")

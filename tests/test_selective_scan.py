"""Every implementation of the selective scan against the plain recurrence in NumPy float64."""

import inspect
import math
import re
import sys
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vmamba_jax.ops import IMPLEMENTATIONS, selective_scan

# These arrays are tiny: compiling takes far longer than running, whatever LLVM's effort.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SCAN = jit(selective_scan, static_argnames=("delta_softplus", "reverse", "implementation"))


def make_inputs(length, states, *, batch=2, routes=2, channels=5, rank=None):
    """With a `rank`, delta has that many channels, and a projection to lift it."""
    rng = np.random.default_rng(0)
    shape = (batch, length, routes, channels)
    inputs = {
        "u": rng.normal(size=shape),
        "delta": rng.normal(size=shape) - 1.0,
        "A": -np.exp(rng.normal(size=(routes, channels, states))),
        "B": rng.normal(size=(batch, length, routes, states)),
        "C": rng.normal(size=(batch, length, routes, states)),
        "D": rng.normal(size=(routes, channels)),
        "delta_bias": 0.5 * rng.normal(size=(routes, channels)),
    }
    if rank is not None:
        inputs["delta"] = rng.normal(size=(batch, length, routes, rank))
        inputs["delta_proj"] = rng.normal(size=(routes, channels, rank))
    return inputs


def recurrence(u, delta, A, B, C, D, delta_bias, delta_proj=None, *, softplus=True, reverse=False):
    """The definition, element by element in float64."""
    if delta_proj is not None:
        delta = np.einsum("blkr,kcr->blkc", delta, delta_proj)
    step = delta + (0 if delta_bias is None else delta_bias)
    step = np.logaddexp(step, 0) if softplus else step
    y = np.zeros_like(u)
    h = np.zeros((u.shape[0], *A.shape))
    for now in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        s = step[:, now, :, :, None]
        h = np.exp(s * A) * h + s * B[:, now, :, None] * u[:, now, :, :, None]
        y[:, now] = (h * C[:, now, :, None]).sum(-1) + (0 if D is None else D * u[:, now])
    return y


def in_dtype(inputs, dtype) -> dict[str, Any]:
    """u, delta, B and C in `dtype`; the weights stay float32."""
    low = ("u", "delta", "B", "C")
    return {k: jnp.asarray(v, dtype if k in low else jnp.float32) for k, v in inputs.items()}


def relative_error(actual, expected):
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.fixture(params=["reference", "sequential", "associative"])
def implementation(request):
    return request.param


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "states", "rank", "routes"),
    [(1, 3, None, 2), (64, 1, None, 2), (131, 16, None, 1), (131, 3, 2, 2)],  # 131 is prime
)
def test_forward_equals_the_recurrence(implementation, length, states, rank, routes, reverse):
    inputs = make_inputs(length, states, rank=rank, routes=routes)
    expected = recurrence(**inputs, reverse=reverse)
    arrays = in_dtype(inputs, jnp.float32)
    actual = SCAN(**arrays, reverse=reverse, implementation=implementation)
    assert relative_error(actual, expected) < 3e-6


@pytest.mark.parametrize(
    ("dtype", "states", "rank", "routes", "reverse"),
    [
        (jnp.float32, 16, None, 2, False),
        (jnp.float32, 1, None, 1, True),
        (jnp.float32, 3, 2, 1, False),
        (jnp.float32, 1, 2, 2, True),
        (jnp.bfloat16, 16, 2, 2, True),
    ],
)
def test_every_gradient_equals_the_reference(implementation, dtype, states, rank, routes, reverse):
    inputs = in_dtype(make_inputs(131, states, rank=rank, routes=routes), dtype)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=inputs["u"].shape), jnp.float32)

    @partial(jit, static_argnums=1)
    @jax.grad
    def gradients(inputs, implementation):
        y = selective_scan(**inputs, reverse=reverse, implementation=implementation)
        return (y.astype(jnp.float32) * probe).sum()

    # bfloat16 inputs are exact in float32, so the reference sees the same numbers.
    wide = {k: v.astype(jnp.float32) for k, v in inputs.items()}
    expected = gradients(wide, "reference")
    actual = gradients(inputs, implementation)
    tolerance = 2e-5 if dtype == jnp.float32 else 1.5e-2
    for name in inputs:
        assert actual[name].dtype == inputs[name].dtype, name
        assert relative_error(actual[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("rank", [None, 2])
def test_gradients_equal_finite_differences_in_float64(implementation, rank):
    inputs = make_inputs(13, 3, batch=1, rank=rank)
    rng = np.random.default_rng(1)
    probe = rng.normal(size=inputs["u"].shape)

    @jit
    @jax.grad
    def gradients(arrays):
        y = selective_scan(**arrays, implementation=implementation)
        return (y * jnp.asarray(probe, jnp.float32)).sum()

    actual = gradients(in_dtype(inputs, jnp.float32))
    for name in inputs:
        direction = rng.normal(size=inputs[name].shape)
        ahead, behind = (
            (recurrence(**{**inputs, name: inputs[name] + step * direction}) * probe).sum()
            for step in (1e-6, -1e-6)
        )
        slope = (np.asarray(actual[name], np.float64) * direction).sum()
        scale = np.linalg.norm(actual[name]) * np.linalg.norm(direction)
        assert abs(slope - (ahead - behind) / 2e-6) < 1e-5 * scale, name


def test_bfloat16_output_is_within_rounding_of_float32(implementation):
    inputs = in_dtype(make_inputs(131, 16), jnp.bfloat16)
    wide = {k: v.astype(jnp.float32) for k, v in inputs.items()}
    expected = SCAN(**wide, implementation="reference")
    actual = SCAN(**inputs, implementation=implementation)
    assert actual.dtype == jnp.bfloat16
    assert relative_error(actual, expected) < 2**-8


def test_an_empty_batch_gives_an_empty_result(implementation):
    inputs = in_dtype(make_inputs(8, 3, batch=0, rank=2), jnp.float32)

    @jax.grad
    def gradients(inputs):
        return selective_scan(**inputs, implementation=implementation).sum()

    for name, gradient in gradients(inputs).items():
        np.testing.assert_array_equal(gradient, np.zeros(inputs[name].shape))


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
@pytest.mark.parametrize(("length", "channels"), [(784, 384), (49, 1536)])  # stages 2 and 4
def test_the_states_of_all_steps_never_exist_at_once(implementation, length, channels):
    routes, states = 4, 16
    per_step = jax.ShapeDtypeStruct((1, length, routes, channels), jnp.float32)
    per_state = jax.ShapeDtypeStruct((1, length, routes, states), jnp.float32)
    A = jax.ShapeDtypeStruct((routes, channels, states), jnp.float32)

    def gradients(u, delta, A, B, C):
        scan = partial(selective_scan, implementation=implementation)
        y, vjp = jax.vjp(scan, u, delta, A, B, C)
        return vjp(y)

    program = jax.jit(gradients).lower(per_step, per_step, A, per_state, per_state).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)f32>", program)
    assert len(shapes) > 10
    largest = max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)
    assert largest <= routes * channels * states * max(length // 2, 1)


def test_devices_scan_their_part_of_a_batch_without_gathering_it():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    inputs = in_dtype(make_inputs(131, 3, batch=4, rank=2), jnp.float32)
    by_batch, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    arrays = ("u", "delta", "B", "C")

    @jit
    @jax.grad
    def gradients(inputs):
        return (selective_scan(**inputs, implementation="associative") ** 2).sum()

    expected = gradients(inputs)
    inputs = {k: jax.device_put(v, by_batch if k in arrays else whole) for k, v in inputs.items()}
    program = gradients.lower(inputs).compile().as_text()
    assert program is not None
    assert "all-reduce" in program  # what the weights' gradients need
    assert "all-gather" not in program
    actual = gradients(inputs)
    for name in inputs:
        assert relative_error(actual[name], expected[name]) < 2e-6, name
        assert actual[name].sharding.is_equivalent_to(inputs[name].sharding, actual[name].ndim)


@pytest.mark.parametrize("step", [1e-6, 1.0, 1e3])
def test_extreme_step_sizes_stay_finite(implementation, step):
    inputs = make_inputs(97, 4)
    inputs["delta"] = np.full_like(inputs["delta"], step)
    expected = recurrence(**{**inputs, "delta_bias": None}, softplus=False)
    arrays = in_dtype(inputs, jnp.float32)
    del arrays["delta_bias"]

    @jit
    @partial(jax.grad, has_aux=True)
    def gradients_and_output(arrays):
        y = selective_scan(**arrays, delta_softplus=False, implementation=implementation)
        return y.sum(), y

    gradients, y = gradients_and_output(arrays)
    assert relative_error(y, expected) < 3e-6
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name


@pytest.mark.parametrize("raw", [-1e4, 1e4])
def test_extreme_inputs_of_softplus_stay_finite(implementation, raw):
    inputs = make_inputs(33, 2)
    inputs["delta"] = np.full_like(inputs["delta"], raw)
    arrays = in_dtype(inputs, jnp.float32)

    @jit
    @jax.value_and_grad
    def value_and_gradients(arrays):
        return selective_scan(**arrays, implementation=implementation).sum()

    value, gradients = value_and_gradients(arrays)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_skip_and_bias_are_optional(implementation):
    inputs = make_inputs(20, 3)
    inputs["D"] = inputs["delta_bias"] = None
    arrays = {k: None if v is None else jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
    actual = SCAN(**arrays, implementation=implementation)
    assert relative_error(actual, recurrence(**inputs)) < 3e-6


def test_a_program_holds_the_scan_of_the_platform_that_it_is_lowered_for():
    arrays = in_dtype(make_inputs(4, 2), jnp.float32)
    traced = SCAN.trace(**arrays)
    kernels = {
        platform: "tpu_custom_call" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert kernels == {"cpu": False, "cuda": False, "tpu": True}


@pytest.mark.parametrize(
    ("platforms", "implementation"),
    [(("cpu", "cuda"), None), (("cpu", "cuda", "tpu"), "associative")],
)
def test_one_program_serves_several_platforms(platforms, implementation):
    arrays = in_dtype(make_inputs(4, 2), jnp.float32)
    scan = jit(partial(selective_scan, implementation=implementation))
    exported = jax.export.export(scan, platforms=platforms)(**arrays)
    np.testing.assert_allclose(exported.call(**arrays), scan(**arrays), atol=1e-6)


def test_an_unknown_implementation_names_the_closest():
    arrays = in_dtype(make_inputs(4, 1), jnp.float32)
    with pytest.raises(ValueError, match="Did you mean 'associative'"):
        selective_scan(**arrays, implementation="asociative")


def test_names_are_tried_in_turn(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("not on this machine")

    table = {"refuses": refuse, **IMPLEMENTATIONS}
    monkeypatch.setattr(sys.modules[selective_scan.__module__], "IMPLEMENTATIONS", table)
    arrays = in_dtype(make_inputs(4, 1), jnp.float32)
    expected = selective_scan(**arrays, implementation="sequential")
    actual = selective_scan(**arrays, implementation=("refuses", "sequential"))
    np.testing.assert_array_equal(actual, expected)
    with pytest.raises(NotImplementedError, match="refuses: not on this machine"):
        selective_scan(**arrays, implementation="refuses")


def test_shapes_that_do_not_fit_are_named():
    arrays = in_dtype(make_inputs(4, 2), jnp.float32)
    with pytest.raises(ValueError, match=r"B must be \(2, 4, 2, 2\)"):
        inspect.unwrap(selective_scan)(**{**arrays, "B": arrays["B"][..., :1]})
    arrays = in_dtype(make_inputs(4, 2, rank=3), jnp.float32)
    with pytest.raises(ValueError, match=r"delta must be \(2, 4, 2, 3\)"):
        inspect.unwrap(selective_scan)(**{**arrays, "delta": arrays["u"]})
    with pytest.raises(ValueError, match=r"delta_proj must be \(2, 5, 3\)"):
        inspect.unwrap(selective_scan)(**{**arrays, "delta_proj": arrays["delta_proj"][:, 1:]})

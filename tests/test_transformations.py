"""The model inside other people's JAX: what JAX promises of a function holds for it."""

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vmamba_jax import VSSM, create_model, model_config, selective_scan

MODEL = VSSM(
    model_config("vmamba_tiny_s1l8").replace(
        depths=(1, 1), dims=(16, 32), num_classes=5, drop_path_rate=0.0
    )
)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)


def loss(params, images):
    return jnp.square(jnp.asarray(MODEL.apply({"params": params}, images))).mean()


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), IMAGES)["params"]


@pytest.fixture(scope="module")
def gradient(params):
    return jax.jit(jax.grad(loss))(params, IMAGES)


def assert_close(actual, expected, tolerance=1e-5):
    def check(a, e):
        assert np.abs(a - e).max() <= tolerance * np.abs(e).max()

    jax.tree.map(check, actual, expected)


def test_the_gradient_is_the_same_under_x64(params, gradient):
    with jax.enable_x64(True):
        actual = jax.jit(jax.grad(loss))(params, IMAGES)
    assert {a.dtype for a in jax.tree.leaves(actual)} == {jnp.dtype(jnp.float32)}
    assert_close(actual, gradient)


FIRST_RELEASE = VSSM(
    model_config("vanilla_vmamba_tiny").replace(
        depths=(1,), dims=(16,), num_classes=5, drop_path_rate=0.0, ssm_d_state=4
    )
)


@pytest.mark.parametrize(
    ("model", "implementation"),
    [
        (MODEL, "sequential"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [
                (MODEL, "associative"),
                (MODEL, "reference"),
                (FIRST_RELEASE, "sequential"),
                (FIRST_RELEASE, "associative"),
                (FIRST_RELEASE, "reference"),
            ]
        ),
    ],
)
def test_a_float64_model_is_the_float32_one_and_its_gradient_holds_to_rounding(
    model, implementation
):
    narrow = jax.jit(model.init)(jax.random.key(0), IMAGES)
    expected = jax.jit(model.apply)(narrow, IMAGES)
    with jax.enable_x64(True):
        wide = model.clone(
            dtype=jnp.float64, param_dtype=jnp.float64, scan_implementation=implementation
        )
        variables, images = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (narrow, IMAGES))
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), variables)

        @jax.jit
        def evaluate(step):
            def loss(variables):
                logits = jnp.asarray(wide.apply(variables, images))
                return jnp.square(logits).sum(), logits

            moved = jax.tree.map(lambda a, d: a + step * d, variables, direction)
            (value, logits), slopes = jax.value_and_grad(loss, has_aux=True)(moved)
            along = sum(map(jnp.vdot, *map(jax.tree.leaves, (slopes, direction))))
            return value, along, logits

        (_, slope, logits), (ahead, *_), (behind, *_) = map(evaluate, (0.0, 1e-6, -1e-6))
        assert logits.dtype == jnp.float64
        assert_close(np.asarray(logits), np.asarray(expected))
        np.testing.assert_allclose((ahead - behind) / 2e-6, slope, rtol=1e-7)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_layer": "bn"},
        {"gmlp": True, "forward_type": "v0"},
        {"forward_type": "m0_noz", "ssm_init": "v2", "ssm_d_state": 4, "ssm_dt_rank": 4},
        {"forward_type": "v052dc"},
        {"patchembed_version": "v1", "downsample_version": "v1", "posembed": True},
    ],
)
def test_nothing_in_a_float64_model_is_rounded_to_float32(fields):
    with jax.enable_x64(True):
        config = MODEL.config.replace(**{"imgsize": 32} | fields)
        model = VSSM(config, dtype=jnp.float64, param_dtype=jnp.float64)
        images = jnp.zeros((1, 32, 32, 3), jnp.float64)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        program = jax.jit(model.apply).lower(variables, images).as_text()
    assert "xf64>" in program
    assert not re.findall(r"convert.*f64>\) -> tensor<.*f32>", program)


def test_the_gradient_is_the_same_inside_shard_map(params, gradient):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    def by_device(params, images):
        return jax.grad(lambda params: jax.lax.pmean(loss(params, images), "data"))(params)

    assert_close(by_device(params, IMAGES), gradient)


NOISY = VSSM(MODEL.config.replace(drop_path_rate=0.3, mlp_drop_rate=0.2, ssm_drop_rate=0.1))


@pytest.mark.parametrize("in_context", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_training_step_is_the_same_on_a_mesh_of_explicit_axes(params, in_context):
    @jax.jit
    def step(params, images):
        def loss(params):
            rngs = {"dropout": jax.random.key(3)}
            logits = NOISY.apply({"params": params}, images, train=True, rngs=rngs)
            return jnp.square(jnp.asarray(logits)).mean()

        return jax.grad(loss)(params)

    expected = step(params, IMAGES)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    assert set(mesh.axis_types) == {AxisType.Explicit}
    put = partial(jax.device_put, params), partial(jax.device_put, IMAGES)
    everywhere, split = (NamedSharding(mesh, P(*axes)) for axes in ((), ("data",)))
    with jax.set_mesh(mesh) if in_context else nullcontext():
        actual = step(put[0](everywhere), put[1](split))
    assert_close(jax.device_get(actual), expected)


def test_images_that_are_split_over_devices_are_refused(params):
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    images = jax.device_put(IMAGES, NamedSharding(mesh, P(None, "rows")))
    with pytest.raises(ValueError, match="split the batch only"):
        jax.eval_shape(MODEL.apply, {"params": params}, images)


def test_the_reference_differentiates_forward(params):
    model = MODEL.clone(scan_implementation="reference")

    def outputs(images):
        return model.apply({"params": params}, images)

    direction = jnp.ones_like(IMAGES)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
    forward = jax.jit(lambda x: jax.jvp(outputs, (x,), (direction,))[1])(IMAGES)
    linear = jax.jit(lambda x: jax.linearize(outputs, x)[1](direction))(IMAGES)
    (reverse,) = jax.jit(lambda x: jax.vjp(outputs, x)[1](weights))(IMAGES)
    np.testing.assert_allclose(forward, linear, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((weights * forward).sum(), reverse.sum(), rtol=1e-4)


def test_a_second_call_without_jit_compiles_nothing(params):
    compiled = []

    def listen(event, duration_secs, **_):
        if "backend_compile" in event:
            compiled.append(duration_secs)

    MODEL.apply({"params": params}, IMAGES)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        MODEL.apply({"params": params}, IMAGES)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled


def test_a_gradient_has_a_gradient():
    # Of one block at two positions: what matters is what can be differentiated, not how much.
    model = VSSM(MODEL.config.replace(depths=(1,), dims=(16,)))
    images = IMAGES[:1, :8, :8]
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def slope(x):
        return jax.grad(lambda x: jnp.square(jnp.asarray(model.apply(variables, x))).mean())(x)

    penalty = jax.jit(jax.value_and_grad(lambda x: jnp.square(slope(x)).sum() / 2))
    value, gradient = penalty(images)
    along = gradient / jnp.linalg.norm(gradient)
    ahead, behind = (penalty(images + sign * 1e-2 * along)[0] for sign in (1, -1))
    np.testing.assert_allclose((ahead - behind) / 2e-2, jnp.linalg.norm(gradient), rtol=2e-2)
    assert value > 0


def test_an_ensemble_is_its_members(params):
    other = jax.tree.map(lambda a: a * 1.01, params)
    stacked = jax.tree.map(lambda *members: jnp.stack(members), params, other)
    apply = jax.jit(lambda params: jnp.asarray(MODEL.apply({"params": params}, IMAGES)))
    together = jax.jit(jax.vmap(apply))(stacked)
    np.testing.assert_allclose(together, jnp.stack([apply(params), apply(other)]), atol=1e-5)


def test_linens_own_tools_work(params):
    table = MODEL.tabulate(
        jax.random.key(0), IMAGES, compute_flops=True, console_kwargs={"width": 200}
    )
    assert "layers_1_blocks_0" in table
    seen: Any
    _, seen = MODEL.apply({"params": params}, IMAGES, capture_intermediates=True)
    assert seen["intermediates"]["layers_0_blocks_0"]["__call__"][0].shape == (4, 8, 8, 16)


def test_gradients_of_single_images_average_to_that_of_the_batch(params, gradient):
    each = jax.jit(jax.vmap(jax.grad(lambda p, image: loss(p, image[None])), in_axes=(None, 0)))
    mean = jax.tree.map(lambda g: g.mean(axis=0), each(params, IMAGES))
    assert_close(mean, gradient)


def test_a_gradient_differentiates_forward(params):
    direction = jax.tree.map(jnp.ones_like, params)
    slope = jax.grad(loss)

    @jax.jit
    def product(params):
        return jax.jvp(lambda p: slope(p, IMAGES), (params,), (direction,))[1]

    @jax.jit
    def slope_after(params, step):
        return slope(jax.tree.map(lambda p, d: p + step * d, params, direction), IMAGES)

    def difference(step):
        ahead, behind = slope_after(params, step), slope_after(params, -step)
        return jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)

    actual, expected = (
        jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (product(params), difference(jnp.float32(1e-3)))
    )
    assert jnp.linalg.norm(actual - expected) < 1e-2 * jnp.linalg.norm(expected)


def test_a_model_is_created_inside_other_transformations():
    def create():
        return create_model("vmamba_digits")[1]

    shapes = jax.eval_shape(create)
    inside = jax.jit(create)()
    assert jax.tree.map(jnp.shape, inside) == jax.tree.map(lambda s: s.shape, shapes)


@pytest.mark.parametrize("implementation", ["reference", "sequential", "associative"])
def test_second_derivatives_of_the_scan_hold_where_softplus_has_its_corner(implementation):
    # y = softplus(x) u B C with one step; at x = 0 softplus has slope 1/2 and curvature 1/4.
    one = jnp.ones((1, 1, 1, 1))

    @partial(jax.grad, argnums=0)
    def slope(delta):
        scan = partial(selective_scan, implementation=implementation)
        return scan(one, delta, -jnp.ones((1, 1, 1)), one, one).sum()

    first = slope(0 * one)
    second = jax.jvp(slope, (0 * one,), (one,))[1]
    np.testing.assert_allclose(first.item(), 0.5, rtol=1e-6)
    np.testing.assert_allclose(second.item(), 0.25, rtol=1e-6)

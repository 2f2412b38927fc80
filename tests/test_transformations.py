"""The model inside other people's JAX: what JAX promises of a function holds for it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

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


def test_the_gradient_is_the_same_inside_shard_map(params, gradient):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    def by_device(params, images):
        return jax.grad(lambda params: jax.lax.pmean(loss(params, images), "data"))(params)

    assert_close(by_device(params, IMAGES), gradient)


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

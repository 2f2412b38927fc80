"""The 2-D traversals against their definitions, and SS2D's core against its spelled-out form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.ops import cross_merge, cross_scan, selective_scan, selective_scan_2d, ssd
from vmamba_jax.ops.scan_order import ROUTES

HEIGHT, WIDTH, CHANNELS = 3, 5, 4


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def flat(x):
    return np.asarray(x).reshape(x.shape[0], -1, x.shape[-1])


DEFINITIONS = {
    "cross2d": lambda x: [
        flat(x),
        flat(x.swapaxes(1, 2)),
        flat(x)[:, ::-1],
        flat(x.swapaxes(1, 2))[:, ::-1],
    ],
    "unidi": lambda x: [flat(x)] * 4,
    "bidi": lambda x: [flat(x)] * 2 + [flat(x)[:, ::-1]] * 2,
    "rot90": lambda x: [flat(np.rot90(x, turns, axes=(1, 2))) for turns in range(4)],
}


@pytest.mark.parametrize("order", ROUTES)
def test_cross_scan_reads_the_map_as_defined(order):
    x = draw(2, HEIGHT, WIDTH, CHANNELS)
    expected = np.stack(DEFINITIONS[order](np.asarray(x)), axis=2)
    np.testing.assert_array_equal(cross_scan(x, order), expected)


@pytest.mark.parametrize("order", ROUTES)
def test_cross_merge_is_the_transpose_of_cross_scan(order):
    x, y = draw(2, HEIGHT, WIDTH, CHANNELS), draw(2, HEIGHT * WIDTH, 4, CHANNELS, seed=1)
    scanned, merged = cross_scan(x, order), cross_merge(y, HEIGHT, WIDTH, order)
    np.testing.assert_allclose((scanned * y).sum(), (x * merged).sum(), rtol=1e-5)
    (pulled_back,) = jax.vjp(lambda x: cross_scan(x, order), x)[1](y)
    np.testing.assert_allclose(pulled_back, merged, rtol=1e-5, atol=1e-6)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match=r"unknown scan order 'zigzag'.*Accepted: cross2d"):
        cross_scan(draw(1, 2, 2, 1), "zigzag")


def weights(states=3, rank=2) -> dict[str, Any]:
    return {
        "x_proj": draw(4, rank + 2 * states, CHANNELS, seed=2),
        "dt_proj": draw(4, CHANNELS, rank, seed=3),
        "dt_bias": draw(4, CHANNELS, seed=4),
        "A_logs": draw(4, CHANNELS, states, seed=5),
        "D": draw(4, CHANNELS, seed=6),
    }


def spelled_out(routes, x_proj, dt_proj, dt_bias, A_logs, D):
    """Project and scan K sequences, each in its own reading direction."""
    rank, states = dt_proj.shape[-1], A_logs.shape[-1]
    projected = jnp.einsum("blkc,kec->blke", routes, x_proj)
    dt, b, c = jnp.split(projected, (rank, rank + states), axis=-1)
    delta = jnp.einsum("blkr,kcr->blkc", dt, dt_proj)
    return selective_scan(
        routes, delta, -jnp.exp(A_logs), b, c, D, dt_bias, implementation="reference"
    )


@pytest.mark.parametrize("order", ROUTES)
def test_the_2d_scan_equals_scanning_every_route_and_merging(order):
    x = draw(2, HEIGHT, WIDTH, CHANNELS)
    expected = cross_merge(spelled_out(cross_scan(x, order), **weights()), HEIGHT, WIDTH, order)
    actual = selective_scan_2d(x, **weights(), order=order)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_cascaded_scan_runs_along_rows_then_columns():
    def standardise(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def both_ways(sequences, part):  # (B, L, C) -> (B, L, C)
        routes = jnp.stack([sequences, sequences[:, ::-1]], axis=2)
        y = spelled_out(routes, **{name: w[part] for name, w in weights().items()})
        return y.sum(axis=2)  # the second pass stays in its reading order, as in the original

    x = draw(2, HEIGHT, WIDTH, CHANNELS)
    rows = jax.vmap(lambda row: both_ways(row, slice(0, 2)), 1, 1)(standardise(x))
    expected = jax.vmap(lambda column: both_ways(column, slice(2, 4)), 2, 2)(standardise(rows))
    actual = selective_scan_2d(x, **weights(), order="cascade2d")
    # What the second pass adds up are sums as large as the largest entry.
    tolerance = 5e-6 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 16, 37])
def test_the_mamba2_form_equals_the_scan_with_one_decay_a_head(length, reverse):
    routes, heads, width, states = 2, 3, 4, 5
    x = draw(2, length, routes, heads, width)
    delta = draw(2, length, routes, heads, seed=1)
    A = -jnp.exp(draw(routes, heads, seed=2))
    b, c = draw(2, length, routes, states, seed=3), draw(2, length, routes, states, seed=4)
    D, bias = draw(routes, heads, width, seed=5), draw(routes, heads, seed=6)

    def by_heads(x, delta, A, b, c, D, bias):
        return ssd(x, delta, A, b, c, D, bias, reverse=reverse, chunk=16)

    def by_channels(x, delta, A, b, c, D, bias):
        def spread(a):  # one value a head -> one a channel
            return jnp.repeat(a, width, axis=-1)

        y = selective_scan(
            x.reshape(*x.shape[:3], -1),
            spread(delta),
            jnp.broadcast_to(spread(A)[..., None], (routes, heads * width, states)),
            b,
            c,
            D.reshape(routes, -1),
            spread(bias),
            reverse=reverse,
            implementation="reference",
        )
        return y.reshape(x.shape)

    probe = draw(*x.shape, seed=7)
    arguments = (x, delta, A, b, c, D, bias)
    np.testing.assert_allclose(
        jax.jit(by_heads)(*arguments), by_channels(*arguments), rtol=1e-4, atol=1e-5
    )
    actual, expected = (
        jax.jit(jax.grad(lambda *a, f=f: (f(*a) * probe).sum(), argnums=range(7)))(*arguments)
        for f in (by_heads, by_channels)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)

"""The selective scan as one Mosaic kernel for TPU, and another for its gradient.

A register holds 8 x 128 numbers: rows are (batch element, route) pairs, lanes are channels. The
grid's last axis runs over the chunks of a sequence one after another, with the state in VMEM all
the way, so u, delta, B, C and y cross HBM once each and nothing else does. The gradient follows
`vmamba_jax.ops._chunked`: it keeps the state entering each chunk and visits the chunks backwards.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vmamba_jax.ops._chunked import chunk_length
from vmamba_jax.ops._discretise import softplus_and_slope
from vmamba_jax.typing import Array, Float

ROWS = 8  # sublanes of a register
STATES = 2**19  # numbers of scratch for one chunk's states: 2 MB of VMEM


class _Static(NamedTuple):
    delta_softplus: bool
    reverse: bool
    interpret: bool
    steps: int  # of a chunk
    lanes: int  # channels of a block


def selective_scan(
    u: Float[Array, "B L K C"],
    delta: Float[Array, "B L K C"],
    A: Float[Array, "K C N"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K C"] | None,
    delta_bias: Float[Array, "K C"] | None,
    delta_softplus: bool,
    reverse: bool,
    interpret: bool = False,
) -> Float[Array, "B L K C"]:
    """See `vmamba_jax.ops.selective_scan`; `interpret` runs the kernels without a TPU, slowly.

    Raises:
        NotImplementedError: for routes that don't tile a register's 8 rows.
    """
    batch, length, routes, channels = u.shape
    if ROWS % routes:
        raise NotImplementedError(f"{routes} routes do not divide {ROWS} rows")
    together = ROWS // routes  # batch elements that share a register's rows
    lanes = next((c for c in (512, 384, 256, 128) if channels % c == 0), channels)
    steps = chunk_length(length, min(64, max(8, STATES // (A.shape[-1] * ROWS * lanes))))
    static = _Static(delta_softplus, reverse, interpret, steps, lanes)

    def rows(a: Array) -> Array:  # (B, L, K, X) -> (L, B K, X), padded to whole blocks
        after = (0, -length % steps)
        pads = ((0, -batch % together), after[::-1] if reverse else after, (0, 0), (0, 0))
        a = jnp.pad(a, pads).swapaxes(0, 1)
        return a.reshape(a.shape[0], -1, a.shape[-1])

    def tiled(a: Array | None) -> Array:  # (..., K, C) -> (..., 8, C) float32
        a = jnp.zeros((routes, channels)) if a is None else a.astype(jnp.float32)
        return jnp.concatenate([a] * together, axis=-2)

    y = _scan(
        rows(u),
        rows(delta),
        rows(B),
        rows(C),
        tiled(jnp.moveaxis(A, -1, 0)),
        tiled(D),
        tiled(delta_bias),
        static,
    )
    y = y[-length:] if reverse else y[:length]
    return y.reshape(length, -1, routes, channels).swapaxes(0, 1)[:batch]


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(u, delta, b, c, a, skip, bias, static: _Static) -> Float[Array, "L J C"]:
    return _forward(u, delta, b, c, a, skip, bias, static, keep=False)[0]


def _forward(u, delta, b, c, a, skip, bias, static: _Static, keep: bool = True):
    at = _Blocks(u.shape, a.shape[0], static, backwards=static.reverse)
    outputs = [at.wide(u.dtype)] + [at.entering()] * keep
    y, *entering = pl.pallas_call(
        partial(_forward_kernel, static=static),
        grid=at.grid,
        in_specs=[at.wide_spec, at.wide_spec, at.narrow_spec, at.narrow_spec, *at.weight_specs],
        out_specs=[at.wide_spec] + [at.entering_spec] * keep,
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(at.state, jnp.float32)],
        compiler_params=_SEQUENTIAL,
        interpret=static.interpret,
        name="selective_scan",
    )(u, delta, b, c, a, skip, bias)
    return y, (u, delta, b, c, a, skip, bias, *entering)


def _backward(static: _Static, residuals, dy):
    u, delta, b, c, a, skip, bias, entering = residuals
    at = _Blocks(u.shape, a.shape[0], static, backwards=not static.reverse)
    du, ddelta, db, dc, *weights = pl.pallas_call(
        partial(_backward_kernel, static=static),
        grid=at.grid,
        in_specs=[
            at.wide_spec,
            at.wide_spec,
            at.narrow_spec,
            at.narrow_spec,
            *at.weight_specs,
            at.entering_spec,
            at.wide_spec,
        ],
        out_specs=[at.wide_spec, at.wide_spec, at.partial_spec, at.partial_spec, *at.sum_specs],
        out_shape=[at.wide(u.dtype), at.wide(delta.dtype), at.partial(), at.partial(), *at.sums()],
        scratch_shapes=[
            pltpu.VMEM(at.state, jnp.float32),
            pltpu.VMEM((static.steps, *at.state), jnp.float32),
        ],
        compiler_params=_SEQUENTIAL,
        interpret=static.interpret,
        name="selective_scan_gradient",
    )(u, delta, b, c, a, skip, bias, entering, dy)
    db, dc = (d.sum(axis=0).astype(of.dtype) for d, of in ((db, b), (dc, c)))
    return du, ddelta, db, dc, *(w.sum(axis=0) for w in weights)


_scan.defvjp(_forward, _backward)

_SEQUENTIAL = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


class _Blocks:
    """Shapes and blocks; the grid is (rows, channels, chunks), chunks last and in order."""

    def __init__(self, shape: tuple[int, ...], states: int, static: _Static, backwards: bool):
        self.length, self.rows, self.channels = shape
        self.states, self.steps, self.lanes = states, static.steps, static.lanes
        chunks = self.length // self.steps
        self.grid = (self.rows // ROWS, self.channels // self.lanes, chunks)
        self.state = (states, ROWS, self.lanes)

        def chunk(z: Any) -> Any:
            return chunks - 1 - z if backwards else z

        block = pl.BlockSpec
        lanes, steps = self.lanes, self.steps
        self.wide_spec = block((steps, ROWS, lanes), lambda r, c, z: (chunk(z), r, c))
        self.narrow_spec = block((steps, ROWS, states), lambda r, c, z: (chunk(z), r, 0))
        self.weight_specs = [
            block((states, ROWS, lanes), lambda r, c, z: (0, 0, c)),
            *[block((ROWS, lanes), lambda r, c, z: (0, c))] * 2,
        ]
        self.entering_spec = block((None, states, ROWS, lanes), lambda r, c, z: (chunk(z), 0, r, c))
        # One part of dB and dC a block of channels, of the others a block of rows: added outside.
        self.partial_spec = block((None, steps, ROWS, states), lambda r, c, z: (c, chunk(z), r, 0))
        self.sum_specs = [
            block((None, states, ROWS, lanes), lambda r, c, z: (r, 0, 0, c)),
            *[block((None, ROWS, lanes), lambda r, c, z: (r, 0, c))] * 2,
        ]

    def wide(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.length, self.rows, self.channels), dtype)

    def entering(self) -> jax.ShapeDtypeStruct:
        return _float32(self.grid[2], self.states, self.rows, self.channels)

    def partial(self) -> jax.ShapeDtypeStruct:
        return _float32(self.grid[1], self.length, self.rows, self.states)

    def sums(self) -> list[jax.ShapeDtypeStruct]:
        weight = _float32(self.grid[0], ROWS, self.channels)
        return [_float32(self.grid[0], self.states, ROWS, self.channels), weight, weight]


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward_kernel(u, delta, b, c, a, skip, bias, y, *entering_and_h, static: _Static):
    *entering, h = entering_and_h

    @pl.when(pl.program_id(2) == 0)
    def _():
        h[...] = jnp.zeros_like(h)

    for kept in entering:
        kept[...] = h[...]

    def step(i, _):
        t = static.steps - 1 - i if static.reverse else i
        u_t, size, _ = _at(t, u, delta, bias, static)
        b_t, c_t = (x[t].astype(jnp.float32) for x in (b, c))
        y_t = skip[...] * u_t
        for n in range(h.shape[0]):
            state = jnp.exp(size * a[n]) * h[n] + size * u_t * b_t[:, n : n + 1]
            h[n] = state
            y_t += state * c_t[:, n : n + 1]
        y[t] = y_t.astype(y.dtype)
        return 0

    jax.lax.fori_loop(0, static.steps, step, 0)


def _backward_kernel(
    u, delta, b, c, a, skip, bias, entering, dy,
    du, ddelta, db, dc, da, dskip, dbias,
    after, before, *, static: _Static,
):  # fmt: skip
    """`before` holds the chunk's states; `after` the gradient arriving from later chunks."""
    states = range(a.shape[0])

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (after, da, dskip, dbias):
            ref[...] = jnp.zeros_like(ref)

    def recompute(i, _):
        t = static.steps - 1 - i if static.reverse else i
        previous = t + 1 if static.reverse else t - 1
        u_t, size, _ = _at(previous, u, delta, bias, static)
        b_t = b[previous].astype(jnp.float32)
        for n in states:
            decay = jnp.exp(size * a[n])
            before[t, n] = decay * before[previous, n] + size * u_t * b_t[:, n : n + 1]
        return 0

    before[static.steps - 1 if static.reverse else 0] = entering[...]
    jax.lax.fori_loop(1, static.steps, recompute, 0)

    def retreat(i, _):
        t = i if static.reverse else static.steps - 1 - i
        u_t, size, slope = _at(t, u, delta, bias, static)
        b_t, c_t, dy_t = (x[t].astype(jnp.float32) for x in (b, c, dy))
        column = jax.lax.broadcasted_iota(jnp.int32, b_t.shape, 1)
        db_t = dc_t = jnp.zeros_like(b_t)
        ddrive = dsize = jnp.zeros_like(u_t)
        for n in states:
            decay = jnp.exp(size * a[n])
            state = decay * before[t, n] + size * u_t * b_t[:, n : n + 1]
            dstate = dy_t * c_t[:, n : n + 1] + after[n]
            through = decay * dstate
            after[n] = through
            dc_n = (dy_t * state).sum(axis=1, keepdims=True)
            db_n = (dstate * size * u_t).sum(axis=1, keepdims=True)
            dc_t += jnp.where(column == n, dc_n, 0.0)
            db_t += jnp.where(column == n, db_n, 0.0)
            ddrive += dstate * b_t[:, n : n + 1]
            ddecay = through * before[t, n]
            dsize += ddecay * a[n]
            da[n] += ddecay * size
        ddelta_t = slope * (ddrive * u_t + dsize)
        du[t] = (ddrive * size + skip[...] * dy_t).astype(du.dtype)
        ddelta[t] = ddelta_t.astype(ddelta.dtype)
        db[t] = db_t
        dc[t] = dc_t
        dskip[...] += dy_t * u_t
        dbias[...] += ddelta_t
        return 0

    jax.lax.fori_loop(0, static.steps, retreat, 0)


def _at(t, u, delta, bias, static: _Static) -> tuple[Array, Array, Array]:
    """u, the step size and its slope at one step."""
    size = delta[t].astype(jnp.float32) + bias[...]
    slope = jnp.ones_like(size)
    if static.delta_softplus:
        size, slope = softplus_and_slope(size)
    return u[t].astype(jnp.float32), size, slope

"""The selective scan as one Mosaic kernel for TPU, and another for its gradient.

A register holds 8 x 128 numbers: rows are (batch element, route) pairs, lanes are channels. The
grid's last axis runs over the chunks of a sequence one after another, with the state in VMEM all
the way, so u, delta, B, C and y cross HBM once each and nothing else does. The gradient follows
`vmamba_jax.ops._chunked`: it keeps the state entering each chunk and visits the chunks backwards.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.export import is_symbolic_dim
from jax.sharding import AxisType, PartitionSpec

from vmamba_jax.ops import _reference
from vmamba_jax.ops._alike import alike
from vmamba_jax.ops._discretise import lift, softplus_and_slope
from vmamba_jax.ops._parts import chunk_length
from vmamba_jax.ops.residuals import keep
from vmamba_jax.typing import Array, Float

ROWS = 8  # sublanes of a register
STATES = 2**19  # numbers of scratch for one chunk's states: 2 MB of VMEM


class _Static(NamedTuple):
    delta_softplus: bool
    reverse: bool
    interpret: bool


def selective_scan(
    u: Float[Array, "B L K C"],
    delta: Float[Array, "B L K C_or_R"],
    A: Float[Array, "K C N"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K C"] | None,
    delta_bias: Float[Array, "K C"] | None,
    delta_proj: Float[Array, "K C R"] | None,
    delta_softplus: bool,
    reverse: bool,
    interpret: bool = False,
) -> Float[Array, "B L K C"]:
    """See `vmamba_jax.ops.selective_scan`; `interpret` runs the kernels without a TPU, slowly.

    Under `jax.set_mesh`, each device scans its part of the batch, split over all Auto axes of the
    mesh.

    Raises:
        NotImplementedError: for routes that don't tile a register's 8 rows, and for sizes that
            are symbols: a kernel is built for one size.
    """
    routes = u.shape[2]
    if any(map(is_symbolic_dim, u.shape)):
        raise NotImplementedError(f"a kernel is built for one size, and u is {u.shape}")
    if ROWS % routes:
        raise NotImplementedError(f"{routes} routes do not divide a register's {ROWS} rows")

    def wide(a: Array | None) -> Array:
        return jnp.zeros(u.shape[2:]) if a is None else a.astype(jnp.float32)

    static = _Static(delta_softplus, reverse, interpret)
    weights = (jnp.moveaxis(wide(A), -1, 0), wide(D), wide(delta_bias))
    return _scan(*alike((u, lift(delta, delta_proj), B, C, *weights)), static)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(u, delta, b, c, a, skip, bias, static: _Static) -> Float[Array, "B L K C"]:
    run = _over_batch(partial(_run_forward, static=static, states=False), u.shape[0], "b l k c")
    return run(u, delta, b, c, a, skip, bias)


def _forward(u, delta, b, c, a, skip, bias, static: _Static):
    arguments = (u, delta, b, c, a, skip, bias)
    y, entering = _with_states(arguments, static)
    return y, (arguments, keep(entering))


def _backward(static: _Static, residuals, dy):
    return _gradient(*residuals, dy, static)


# A kernel has no derivative. Those of the two that make a gradient are the reference's: second
# derivatives are right, if dear; and on every platform JAX asks for them, whichever runs.
@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _with_states(arguments, static: _Static):
    run = partial(_run_forward, static=static, states=True)
    batch = arguments[0].shape[0]
    return _over_batch(run, batch, "b l k c, b z n k c")(*arguments)


@_with_states.defjvp
def _with_states_jvp(static: _Static, primals, tangents):
    _, dy = jax.jvp(partial(_reference_scan, static=static), primals, tangents)
    y, entering = _with_states(*primals, static)
    # A gradient depends on the states by way of the arguments, and says so itself.
    return (y, entering), (dy, jnp.zeros_like(entering))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _gradient(arguments, entering, dy, static: _Static):
    per_step = "b l k c, b l k c, b l k n, b l k n"
    results = per_step + ", b n k c, b k c, b k c"
    run = _over_batch(partial(_run_backward, static=static), dy.shape[0], results, more=True)
    *gradients, da, dskip, dbias = run(*arguments, entering, dy)
    return *gradients, da.sum(axis=0), dskip.sum(axis=0), dbias.sum(axis=0)


@_gradient.defjvp
def _gradient_jvp(static: _Static, primals, tangents):
    def gradient(arguments, dy):
        return jax.vjp(partial(_reference_scan, static=static), arguments)[1](dy)[0]

    (arguments, entering, dy), (darguments, _, ddy) = primals, tangents
    _, change = jax.jvp(gradient, (arguments, dy), (darguments, ddy))
    return _gradient(arguments, entering, dy, static), change


def _reference_scan(arguments, static: _Static) -> Float[Array, "B L K C"]:
    u, delta, b, c, a, skip, bias = arguments
    A = jnp.moveaxis(a, 0, -1)
    return _reference.selective_scan(
        u, delta, A, b, c, skip, bias, None, static.delta_softplus, static.reverse
    )


_scan.defvjp(_forward, _backward)


def _over_batch(function: Callable[..., Any], batch: int, results: str, more: bool = False):
    """Splits the batch over the mesh in context: XLA can't look into a kernel to do it.

    A batch that the devices do not divide, such as the one image of an initialisation, is scanned
    whole by each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Auto)
    if not axes:
        return function
    divides = batch % math.prod(mesh.shape[name] for name in axes) == 0
    split = PartitionSpec(axes) if divides else PartitionSpec()
    arguments = "b l k c, b l k c, b l k n, b l k n, n k c, k c, k c"
    arguments += ", b z n k c, b l k c" * more

    def specs(of: str) -> tuple[PartitionSpec, ...]:
        return tuple(split if "b" in axes else PartitionSpec() for axes in of.split(","))

    out = specs(results)
    return jax.shard_map(
        function,
        in_specs=specs(arguments),
        out_specs=out if "," in results else out[0],  # pyright: ignore[reportGeneralTypeIssues]
        check_vma=False,
    )


def _run_forward(u, delta, b, c, a, skip, bias, *, static: _Static, states: bool):
    at = _Blocks(u, a.shape[0], static, backwards=static.reverse)
    y, *entering = pl.pallas_call(
        partial(_forward_kernel, static=static),
        grid=at.grid,
        in_specs=[at.wide_spec, at.wide_spec, at.narrow_spec, at.narrow_spec, *at.weight_specs],
        out_specs=[at.wide_spec] + [at.entering_spec] * states,
        out_shape=[at.wide(u.dtype)] + [at.entering()] * states,
        scratch_shapes=[pltpu.VMEM(at.state, jnp.float32)],
        compiler_params=_SEQUENTIAL,
        interpret=static.interpret,
        name="selective_scan",
    )(*map(at.rows, (u, delta, b, c)), *map(at.tiled, (a, skip, bias)))
    y = at.positions(y)
    return (y, at.routes(entering[0])) if states else y


def _run_backward(u, delta, b, c, a, skip, bias, entering, dy, *, static: _Static):
    at = _Blocks(u, a.shape[0], static, backwards=not static.reverse)
    du, ddelta, db, dc, da, dskip, dbias = pl.pallas_call(
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
            pltpu.VMEM((at.steps, *at.state), jnp.float32),
        ],
        compiler_params=_SEQUENTIAL,
        interpret=static.interpret,
        name="selective_scan_gradient",
    )(
        *map(at.rows, (u, delta, b, c)),
        *map(at.tiled, (a, skip, bias)),
        at.rows_of_routes(entering),
        at.rows(dy),
    )
    db, dc = (at.positions(d.sum(axis=0)).astype(b.dtype) for d in (db, dc))
    per_element = (at.routes(w) for w in (da, dskip, dbias))
    return at.positions(du), at.positions(ddelta), db, dc, *per_element


_SEQUENTIAL = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


class _Blocks:
    """Shapes and blocks; the grid is (rows, channels, chunks), chunks last and in order."""

    def __init__(self, u: Array, states: int, static: _Static, backwards: bool):
        self.batch, self.steps_in_all, self.route_count, self.channels = u.shape
        # Inside `jax.shard_map` a kernel must say that results differ between devices as `u` does.
        self.varying = jax.typeof(u).manual_axis_type
        self.together = ROWS // self.route_count  # batch elements that share a register's rows
        self.reverse = static.reverse
        self.states = states
        divisors = (c for c in (512, 384, 256, 128) if self.channels % c == 0)
        self.lanes = next(divisors, self.channels)
        longest = min(64, max(ROWS, STATES // (states * ROWS * self.lanes)))
        self.steps = chunk_length(self.steps_in_all, longest)
        chunks = -(-self.steps_in_all // self.steps)
        self.length = chunks * self.steps
        self.row_count = -(-self.batch // self.together) * ROWS
        self.grid = (self.row_count // ROWS, self.channels // self.lanes, chunks)
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
        # dB and dC come in one part for each block of channels, to be added outside.
        self.partial_spec = block((None, steps, ROWS, states), lambda r, c, z: (c, chunk(z), r, 0))
        self.sum_specs = [
            block((states, ROWS, lanes), lambda r, c, z: (0, r, c)),
            *[block((ROWS, lanes), lambda r, c, z: (r, c))] * 2,
        ]

    def rows(self, a: Array) -> Array:
        """``(B, L, K, X) -> (L, B K, X)``, padded to whole chunks and registers."""
        after = (0, self.length - self.steps_in_all)
        more = self.row_count // self.route_count - self.batch
        # The padding is scanned last.
        pads = ((0, more), after[::-1] if self.reverse else after, (0, 0), (0, 0))
        return jnp.pad(a, pads).swapaxes(0, 1).reshape(self.length, self.row_count, a.shape[-1])

    def positions(self, a: Array) -> Array:
        """Undoes `rows`."""
        a = a[-self.steps_in_all :] if self.reverse else a[: self.steps_in_all]
        a = a.reshape(self.steps_in_all, -1, self.route_count, a.shape[-1])
        return a.swapaxes(0, 1)[: self.batch]

    def routes(self, a: Array) -> Array:
        """``(..., B K, C) -> (B, ..., K, C)``."""
        a = a.reshape(*a.shape[:-2], -1, self.route_count, self.channels)
        return jnp.moveaxis(a, -3, 0)[: self.batch]

    def rows_of_routes(self, a: Array) -> Array:
        """Undoes `routes`."""
        more = self.row_count // self.route_count - self.batch
        a = jnp.moveaxis(jnp.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1)), 0, -3)
        return a.reshape(*a.shape[:-3], self.row_count, self.channels)

    def tiled(self, a: Array) -> Array:
        """``(..., K, C) -> (..., 8, C)``."""
        return jnp.concatenate([a] * self.together, axis=-2)

    def wide(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return self._array(self.length, self.row_count, self.channels, dtype=dtype)

    def entering(self) -> jax.ShapeDtypeStruct:
        return self._array(self.grid[2], self.states, self.row_count, self.channels)

    def partial(self) -> jax.ShapeDtypeStruct:
        return self._array(self.grid[1], self.length, self.row_count, self.states)

    def sums(self) -> list[jax.ShapeDtypeStruct]:
        weight = self._array(self.row_count, self.channels)
        return [self._array(self.states, self.row_count, self.channels), weight, weight]

    def _array(self, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varying)


def _forward_kernel(u, delta, b, c, a, skip, bias, y, *entering_and_h, static: _Static):
    *entering, h = entering_and_h
    steps = u.shape[0]

    @pl.when(pl.program_id(2) == 0)
    def _():
        h[...] = jnp.zeros_like(h)

    for kept in entering:
        kept[...] = h[...]

    def step(i, _):
        t = steps - 1 - i if static.reverse else i
        u_t, size, _ = _at(t, u, delta, bias, static)
        b_t, c_t = (x[t].astype(jnp.float32) for x in (b, c))
        y_t = skip[...] * u_t
        for n in range(h.shape[0]):
            state = jnp.exp(size * a[n]) * h[n] + size * u_t * b_t[:, n : n + 1]
            h[n] = state
            y_t += state * c_t[:, n : n + 1]
        y[t] = y_t.astype(y.dtype)
        return 0

    jax.lax.fori_loop(0, steps, step, 0)


def _backward_kernel(
    u, delta, b, c, a, skip, bias, entering, dy,
    du, ddelta, db, dc, da, dskip, dbias,
    after, before, *, static: _Static,
):  # fmt: skip
    """`before` holds the chunk's states; `after` the gradient arriving from later chunks."""
    steps, states = u.shape[0], range(a.shape[0])

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (after, da, dskip, dbias):
            ref[...] = jnp.zeros_like(ref)

    def recompute(i, _):
        t = steps - 1 - i if static.reverse else i
        previous = t + 1 if static.reverse else t - 1
        u_t, size, _ = _at(previous, u, delta, bias, static)
        b_t = b[previous].astype(jnp.float32)
        for n in states:
            decay = jnp.exp(size * a[n])
            before[t, n] = decay * before[previous, n] + size * u_t * b_t[:, n : n + 1]
        return 0

    before[steps - 1 if static.reverse else 0] = entering[...]
    jax.lax.fori_loop(1, steps, recompute, 0)

    def retreat(i, _):
        t = i if static.reverse else steps - 1 - i
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

    jax.lax.fori_loop(0, steps, retreat, 0)


def _at(t, u, delta, bias, static: _Static) -> tuple[Array, Array, Array]:
    """u, the step size and its slope at one step."""
    size = delta[t].astype(jnp.float32) + bias[...]
    slope = jnp.ones_like(size)
    if static.delta_softplus:
        size, slope = softplus_and_slope(size)
    return u[t].astype(jnp.float32), size, slope

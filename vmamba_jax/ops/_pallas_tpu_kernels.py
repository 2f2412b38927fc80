"""The TPU's kernels: a scan of all routes of a map, and its gradient.

Both visit the map in VMEM by lists of positions, route after route. Per chunk of steps they lift
delta with a product; the steps then go one by one, each on a register's rows of the batch. The
gradient first runs along the route to get the state entering each chunk, then visits the chunks
backwards, recomputes the states of a chunk, and retreats through them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vmamba_jax.ops._discretise import softplus_and_slope
from vmamba_jax.ops._pallas_tpu_blocks import Blocks, Plan, Scan, Sizes
from vmamba_jax.typing import Array


def forward(
    u: Array, z: Array, weights: Array, lift: Array, *, plan: Plan, scan: Scan, states: bool
) -> tuple[Array, ...]:
    """The routes' sum (B, L, C), and with `states` the states entering each block (L', N, B, C).

    The arrays are those of `_pallas_tpu`.
    """
    sizes = Sizes.of(u, z, weights, lift)
    at = Blocks(sizes, plan, scan, u, backwards=False)
    y, *entering = pl.pallas_call(
        partial(_forward_kernel, sizes=sizes, plan=plan, scan=scan),
        grid=at.grid,
        in_specs=[at.at_spec, at.wide_spec, at.narrow_spec, at.weights_spec, at.lift_spec],
        out_specs=[at.wide_spec] + [at.entering_spec] * states,
        out_shape=[at.wide(jnp.float32)] + [at.entering()] * states,
        scratch_shapes=[at.state, at.of_chunk(at.width), at.of_chunk(plan.lanes)],
        compiler_params=_parameters(plan),
        interpret=scan.interpret,
        name="selective_scan",
    )(at.positions, at.lay(u), at.pack(z), weights, lift)
    return (at.unlay(y), *(e[:, :, : sizes.batch] for e in entering))


def backward(
    u: Array, z: Array, weights: Array, lift: Array, dy: Array, *entering: Array,
    plan: Plan, scan: Scan,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """The gradients of u, z, weights and lift; those of the last two by part of the batch."""
    sizes = Sizes.of(u, z, weights, lift)
    at = Blocks(sizes, plan, scan, u, backwards=True)
    lanes, rows, parts = plan.lanes, plan.rows, at.grid[2]
    more = at.batch - sizes.batch
    du, dz, dweights, dlift = pl.pallas_call(
        partial(_backward_kernel, sizes=sizes, plan=plan, scan=scan),
        grid=at.grid,
        in_specs=[
            at.at_spec,
            *[at.wide_spec, at.narrow_spec, at.weights_spec, at.lift_spec, at.wide_spec],
            *[at.entering_spec] * len(entering),
        ],
        out_specs=[at.wide_spec, at.narrow_spec, *at.sum_specs],
        out_shape=[at.wide(u.dtype), at.narrow(at.dz_dtype(z)), *at.sums],
        scratch_shapes=[
            at.state,
            pltpu.VMEM((-(-plan.block // plan.chunk), sizes.states, rows, lanes), jnp.float32),
            at.of_chunk(sizes.states, lanes),
            *[at.of_chunk(width) for width in (at.width, lanes, lanes, at.width)],
            pltpu.VMEM((sizes.states + 2, rows, lanes), jnp.float32),
            at.total(u.dtype),
        ],
        compiler_params=_parameters(plan),
        interpret=scan.interpret,
        name="selective_scan_gradient",
    )(
        at.positions,
        *(at.lay(u), at.pack(z), weights, lift, at.lay(dy)),
        *(jnp.pad(e, ((0, 0), (0, 0), (0, more), (0, 0))) for e in entering),
    )
    dweights, dlift = (
        # (parts of the batch, K, parts of C, X, lanes) -> (parts of the batch, K, X, C)
        d.swapaxes(2, 3).reshape(*d.shape[:2], d.shape[3], parts * lanes)
        for d in (dweights, dlift)
    )
    return at.unlay(du), at.unpack(dz, z.shape[2]).astype(z.dtype), dweights, dlift


def _parameters(plan: Plan) -> pltpu.CompilerParams:
    order = ("parallel", "arbitrary", "arbitrary", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=plan.vmem)


def _forward_kernel(at, u, z, weights, lift, y, *rest, sizes: Sizes, plan: Plan, scan: Scan):
    *entering, h, z_chunk, delta = rest
    block, part, route = (pl.program_id(axis) for axis in (1, 2, 3))
    h = h.at[part]

    @pl.when(block == 0)
    def _():
        h[...] = jnp.zeros_like(h)

    for kept in entering:
        kept[...] = h[...]

    def step(t, start):
        p = at[0, start + t]
        u_t, size, _ = _at(t, u[p], delta, scan)
        b, c = _read(z_chunk[t], sizes)
        *a, skip, _ = _rows(weights)
        y_t = skip * u_t
        for n in range(sizes.states):
            h[n] = jnp.exp(size * a[n]) * h[n] + size * u_t * b[n]
            y_t += h[n] * c[n]
        if sizes.routes > 1:
            y_t += jnp.where(route == 0, 0.0, y[p])
        y[p] = y_t
        return start

    def chunk(i, _):
        start, steps = _chunk(i, plan)
        _lift(start, steps, at, z, weights, lift, z_chunk, delta, route, sizes)
        jax.lax.fori_loop(0, steps, step, start)
        return 0

    jax.lax.fori_loop(0, -(-plan.block // plan.chunk), chunk, 0)


def _backward_kernel(at, u, z, weights, lift, dy, *rest, sizes: Sizes, plan: Plan, scan: Scan):
    """Writes the gradients of u, z and the weights.

    `starts` holds the state entering each chunk, `before` those before a chunk's steps, `after` the
    gradient arriving from later steps, and `total` du in float32 until all routes are added.
    """
    *entering, du, dz, dweights, dlift = rest[:-9]
    after, starts, before, z_chunk, delta, ddelta, dz_chunk, sums, total = rest[-9:]
    block, part, route = (pl.program_id(axis) for axis in (1, 2, 3))
    after, dweights, dlift = after.at[part], dweights.at[route, part], dlift.at[route, part]
    chunks, states = -(-plan.block // plan.chunk), range(sizes.states)

    @pl.when(block == 0)
    def _():
        for ref in (after, dweights, dlift):
            ref[...] = jnp.zeros_like(ref)

    @pl.when((part == 0) & (route == 0))
    def _():
        dz[...] = jnp.zeros_like(dz)

    def begin(i):
        start, steps = _chunk(i, plan)
        _lift(start, steps, at, z, weights, lift, z_chunk, delta, route, sizes)
        return start, steps

    def advance(t, start, state, new):
        """From the state before step t of a chunk to the one after it."""
        u_t, size, _ = _at(t, u[at[0, start + t]], delta, scan)
        b, _ = _read(z_chunk[t], sizes)
        a = _rows(weights)
        for n in states:
            new[n] = jnp.exp(size * a[n]) * state[n] + size * u_t * b[n]

    def enter(i, _):
        start, steps = begin(i)
        h = starts.at[i + 1]
        h[...] = starts[i]

        def step(t, _):
            advance(t, start, h, h)
            return 0

        jax.lax.fori_loop(0, steps, step, 0)
        return 0

    def retreat(t, start):
        p = at[0, start + t]
        u_t, size, slope = _at(t, u[p], delta, scan)
        b, c = _read(z_chunk[t], sizes)
        dy_t = dy[p]
        *a, skip, _ = _rows(weights)
        ddrive = dsize = dz_t = jnp.zeros((), jnp.float32)
        column = jax.lax.broadcasted_iota(jnp.int32, z_chunk.shape[1:], 1)
        for n in states:
            decay = jnp.exp(size * a[n])
            state = decay * before[t, n] + size * u_t * b[n]
            dstate = dy_t * c[n] + after[n]
            through = decay * dstate
            after[n] = through
            db_n = (dstate * size * u_t).sum(axis=1, keepdims=True)
            dc_n = (dy_t * state).sum(axis=1, keepdims=True)
            dz_t += jnp.where(column == sizes.rank + n, db_n, 0.0)
            dz_t += jnp.where(column == sizes.rank + sizes.states + n, dc_n, 0.0)
            ddrive += dstate * b[n]
            ddecay = through * before[t, n]
            dsize += ddecay * a[n]
            sums[n] += ddecay * size
        ddelta_t = slope * (ddrive * u_t + dsize)
        du_t = ddrive * size + skip * dy_t
        if sizes.routes > 1:
            so_far = total if du.dtype != jnp.float32 else du
            du_t += jnp.where(route == 0, 0.0, so_far[p])
            so_far[p] = du_t
        du[p] = du_t.astype(du.dtype)
        ddelta[t] = ddelta_t
        dz_chunk[t] = dz_t
        sums[sizes.states] += dy_t * u_t
        sums[sizes.states + 1] += ddelta_t

    def leave(i, _):
        i = chunks - 1 - i
        start, steps = begin(i)
        before[0] = starts[i]

        def step(t, _):
            advance(t - 1, start, before.at[t - 1], before.at[t])
            return 0

        def back(t, _):
            retreat(steps - 1 - t, start)
            return 0

        @pl.when(steps < plan.chunk)
        def _():
            ddelta[...] = jnp.zeros_like(ddelta)

        jax.lax.fori_loop(1, steps, step, 0)
        jax.lax.fori_loop(0, steps, back, 0)
        _lower(start, steps, at, dz, lift, dlift, z_chunk, ddelta, dz_chunk, route, sizes)
        return 0

    starts[0] = entering[0][...] if entering else jnp.zeros_like(starts[0])
    sums[...] = jnp.zeros_like(sums)
    jax.lax.fori_loop(0, chunks - 1, enter, 0)
    jax.lax.fori_loop(0, chunks, leave, 0)
    dweights[...] += sums[...].sum(axis=1)


def _chunk(i, plan: Plan):
    """The first step of a chunk and how many it has."""
    start = i * plan.chunk
    if plan.block % plan.chunk == 0:
        return start, plan.chunk
    return start, jnp.minimum(plan.chunk, plan.block - start)


def _at(t, u_t, delta, scan: Scan) -> tuple[Array, Array, Array]:
    """u, the step size and its slope at one step."""
    size = delta[t]
    slope = jnp.ones_like(size)
    if scan.delta_softplus:
        size, slope = softplus_and_slope(size)
    return u_t.astype(jnp.float32), size, slope


def _rows(weights) -> list[Array]:
    """A for each state, D and the bias."""
    return [weights[n : n + 1] for n in range(weights.shape[0])]


def _read(z_t, sizes: Sizes) -> tuple[list[Array], list[Array]]:
    """B and C of one step, a column for each state."""
    columns = [z_t[:, n : n + 1] for n in range(sizes.rank, sizes.projected)]
    return columns[: sizes.states], columns[sizes.states :]


def _lift(start, steps, at, z, weights, lift, z_chunk, delta, route, sizes: Sizes):
    """Gathers what a chunk's steps project to, and lifts delta to the channels."""
    width = z_chunk.shape[2]

    def gather(t, _):
        row, lane = _place(at[0, start + t], route, sizes)
        z_chunk[t] = _turn(z[row].astype(jnp.float32), -lane, sizes)[:, :width]
        return 0

    jax.lax.fori_loop(0, steps, gather, 0)
    lifted = _product(_flat(z_chunk[:, :, : sizes.rank]).astype(lift.dtype), lift[...], (1, 0))
    *_, bias = _rows(weights)
    delta[...] = (lifted + bias).reshape(delta.shape)


def _lower(start, steps, at, dz, lift, dlift, z_chunk, ddelta, dz_chunk, route, sizes: Sizes):
    """The gradients of what `_lift` did."""
    rank, wide = slice(sizes.rank), lift[...].astype(jnp.float32)
    flat = _flat(ddelta[...])
    dlift[...] += _product(_flat(z_chunk[:, :, rank]), flat, (0, 0))
    dz_chunk[:, :, rank] = _product(flat, wide, (1, 1)).reshape(*dz_chunk.shape[:2], -1)
    width, packed = dz_chunk.shape[2], dz.shape[2]

    def scatter(t, _):
        dz_t = dz_chunk[t]
        if packed > width:
            dz_t = jnp.pad(dz_t, ((0, 0), (0, packed - width)))
        row, lane = _place(at[0, start + t], route, sizes)
        dz[row] += _turn(dz_t, lane, sizes).astype(dz.dtype)
        return 0

    jax.lax.fori_loop(0, steps, scatter, 0)


def _place(p, route, sizes: Sizes):
    """In which row the numbers of a position and a route lie, and from which lane on."""
    bits, slot = sizes.together.bit_length() - 1, sizes.packed // sizes.together
    return p >> bits, (p & (sizes.together - 1)) * slot + route * sizes.projected


def _turn(a, by, sizes: Sizes):
    """Moves all lanes along."""
    if sizes.routes == sizes.together == 1:
        return a
    return pltpu.roll(a, jnp.where(by < 0, by + a.shape[1], by), 1)


def _flat(a):
    return a.reshape(-1, a.shape[-1])


def _product(a, b, axes: tuple[int, int]):
    """In float32; of bfloat16 numbers one pass of the matrix unit is exact."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())),
        precision=exact, preferred_element_type=jnp.float32,
    )  # fmt: skip

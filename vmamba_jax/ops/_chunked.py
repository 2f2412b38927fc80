"""The selective scan chunk by chunk, with a gradient that recomputes inside each chunk.

The step sizes of a chunk are computed at once, its states come from a linear recurrence, which
discretises as it goes, and the output is a contraction of the states. The gradient keeps the inputs
and the state entering each chunk; it visits the chunks in the opposite order, recomputes a chunk's
states from the one that entered it, and runs the adjoint recurrence, which is the same recurrence
in the opposite direction. Nothing of size (B, L, K, C, N) exists but for one chunk (Mamba's kernel
does the same: Gu and Dao, "Mamba", 2023, section 3.3.2).

A chunk is a block of some batch elements G and some steps T of theirs, in the order of the arrays
that it is cut out of: steps first, each step would lie side by side, but chunks and results would
be copied to be turned (on a CPU up to a sixth more time, forward and back).
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vmamba_jax.ops._alike import alike
from vmamba_jax.ops._discretise import sigmoid, softplus
from vmamba_jax.ops._exact import einsum
from vmamba_jax.ops._parts import chunk_length, largest_divisor
from vmamba_jax.ops.residuals import keep, together
from vmamba_jax.ops.wide import wide
from vmamba_jax.typing import Array, Float, Size

Coefficients = Callable[[tuple[Array, ...]], tuple[Array, Array]]
"""Of one step: its row of each array -> decay and drive (G, *K, N, C) of ``h -> decay h + drive``.

A function, so that one step after another needs them only as it gets there: writing them down for
a chunk and reading them again took half the time of the scan.
"""


class Plan(NamedTuple):
    """How an implementation computes what all of them share (hashable, static)."""

    recurrence: Callable[[Coefficients, tuple[Array, ...], Array, bool], Array]
    """(coefficients, arrays (G, T, ...), start, reverse) -> states (G, T + 1, ...): `start`, then
    the state after each step; in reverse from the last to the first."""
    block: Callable[[Size, int], tuple[Size, int]]
    """(batch, number of states of one batch element) -> G, a divisor of the batch, and the most
    steps T that a chunk may have."""


class _Weights(NamedTuple):
    """In a wide dtype, channels last: the longest axis is the contiguous one."""

    A: Float[Array, "*K N C"]
    D: Float[Array, "*K C"] | None
    bias: Float[Array, "*K C"] | None
    proj: Float[Array, "*K R C"] | None


def chunked_scan(
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
    plan: Plan,
) -> Float[Array, "B L K C"]:
    """See `vmamba_jax.ops.selective_scan`."""
    arrays, weights = alike(((u, delta, B, C), (A, D, delta_bias, delta_proj)))
    if u.shape[0] == 0:
        return jnp.zeros_like(u)
    if u.shape[2] > 1:
        return _scan(arrays, weights, delta_softplus, reverse, plan)
    # XLA for CPU copies an array that has an axis of length one to give that another place.
    arrays = tuple(a.squeeze(2) for a in arrays)
    weights = tuple(None if a is None else a.squeeze(0) for a in weights)
    return jnp.expand_dims(_scan(arrays, weights, delta_softplus, reverse, plan), 2)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _scan(arrays, weights, delta_softplus, reverse, plan) -> Float[Array, "B L *K C"]:
    """`arrays` are u, delta, B and C, (B, L, *K, ...); `weights` A, D, delta_bias, delta_proj."""
    return _forward(arrays, weights, delta_softplus, reverse, plan)[0]


def _forward(arrays, weights, delta_softplus, reverse, plan):
    dtype = wide(arrays[0].dtype)
    wide_weights = _channels_last(dtype, *weights)
    group, steps = _block(arrays[0], wide_weights, plan)

    def advance(carry: tuple[Array, tuple[()]], now: tuple[Array, ...]):
        entering, total = carry
        u, delta, B, C = (a.astype(dtype) for a in now)
        step, _ = _step_size(delta, wide_weights, delta_softplus)
        coefficients = partial(_coefficients, wide_weights.A)
        states = plan.recurrence(coefficients, (step, u, B), entering, reverse)
        _, states, leaving = _before_after_last(states, reverse)
        y = _over_states(states, C[..., None])
        if wide_weights.D is not None:
            y = y + wide_weights.D[None, None] * u
        return (leaving, total), (y.astype(now[0].dtype), entering[:, None])

    start = jnp.zeros_like(wide_weights.A, shape=(group, *wide_weights.A.shape))
    pad, unpad = _padding(arrays[0].shape[1], steps, reverse)
    (y, entering), _ = _over_chunks(advance, (start, ()), pad(*arrays), steps, reverse)
    return unpad(y), (arrays, weights, keep(entering))


def _backward(delta_softplus, reverse, plan, residuals, dy):
    arrays, weights, entering = residuals
    dtype = wide(dy.dtype)
    wide_weights = _channels_last(dtype, *weights)
    A, D, bias, proj = wide_weights
    group, steps = _block(dy, wide_weights, plan)

    def retreat(carry: tuple[Array, _Weights], now: tuple[Array, ...]):
        """`after` is the gradient of the state at the chunk's end, by way of later chunks."""
        after, total = carry
        *inputs, dy, entering = now
        # Each is read several times: XLA for CPU would cut it out anew in every operation.
        u, delta, B, C, dy = together(tuple(a.astype(dtype) for a in (*inputs, dy)))
        step, slope = _step_size(delta, wide_weights, delta_softplus)
        coefficients = partial(_coefficients, A)
        states = plan.recurrence(coefficients, (step, u, B), entering[:, 0], reverse)
        before, states, _ = _before_after_last(states, reverse)
        # dh[l] = C[l] dy[l] + decay[l + 1] dh[l + 1], written for decay * dh.
        coefficients = partial(_adjoint_coefficients, A)
        through = plan.recurrence(coefficients, (step, dy, C), after, not reverse)
        later, through, first = _before_after_last(through, not reverse)
        dstate = _outer(dy, C) + later
        ddrive = _over_states(dstate, B[..., None])  # by s * u
        ddecay = through * before  # by the exponent, s * A
        dstep = ddrive * u + _over_states(ddecay, A[None, None])
        # Two read it, the output and the bias: XLA for CPU would compute it in each.
        ddelta = dlifted = together(slope * dstep)
        du = ddrive * step
        if D is not None:
            du = du + D[None, None] * dy
        if proj is not None:
            ddelta = einsum("gt...c,...rc->gt...r", dlifted, proj)
        gradients = _Weights(
            A=_over_steps(ddecay * step[..., None, :]),
            D=None if D is None else _over_steps(dy * u),
            bias=None if bias is None else _over_steps(dlifted),
            proj=None if proj is None else einsum("gt...r,gt...c->...rc", delta, dlifted),
        )
        dB, dC = _over_channels(dstate, step * u), _over_channels(states, dy)
        per_step = tuple(
            d.astype(a.dtype) for d, a in zip((du, ddelta, dB, dC), inputs, strict=True)
        )
        return (first, jax.tree.map(jnp.add, total, gradients)), per_step

    start = jnp.zeros_like(A, shape=(group, *A.shape))
    total = jax.tree.map(jnp.zeros_like, wide_weights)
    pad, unpad = _padding(dy.shape[1], steps, reverse)
    chunked = (*pad(*arrays, dy), entering)
    per_step, total = _over_chunks(retreat, (start, total), chunked, steps, not reverse)
    dproj = None if total.proj is None else total.proj.mT
    dweights = (total.A.mT, total.D, total.bias, dproj)
    dweights = jax.tree.map(lambda d, a: d.astype(a.dtype), dweights, weights)
    return tuple(map(unpad, per_step)), dweights


_scan.defvjp(_forward, _backward)


def _block(like: Array, weights: _Weights, plan: Plan) -> tuple[Size, int]:
    batch, length = like.shape[:2]
    group, longest = plan.block(batch, weights.A.size)
    return group, chunk_length(length, longest)


def _channels_last(dtype: jnp.dtype, *weights: Array | None) -> _Weights:
    A, D, bias, proj = jax.tree.map(lambda a: a.astype(dtype), weights)
    return _Weights(A.mT, D, bias, None if proj is None else proj.mT)


def _step_size(delta: Array, weights: _Weights, delta_softplus: bool) -> tuple[Array, Array]:
    """The step size and its slope by delta, (G, T, *K, C)."""
    step = delta
    if weights.proj is not None:
        step = einsum("gt...r,...rc->gt...c", step, weights.proj)
    if weights.bias is not None:
        step = step + weights.bias[None, None]
    return (softplus(step), sigmoid(step)) if delta_softplus else (step, jnp.ones_like(step))


def _outer(a: Float[Array, "... C"], b: Float[Array, "... N"]) -> Float[Array, "... N C"]:
    return a[..., None, :] * b[..., None]


def _coefficients(
    A: Float[Array, "*K N C"], now: tuple[Array, ...]
) -> tuple[Float[Array, "G *K N C"], Float[Array, "G *K N C"]]:
    step, u, B = now
    return _decay(step, A), _outer(step * u, B)


def _adjoint_coefficients(
    A: Float[Array, "*K N C"], now: tuple[Array, ...]
) -> tuple[Float[Array, "G *K N C"], Float[Array, "G *K N C"]]:
    step, dy, C = now
    decay = _decay(step, A)
    return decay, decay * _outer(dy, C)


def _decay(step: Float[Array, "G *K C"], A: Float[Array, "*K N C"]) -> Float[Array, "G *K N C"]:
    return jnp.exp(step[..., None, :] * A[None])


def _before_after_last(
    states: Float[Array, "G T1 *K N C"], reverse: bool
) -> tuple[Float[Array, "G T *K N C"], Float[Array, "G T *K N C"], Float[Array, "G *K N C"]]:
    """The states before and after each step, and the last of them, which leaves the chunk."""
    if reverse:
        return states[:, 1:], states[:, :-1], states[:, 0]
    return states[:, :-1], states[:, 1:], states[:, -1]


def _over_states(
    a: Float[Array, "G T *K N C"], weight: Float[Array, "#G #T *K N #C"]
) -> Float[Array, "G T *K C"]:
    """Spelled out: XLA's CPU reduction over an axis within takes as long as the whole rest."""
    return reduce(add, (a[..., n, :] * weight[..., n, :] for n in range(a.shape[-2])))


# Other sums are products with ones: XLA's CPU reductions take up to 20 times as long.
PARTS = 8
"""Parts that are added up as they are computed, so that a product with ones has less to read."""


def _over_channels(
    a: Float[Array, "G T *K N C"], weight: Float[Array, "G T *K C"]
) -> Float[Array, "G T *K N"]:
    parts = _sum_of_parts(a * weight[..., None, :], axis=-1)
    return einsum("gt...c,c->gt...", parts, jnp.ones_like(parts, shape=parts.shape[-1:]))


def _over_steps(a: Float[Array, "G T ..."]) -> Float[Array, "..."]:
    parts = _sum_of_parts(a, axis=1)
    return einsum("gt,gt...->...", jnp.ones_like(parts, shape=parts.shape[:2]), parts)


def _sum_of_parts(a: Array, axis: int) -> Array:
    return reduce(add, jnp.split(a, largest_divisor(a.shape[axis], PARTS), axis))


def _over_chunks(
    advance: Callable[..., Any],
    carry: tuple[Float[Array, "G *K N C"], Any],
    arrays: tuple[Array, ...],
    steps: int,
    reverse: bool,
) -> tuple[tuple[Array, ...], Any]:
    """Chunk after chunk of each group of batch elements, cut out of the arrays where they lie.

    `jax.lax.scan` and `jax.vmap` would copy each array to bring the axis in front that is scanned.

    Args:
        advance: ``((state, total), chunks) -> ((state, total), chunks of the results)``; chunks
            are (G, T, ...).
        carry: the state that each group begins with, and the total to begin with.
        arrays: (B, L, ...); the first has `steps` positions in each chunk, the others any number.
        steps: steps of a chunk.
        reverse: whether the last chunk comes first.

    Returns:
        The results (B, L, ...) and the total.
    """
    start, _ = carry
    group = start.shape[0]
    batch, length = arrays[0].shape[:2]
    count = length // steps

    def corner(a: Array, i: Any, now: Any) -> tuple[Any, ...]:
        return (i * group, now * (a.shape[1] // count), *(0,) * (a.ndim - 2))

    def cut(a: Array, i: Any, now: Any) -> Array:
        size = (group, a.shape[1] // count, *a.shape[2:])
        return jax.lax.dynamic_slice(a, corner(a, i, now), size)

    def put(whole: Array, part: Array, i: Any, now: Any) -> Array:
        return jax.lax.dynamic_update_slice(whole, part, corner(whole, i, now))

    def body(turn: Array, loop: tuple[tuple[Array, Any], tuple[Array, ...]]):
        (state, total), results = loop
        i, now = turn // count, turn % count
        state = jnp.where(now == 0, start, state)
        now = count - 1 - now if reverse else now
        carry, parts = advance((state, total), tuple(cut(a, i, now) for a in arrays))
        return carry, tuple(put(w, p, i, now) for w, p in zip(results, parts, strict=True))

    parts = jax.eval_shape(lambda c: advance(c, tuple(cut(a, 0, 0) for a in arrays))[1], carry)
    results = tuple(
        jnp.zeros_like(start, p.dtype, shape=(batch, count * p.shape[1], *p.shape[2:]))
        for p in parts
    )
    (_, total), results = jax.lax.fori_loop(0, batch // group * count, body, (carry, results))
    return results, total


def _padding(length: Size, steps: int, reverse: bool):
    """Functions that fill arrays (B, L, ...) up to whole chunks, and undo it.

    Steps of size zero follow the sequence: they neither decay nor drive the state. Softplus would
    make them positive, but after the end that changes no output.
    """
    # Written so that, of a symbolic length, what is filled up is seen to be whole chunks.
    padding = -(-length // steps) * steps - length
    before_after = (padding, 0) if reverse else (0, padding)

    def pad(*arrays: Array) -> tuple[Array, ...]:
        if padding == 0:
            return arrays
        return tuple(jnp.pad(a, [(0, 0), before_after] + [(0, 0)] * (a.ndim - 2)) for a in arrays)

    def unpad(a: Array) -> Array:
        return a[:, padding:] if reverse else a[:, :length]

    return pad, unpad

"""The selective scan chunk by chunk, with a gradient that recomputes inside each chunk.

Every chunk is discretised at once, its states come from a linear recurrence, and the output is a
contraction of the states. The gradient keeps the inputs and the state entering each chunk; it
visits the chunks in the opposite order, recomputes a chunk's states from the one that entered it,
and runs the adjoint recurrence, which is the same recurrence in the opposite direction. Nothing
of size (B, L, K, C, N) exists but for one chunk (Mamba's kernel does the same: Gu and Dao,
"Mamba", 2023, section 3.3.2).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vmamba_jax.ops._discretise import softplus_and_slope
from vmamba_jax.typing import Array, Float


class Plan(NamedTuple):
    """How an implementation computes what all of them share (hashable, static)."""

    recurrence: Callable[..., Array]
    """(decay, drive (T, ...), start (...), reverse) -> the states (T, ...) after each step of
    ``h -> decay h + drive``."""
    over_batch: Callable[[Callable[..., Any]], Callable[..., Any]]
    """Lifts ``scan(*arrays (steps, ...), sequences=1) -> (results (steps, ...), totals)``, which
    takes sequences laid end to end, to arrays (B, L, ...), results (B, L, ...) and totals
    (any, ...) that are left to add up."""
    chunk: Callable[[int], int]
    """Number of states of one batch element -> the most steps a chunk may have."""


class _Weights(NamedTuple):
    A: Float[Array, "K N C"]  # channels last: the longest axis is the contiguous one
    D: Float[Array, "K C"] | None
    bias: Float[Array, "K C"] | None


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def chunked_scan(
    u: Float[Array, "B L K C"],
    delta: Float[Array, "B L K C"],
    A: Float[Array, "K C N"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K C"] | None,
    delta_bias: Float[Array, "K C"] | None,
    delta_softplus: bool,
    reverse: bool,
    plan: Plan,
) -> Float[Array, "B L K C"]:
    """See `vmamba_jax.ops.selective_scan`."""
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, plan)[0]


def _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, plan):
    weights = _wide(A, D, delta_bias)
    chunk = chunk_length(u.shape[1], plan.chunk(weights.A.size))

    def advance(carry: tuple[Array, tuple[()]], now: tuple[Array, ...]):
        h, total = carry
        wide = tuple(a.astype(jnp.float32) for a in now)
        u, _, _, C = wide
        _, _, decay, drive = _discretise(wide, weights, delta_softplus)
        states = plan.recurrence(decay, drive, h, reverse)
        y = _over_states(states, C)
        if weights.D is not None:
            y = y + weights.D[None] * u
        return (states[0 if reverse else -1], total), (y.astype(now[0].dtype), h[None])

    def scan(*inputs: Array, sequences: int):
        carry = (jnp.zeros_like(weights.A), ())
        # Delta, which nobody else may need, makes room for y.
        over = 1 if delta.dtype == u.dtype else None
        return _scan_chunks(advance, carry, inputs, chunk, reverse, sequences, over)

    pad, unpad = _padding(u.shape[1], chunk, reverse)
    (y, entering), _ = plan.over_batch(scan)(*pad(u, delta, B, C))
    return unpad(y), (u, delta, A, B, C, D, delta_bias, entering)


def _backward(delta_softplus, reverse, plan, residuals, dy):
    u, delta, A, B, C, D, delta_bias, entering = residuals
    weights = _wide(A, D, delta_bias)
    chunk = chunk_length(u.shape[1], plan.chunk(weights.A.size))

    def retreat(carry: tuple[Array, _Weights], now: tuple[Array, ...]):
        """`after` is the gradient of the state at the chunk's end, by way of later chunks."""
        after, total = carry
        *inputs, dy, entering = now
        entering = entering[0]
        wide = tuple(a.astype(jnp.float32) for a in inputs)
        u, _, B, C = wide
        dy = dy.astype(jnp.float32)
        step, slope, decay, drive = _discretise(wide, weights, delta_softplus)
        states = plan.recurrence(decay, drive, entering, reverse)
        before = _before(states, entering, reverse)
        # dh[l] = C[l] dy[l] + decay[l + 1] dh[l + 1], written for decay * dh.
        direct = dy[:, :, None] * C[..., None]
        through = plan.recurrence(decay, decay * direct, after, not reverse)
        dstate = direct + _before(through, after, not reverse)
        dC = _einsum("tknc,tkc->tkn", states, dy)
        dB = _einsum("tknc,tkc->tkn", dstate, step * u)
        ddrive = _over_states(dstate, B)  # by s * u
        ddecay = through * before  # by the exponent, s * A
        ddelta = slope * (ddrive * u + (ddecay * weights.A[None]).sum(axis=2))
        du = ddrive * step
        gradients = _Weights(
            A=_over_time(ddecay * step[:, :, None]),
            D=None if weights.D is None else _over_time(dy * u),
            bias=None if weights.bias is None else _over_time(ddelta),
        )
        if weights.D is not None:
            du = du + weights.D[None] * dy
        per_step = tuple(
            d.astype(a.dtype) for d, a in zip((du, ddelta, dB, dC), inputs, strict=True)
        )
        total = jax.tree.map(jnp.add, total, gradients)
        return (through[-1 if reverse else 0], total), per_step

    def scan(*inputs: Array, sequences: int):
        carry = (jnp.zeros_like(weights.A), jax.tree.map(jnp.zeros_like, weights))
        return _scan_chunks(retreat, carry, inputs, chunk, not reverse, sequences)

    pad, unpad = _padding(u.shape[1], chunk, reverse)
    per_step, total = plan.over_batch(scan)(*pad(u, delta, B, C, dy), entering)
    du, ddelta, dB, dC = map(unpad, per_step)
    dA, dD, dbias = jax.tree.map(lambda a: a.sum(axis=0), total)
    dA = dA.swapaxes(1, 2).astype(A.dtype)
    dD = None if D is None else dD.astype(D.dtype)
    dbias = None if delta_bias is None else dbias.astype(delta_bias.dtype)
    return du, ddelta, dA, dB, dC, dD, dbias


chunked_scan.defvjp(_forward, _backward)


def chunk_length(length: int, longest: int) -> int:
    """A chunk of at most `longest` steps: it divides the length if it needn't be much shorter."""
    longest = max(1, min(length, longest))
    divisors = (t for t in range(longest, longest // 2, -1) if length % t == 0)
    return next(divisors, -(-length // -(-length // longest)))


def _wide(A: Array, D: Array | None, bias: Array | None) -> _Weights:
    D, bias = (None if a is None else a.astype(jnp.float32) for a in (D, bias))
    return _Weights(A.astype(jnp.float32).swapaxes(1, 2), D, bias)


def _discretise(
    inputs: tuple[Array, ...], weights: _Weights, delta_softplus: bool
) -> tuple[Array, Array, Array, Array]:
    """The step sizes, their slope by delta (both (T, K, C)), the decay and the drive."""
    u, step, B, _ = inputs
    if weights.bias is not None:
        step = step + weights.bias[None]
    slope = jnp.ones_like(step)
    if delta_softplus:
        step, slope = softplus_and_slope(step)
    decay = jnp.exp(step[:, :, None] * weights.A[None])
    return step, slope, decay, (step * u)[:, :, None] * B[..., None]


def _before(states: Array, start: Array, reverse: bool) -> Array:
    """The states before each step, from those after it: a loop's second result costs more."""
    if reverse:
        return jnp.concatenate([states[1:], start[None]])
    return jnp.concatenate([start[None], states[:-1]])


# Matrix units would round float32 to bfloat16 or TF32 unasked.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _over_states(a: Float[Array, "T K N C"], weight: Float[Array, "T K N"]) -> Array:
    if a.shape[2] == 1:  # as a product of arrays it fuses, as a matrix product it does not
        return a[:, :, 0] * weight
    return _einsum("tknc,tkn->tkc", a, weight)


def _over_time(a: Float[Array, "T ..."]) -> Float[Array, "..."]:
    """Sum over the first axis, as a product with ones: XLA's CPU reduction is 20 times slower."""
    return _einsum("t,t...->...", jnp.ones(a.shape[0]), a)


def _scan_chunks(
    advance: Callable[..., Any],
    carry: tuple[Array, Any],
    arrays: tuple[Array, ...],
    chunk: int,
    reverse: bool,
    sequences: int,
    over: int | None = None,
) -> tuple[tuple[Array, ...], Any]:
    """`jax.lax.scan` over chunks of the first axis, cut out of the arrays where they lie.

    A scan's own inputs and outputs would be copied: by `jax.vmap`, which moves the axis that is
    scanned before the batch, and by `jax.lax.map`, element by element.

    Args:
        advance: ``((state, total), chunks) -> ((state, total), chunks of the results)``.
        carry: the state, zero, and the total to begin with.
        arrays: the first has `chunk` steps in each chunk, the others any number.
        chunk: steps of a chunk.
        reverse: whether the last chunk comes first.
        sequences: how many of one length lie end to end; each begins with a state of zero.
        over: number of the array whose place the first result takes, chunk by chunk, if they have
            one shape and dtype. Otherwise it fills zeros: one more array to allocate and write.

    Returns:
        The results and the total.
    """
    count = arrays[0].shape[0] // chunk

    def cut(arrays: Sequence[Array], now: Any) -> tuple[Array, ...]:
        sizes = (a.shape[0] // count for a in arrays)
        return tuple(
            jax.lax.dynamic_slice_in_dim(a, now * size, size)
            for a, size in zip(arrays, sizes, strict=True)
        )

    def body(i: Array, loop: tuple[tuple[Array, Any], tuple[Array, ...]]):
        (state, total), results = loop
        now = count - 1 - i if reverse else i
        if sequences > 1:
            state = jnp.where(i % (count // sequences) == 0, 0, state)
        inputs = [results[0] if j == over else a for j, a in enumerate(arrays)]
        carry, parts = advance((state, total), cut(inputs, now))
        return carry, tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, now * part.shape[0], 0)
            for whole, part in zip(results, parts, strict=True)
        )

    parts = jax.eval_shape(lambda carry: advance(carry, cut(arrays, 0))[1], carry)
    results = tuple(jnp.zeros((count * p.shape[0], *p.shape[1:]), p.dtype) for p in parts)
    if over is not None:
        results = (arrays[over], *results[1:])
    (_, total), results = jax.lax.fori_loop(0, count, body, (carry, results))
    return results, total


def _padding(length: int, chunk: int, reverse: bool):
    """Functions that fill arrays (B, L, ...) up to whole chunks, and undo it.

    Steps of size zero follow the sequence: they neither decay nor drive the state. Softplus would
    make them positive, but after the end that changes no output.
    """
    padding = -length % chunk
    before_after = (padding, 0) if reverse else (0, padding)

    def pad(*arrays: Array) -> tuple[Array, ...]:
        if not padding:
            return arrays
        return tuple(jnp.pad(a, [(0, 0), before_after] + [(0, 0)] * (a.ndim - 2)) for a in arrays)

    def unpad(a: Array) -> Array:
        return a[:, padding:] if reverse else a[:, :length]

    return pad, unpad

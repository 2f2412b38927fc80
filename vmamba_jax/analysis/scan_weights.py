"""The scan as attention: the weights with which it reads the map from one position.

VMamba paper (arXiv 2401.10166), "relationship between SS2D and self-attention": unrolled, the
recurrence is attention with a decay. With step sizes s, on a route that reads j before q,

    y[q] = sum over j of M[q, j] * u[j] + D * u[q]
    M[q, j] = sum over n of C[q, n] * exp(A[n] * sum of s over (j, q]) * B[j, n] * s[j]

for each channel. B, C and s depend on the image, too, but given them y is linear in u. So a row of
M is the gradient of y[q] with respect to u while they are held fixed: one pass of the scan
backwards, in memory that grows with the positions and not with their square.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vmamba_jax.config import parse_forward_type
from vmamba_jax.ops import linear, selective_scan, ssd
from vmamba_jax.ops.layer_norm import EPSILON
from vmamba_jax.ops.scan_order import from_layouts, routes_of, to_layouts
from vmamba_jax.typing import Array, FeatureMap, Float, Int, Variables


class ScanWeights(NamedTuple):
    """The weights with which the scan at one position reads the map, channel by channel.

    Attributes:
        routes: of each route alone (K, H, W, C).
        merged: of the merged output (H, W, C): the sum of the routes'. For the cascade
            (``"cascade2d"``) routes 0 and 1 are those of the pass along the rows, 2 and 3 those of
            the pass along the columns, which reads the normalised sum of the first, and `merged`
            is the two passes together (the skip of the first is part of what the second reads),
            the statistics of that normalisation held fixed.
        offset: (C,) what the merged output has beside the weighted sum, without the skip: zero but
            for the cascade, where it comes of the mean that the normalisation subtracts.
    """

    routes: Float[Array, "K H W C"]
    merged: Float[Array, "H W C"]
    offset: Float[Array, "C"]


def scan_weights(
    x: FeatureMap, weights: Variables, forward_type: str, query: Int[Array, "2"]
) -> ScanWeights:
    """The weights of one position in full, each with its sign.

    ``(merged * x[0]).sum(axis=(0, 1)) + offset`` and the skip is what the scan gives there; the
    cascade reads the normalised x (`standardise`).

    Args:
        x: what the scan reads, of one image: see `capture.scan_input`.
        weights: the parameters of the SS2D: see `capture.block_weights`.
        forward_type: variant, see `vmamba_jax.config.parse_forward_type`.
        query: its row and column.
    """
    variant = parse_forward_type(forward_type)
    weights = {name: jnp.asarray(w, jnp.float32) for name, w in weights.items() if _is_array(w)}
    scan = _mamba2(weights) if variant.operator == "m0" else _mamba1(weights)
    x, x_proj = x.astype(jnp.float32), weights["x_proj_weight"]
    routes = x_proj.shape[0]
    if variant.scan_order == "cascade2d":
        return _cascade(x, x_proj, weights["Ds"][:, None, None, None], scan, query)

    forward, _ = routes_of(variant.scan_order)
    projected = _project(x, x_proj)

    def output(inputs: Array) -> Array:
        """The merged map of (K, B, H, W, C), where each route reads a copy of its own."""
        results = []
        for k in range(routes):
            layouts = to_layouts(inputs[k], variant.scan_order)
            g = k % len(layouts)
            projection = to_layouts(projected[..., k, :], variant.scan_order)[g]
            results.append(scan(k, layouts[g], projection, k >= forward))
        return from_layouts(results, x.shape[1], x.shape[2], variant.scan_order)

    copies = jnp.broadcast_to(x[None], (routes, *x.shape))
    row = _row(output, copies, query)[:, 0]
    return ScanWeights(row, row.sum(axis=0), jnp.zeros_like(x[0, 0, 0]))


def standardise(x: Float[Array, "*any C"]) -> Float[Array, "*any C"]:
    """Zero mean and unit variance over the channels, as the cascade's passes read their input."""
    return jax.nn.standardize(x, axis=-1, epsilon=EPSILON)


_Scan = Callable[[int, Array, Array, bool], Array]
"""Route, sequence (B, L, C), what it projects to (B, L, E), reversed -> y (B, L, C), no skip."""


def _cascade(
    x: FeatureMap, x_proj: Array, skip: Float[Array, "K 1 1 1 C"], scan: _Scan, query: Array
) -> ScanWeights:
    batch, height, width, channels = x.shape

    def over(first: int, lines: Array) -> Callable[[Array], Array]:
        """The two routes of a pass on its lines (B, L, C); each reads a copy of its own."""
        projected = _project(lines, x_proj[first : first + 2])

        def output(copies: Array) -> Array:
            ahead = scan(first, copies[0], projected[..., 0, :], False)
            # The second route is added in its own reading order, as the original does.
            return ahead + scan(first + 1, copies[1], projected[..., 1, :], True)[:, ::-1]

        return output

    def twice(a: Array) -> Array:
        return jnp.broadcast_to(a[None], (2, *a.shape))

    def as_rows(maps: Array) -> Array:
        return maps.reshape(-1, batch * height, width, channels)

    u = standardise(x)
    along_rows = over(0, as_rows(u)[0])

    def first_pass(copies: Array) -> Array:
        return along_rows(as_rows(copies)).reshape(x.shape)

    def first_pass_with_skip(u: Array) -> Array:
        return first_pass(twice(u)) + skip[0] * u + skip[1] * u[:, :, ::-1]

    middle = first_pass_with_skip(u)
    mean = middle.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(middle.var(axis=-1, keepdims=True) + EPSILON)

    def as_columns(maps: Array) -> Array:
        return maps.swapaxes(-3, -2).reshape(-1, batch * width, height, channels)

    along_columns = over(2, as_columns(standardise(middle))[0])

    def second_pass(copies: Array) -> Array:
        lines = along_columns(as_columns(copies))
        return lines.reshape(batch, width, height, channels).swapaxes(1, 2)

    def both(u: Array) -> Array:
        return second_pass(twice((first_pass_with_skip(u) - mean) / deviation))

    row = _row(first_pass, twice(u), query)[:, 0]
    column = _row(second_pass, twice(standardise(middle)), query)[:, 0]
    offset = both(jnp.zeros_like(u))[0, query[0], query[1]]
    return ScanWeights(jnp.concatenate([row, column]), _row(both, u, query)[0], offset)


def _row(output: Callable[[Array], Array], inputs: Array, query: Array) -> Array:
    """The gradient of the output at a position, summed over the channels, which don't mix."""
    y, pull = jax.vjp(output, inputs)
    at = jnp.zeros_like(y).at[:, query[0], query[1]].set(1)
    return pull(at)[0]


def _mamba1(weights: Variables) -> _Scan:
    decay_rate = -jnp.exp(weights["A_logs"])
    rank, states = weights["dt_projs_weight"].shape[-1], decay_rate.shape[-1]

    def scan(route: int, u: Array, projected: Array, reverse: bool) -> Array:
        one = slice(route, route + 1)
        dt, b, c = (a[:, :, None] for a in jnp.split(projected, (rank, rank + states), axis=-1))
        y = selective_scan(
            u[:, :, None], dt, decay_rate[one], b, c, None, weights["dt_projs_bias"][one],
            delta_proj=weights["dt_projs_weight"][one], reverse=reverse,
        )  # fmt: skip
        return y[:, :, 0]

    return scan


def _mamba2(weights: Variables) -> _Scan:
    decay_rate, skip = -jnp.exp(weights["A_logs"]), weights["Ds"]
    heads = decay_rate.shape[-1]

    def scan(route: int, u: Array, projected: Array, reverse: bool) -> Array:
        one = slice(route, route + 1)
        states = (projected.shape[-1] - heads) // 2
        dt, b, c = (a[:, :, None] for a in jnp.split(projected, (heads, heads + states), axis=-1))
        x = u.reshape(*u.shape[:2], 1, *skip.shape[1:])
        y = ssd(x, dt, decay_rate[one], b, c, None, weights["dt_projs_bias"][one], reverse=reverse)
        return y.reshape(u.shape)

    return scan


def _project(x: Float[Array, "... C"], x_proj: Float[Array, "K E C"]) -> Float[Array, "... K E"]:
    routes, size, channels = x_proj.shape
    projected = linear(x, x_proj.reshape(routes * size, channels).T)
    return projected.reshape(*x.shape[:-1], routes, size)


def _is_array(weight: object) -> bool:
    return hasattr(weight, "shape")

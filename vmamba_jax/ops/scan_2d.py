"""SS2D's core on a feature map: project, scan along the routes, merge. Pure functions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vmamba_jax.ops.layer_norm import EPSILON
from vmamba_jax.ops.scan_order import Order, from_layouts, routes_of, to_layouts
from vmamba_jax.ops.selective_scan import selective_scan
from vmamba_jax.ops.ssd import ssd
from vmamba_jax.typing import Array, FeatureMap, Float


def selective_scan_2d(
    x: FeatureMap,
    x_proj: Float[Array, "K E C"],
    dt_proj: Float[Array, "K C R"],
    dt_bias: Float[Array, "K C"],
    A_logs: Float[Array, "K C N"],
    D: Float[Array, "K C"],
    *,
    order: str = "cross2d",
    force_fp32: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> FeatureMap:
    """The 2-D selective scan (VMamba, section 4.2): K = 4 routes over the map, added up.

    Args:
        x: feature map.
        x_proj: projects each position to delta (R), B (N) and C (N), one matrix a route.
        dt_proj: lifts delta from R to C channels.
        dt_bias: bias of the step size.
        A_logs: logarithm of the negated decay rates.
        D: skip weights.
        order: ``"cross2d"``, ``"unidi"``, ``"bidi"``, ``"rot90"``, or ``"cascade2d"``: both ways
            along the rows with the first two routes, then along the columns of their normalised
            sum with the last two.
        force_fp32: cast the scan's inputs to float32.
        implementation: see `selective_scan`.

    Returns:
        The merged map, in float32.

    Raises:
        ValueError: for an unknown order or implementation.
    """
    decay_rate = -jnp.exp(A_logs.astype(jnp.float32))
    weights = (x_proj, dt_proj, dt_bias, decay_rate, D)

    def scan(layouts: Array, weights: tuple[Array, ...], forward: int) -> tuple[Array, Array]:
        return _scan_both_ways(layouts, weights, forward, force_fp32, implementation)

    batch, height, width, channels = x.shape
    if order != "cascade2d":
        ahead, back = scan(to_layouts(x, order), weights, routes_of(order).forward)
        return from_layouts(ahead + back, height, width, order)

    def scan_lines(lines: Array, weights: tuple[Array, ...]) -> Array:
        # The original adds the two passes as they leave the scan, the second one still in its
        # own reading order; weights trained with it depend on that.
        ahead, back = scan(lines[:, :, None], weights, 1)
        return (ahead + back[:, ::-1])[:, :, 0]

    for_rows, for_columns = (tuple(w[k : k + 2] for w in weights) for k in (0, 2))
    y = scan_lines(_standardise(x).reshape(batch * height, width, channels), for_rows)
    columns = _standardise(y.reshape(x.shape).astype(x.dtype)).swapaxes(1, 2)
    y = scan_lines(columns.reshape(batch * width, height, channels), for_columns)
    return y.reshape(batch, width, height, channels).swapaxes(1, 2)


def ssd_2d(
    x: FeatureMap,
    x_proj: Float[Array, "K E C"],
    dt_bias: Float[Array, "K R"],
    A_logs: Float[Array, "K R"],
    D: Float[Array, "K R P"],
    *,
    order: Order = "cross2d",
) -> FeatureMap:
    """The 2-D scan in its Mamba-2 form: R heads a route, one decay rate each.

    Args:
        x: feature map, C = R * P.
        x_proj: projects each position to delta (R), B (N) and C (N), one matrix a route.
        dt_bias: bias of the step size.
        A_logs: logarithm of the negated decay rates.
        D: skip weights.
        order: see `cross_scan`.

    Returns:
        The merged map, in float32.
    """
    decay_rate = -jnp.exp(A_logs.astype(jnp.float32))
    layouts = to_layouts(x, order)
    forward, _ = routes_of(order)
    merged = jnp.zeros((), jnp.float32)
    for part, reverse in ((slice(None, forward), False), (slice(forward, None), True)):
        u, dt, b, c = _project(layouts, x_proj[part], A_logs.shape[1])
        heads = u.reshape(*u.shape[:3], *D.shape[1:])
        y = ssd(heads, dt, decay_rate[part], b, c, D[part], dt_bias[part], reverse=reverse)
        merged = merged + y.reshape(u.shape).astype(jnp.float32)
    return from_layouts(merged, x.shape[1], x.shape[2], order)


def _scan_both_ways(
    layouts: Float[Array, "B L G C"],
    weights: tuple[Array, ...],
    forward: int,
    force_fp32: bool,
    implementation: str | Sequence[str] | None,
) -> tuple[Float[Array, "B L G C"], Float[Array, "B L G C"]]:
    """Scans the first `forward` routes ahead and the others in reverse; adds routes per layout."""

    def scan(part: slice, reverse: bool) -> Array:
        x_proj, dt_proj, dt_bias, decay_rate, D = (w[part] for w in weights)
        if not x_proj.shape[0]:
            return jnp.zeros(layouts.shape, jnp.float32)
        u, dt, b, c = _project(layouts, x_proj, dt_proj.shape[-1])
        delta = jnp.einsum("blkr,kcr->blkc", dt, dt_proj)
        if force_fp32:
            u, delta, b, c = (a.astype(jnp.float32) for a in (u, delta, b, c))
        y = selective_scan(
            u, delta, decay_rate, b, c, D, dt_bias, reverse=reverse, implementation=implementation
        ).astype(jnp.float32)
        return y if layouts.shape[2] > 1 else y.sum(axis=2, keepdims=True)

    return scan(slice(None, forward), False), scan(slice(forward, None), True)


def _project(
    layouts: Float[Array, "B L G C"], x_proj: Float[Array, "K E C"], rank: int
) -> tuple[Float[Array, "B L K C"], Array, Array, Array]:
    """Each route's input, and its delta (before the lift), B and C."""
    batch, length, _, channels = layouts.shape
    u = jnp.broadcast_to(layouts, (batch, length, x_proj.shape[0], channels))
    projected = jnp.einsum("blkc,krc->blkr", u, x_proj)
    states = (x_proj.shape[1] - rank) // 2
    dt, b, c = jnp.split(projected, (rank, rank + states), axis=-1)
    return u, dt, b, c


def _standardise(x: FeatureMap) -> FeatureMap:
    """Zero mean and unit variance over the channels (a LayerNorm without weights)."""
    wide = x.astype(jnp.float32)
    wide = jax.nn.standardize(wide, axis=-1, epsilon=EPSILON)
    return wide.astype(x.dtype)

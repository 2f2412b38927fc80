"""SS2D's core on a feature map: project, scan along the routes, merge. Pure functions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from vmamba_jax.ops import _pallas_tpu
from vmamba_jax.ops.layer_norm import EPSILON
from vmamba_jax.ops.linear import product
from vmamba_jax.ops.per_device import per_device
from vmamba_jax.ops.residuals import keep, keep_scan_input, together
from vmamba_jax.ops.scan_order import Order, from_layouts, routes_of, to_layouts
from vmamba_jax.ops.selective_scan import DEFAULTS, names_of, platform, selective_scan
from vmamba_jax.ops.ssd import ssd
from vmamba_jax.ops.wide import wide, widened
from vmamba_jax.typing import Array, FeatureMap, Float

Weights: TypeAlias = tuple[Array, Array, Array, Array]
"""The decay rates A (K, C, N), D (K, C), the bias (K, C) of delta and what lifts it (K, C, R)."""


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
        force_fp32: cast the scan's inputs to float32, unless they are wider.
        implementation: see `selective_scan`.

    Returns:
        The merged map, in float32, or wider if `x` is.

    Raises:
        ValueError: for an unknown order or implementation.
    """
    weights = (-jnp.exp(A_logs.astype(wide(x.dtype))), D, dt_bias, dt_proj)
    names = names_of(implementation)
    if order == "cascade2d":
        return _cascade(x, x_proj, weights, force_fp32, names)
    routes_of(order)
    on = platform() if names else None
    # Each layout and each skip reads the map.
    y = _scan_map(together(x), (x_proj, *weights), order, force_fp32, names, on)
    return keep(y)


# Under `jax.jit`, maps of the same shapes are traced once.
@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _scan_map(
    x: FeatureMap,
    weights: tuple[Array, ...],
    order: str,
    force_fp32: bool,
    names: tuple[str, ...],
    on: str | None,
) -> FeatureMap:
    """All routes at once where the TPU's kernel is asked for, or the default; else one by one."""

    def by_route(names: Sequence[str]) -> Callable[..., Array]:
        def scan(x: Array, x_proj: Array, *weights: Array) -> Array:
            one = partial(_scan_route, weights, force_fp32, names)
            return _along_routes(x, _project(x, x_proj), order, one)

        return scan

    def whole(x: Array, x_proj: Array, *weights: Array) -> Array:
        projected = keep_scan_input(product(x, _pallas_tpu.projection(x_proj).T))
        u, z = (widened(a) if force_fp32 else a for a in (x, projected))
        decay_rate, *others = weights
        try:
            return _pallas_tpu.selective_scan_2d(u, z, decay_rate, *others, order=order)
        except NotImplementedError:
            return by_route(names)(x, x_proj, *weights)

    def scan(x: Array, weights: tuple[Array, ...]) -> Array:
        if names:
            fused = names[0] == "pallas_tpu" and on == "tpu"
            return (whole if fused else by_route(names))(x, *weights)
        by_platform = {name: by_route(names) for name, names in DEFAULTS.items()}
        return jax.lax.platform_dependent(x, *weights, **{**by_platform, "tpu": whole})

    return per_device(scan, x, weights)


def _scan_route(
    weights: tuple[Array, ...],
    force_fp32: bool,
    names: Sequence[str],
    route: int,
    x: Float[Array, "B L C"],
    projected: Float[Array, "B L E"],
    reverse: bool,
) -> Float[Array, "B L C"]:
    decay_rate, D, dt_bias, dt_proj = (w[route : route + 1] for w in weights)
    rank, states = dt_proj.shape[-1], decay_rate.shape[-1]
    dt, b, c = jnp.split(projected, (rank, rank + states), axis=-1)
    u, dt, b, c = (a[:, :, None] for a in (x, dt, b, c))
    if force_fp32:
        u, dt, b, c = map(widened, (u, dt, b, c))
    y = selective_scan(
        u, dt, decay_rate, b, c, D, dt_bias,
        delta_proj=dt_proj, reverse=reverse, implementation=names,
    )  # fmt: skip
    return widened(y[:, :, 0])


def _cascade(
    x: FeatureMap,
    x_proj: Float[Array, "K E C"],
    weights: Weights,
    force_fp32: bool,
    names: Sequence[str],
) -> FeatureMap:
    scan = partial(_scan_route, weights, force_fp32, names)

    def scan_lines(lines: Array, first: int) -> Array:
        # The original adds the two passes as they leave the scan, the second one still in its
        # own reading order; weights trained with it depend on that.
        projected = _project(lines, x_proj[first : first + 2])
        ahead = scan(first, lines, projected[..., 0, :], False)
        return ahead + scan(first + 1, lines, projected[..., 1, :], True)[:, ::-1]

    batch, height, width, channels = x.shape
    y = scan_lines(_standardise(x).reshape(batch * height, width, channels), 0)
    columns = _standardise(y.reshape(x.shape).astype(x.dtype)).swapaxes(1, 2)
    y = scan_lines(columns.reshape(batch * width, height, channels), 2)
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
        The merged map, in float32, or wider if `x` is.
    """
    decay_rate = -jnp.exp(A_logs.astype(wide(x.dtype)))

    def scan(route: int, x: Array, projected: Array, reverse: bool) -> Array:
        heads = A_logs.shape[-1]
        states = (projected.shape[-1] - heads) // 2
        dt, b, c = jnp.split(projected, (heads, heads + states), axis=-1)
        u = x.reshape(*x.shape[:2], *D.shape[1:])
        u, dt, b, c = (a[:, :, None] for a in (u, dt, b, c))
        a, skip, bias = (w[route : route + 1] for w in (decay_rate, D, dt_bias))
        y = ssd(u, dt, a, b, c, skip, bias, reverse=reverse)
        return widened(y.reshape(x.shape))

    x = together(x)
    return keep(_along_routes(x, _project(x, x_proj), order, scan))


def _along_routes(
    x: FeatureMap,
    projected: Float[Array, "B H W K E"],
    order: str,
    scan: Callable[[int, Array, Array, bool], Array],
) -> FeatureMap:
    """Scans the routes of a map one by one, and adds them up on the map.

    One by one, as a stack of them would be a copy of the map for each; and projected before it is
    read along them, in one product. `scan` takes a route's number, its sequence, what that
    projects to (B, L, E), and whether to run in reverse; it returns (B, L, C).
    """
    forward, _ = routes_of(order)
    layouts = to_layouts(x, order)
    results = []
    for k in range(projected.shape[3]):
        g = k % len(layouts)
        projection = to_layouts(projected[..., k, :], order)[g]
        results.append(scan(k, layouts[g], projection, k >= forward))
    return from_layouts(results, x.shape[1], x.shape[2], order)


def _project(x: Float[Array, "... C"], x_proj: Float[Array, "K E C"]) -> Float[Array, "... K E"]:
    """What each position projects to, for each route."""
    routes, size, channels = x_proj.shape
    projected = keep_scan_input(product(x, x_proj.reshape(routes * size, channels).T))
    return projected.reshape(*x.shape[:-1], routes, size)


def _standardise(x: FeatureMap) -> FeatureMap:
    """Zero mean and unit variance over the channels (a LayerNorm without weights)."""
    return jax.nn.standardize(widened(x), axis=-1, epsilon=EPSILON).astype(x.dtype)

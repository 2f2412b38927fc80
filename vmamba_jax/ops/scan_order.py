"""2-D traversal orders: how a feature map becomes sequences, and sequences a feature map again.

A traversal has K = 4 routes, but at most two of them read the map in a *layout* of their own;
the others are those layouts read backwards (or again). `to_layouts` and `from_layouts` move
between the map and its layouts without a reversed copy, since a scan can run in reverse;
`cross_scan` and `cross_merge` are the same traversals with every route spelled out.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from vmamba_jax._closest import closest
from vmamba_jax.typing import Array, FeatureMap, Float, Size

Order = Literal["cross2d", "unidi", "bidi", "rot90"]


class Routes(NamedTuple):
    """How many routes of a traversal run forward (they come first) and how many in reverse."""

    forward: int
    reverse: int


ROUTES: dict[str, Routes] = {
    "cross2d": Routes(2, 2),  # rows, columns, and both in reverse (VMamba, section 4.2)
    "unidi": Routes(4, 0),  # rows, four times
    "bidi": Routes(2, 2),  # rows twice, and in reverse twice
    "rot90": Routes(2, 2),  # the rows of the map turned by 0, 90, 180 and 270 degrees
}


def routes_of(order: str) -> Routes:
    """Number of forward and reverse routes.

    Raises:
        ValueError: for an unknown order.
    """
    if order not in ROUTES:
        raise ValueError(f"unknown scan order {order!r}." + closest(order, ROUTES))
    return ROUTES[order]


def to_layouts(x: FeatureMap, order: str = "cross2d") -> tuple[Float[Array, "B L C"], ...]:
    """The distinct sequences of a traversal, G = 1 or 2.

    Route k reads sequence ``k % G``; a reverse route reads it backwards.
    """
    routes_of(order)
    batch, height, width, channels = x.shape
    shape = (batch, height * width, channels)
    if order in ("unidi", "bidi"):
        return (x.reshape(shape),)
    # Turned by 90 degrees, a map's rows are its columns from last to first.
    columns = (x if order == "cross2d" else x[:, :, ::-1]).swapaxes(1, 2)
    return x.reshape(shape), columns.reshape(shape)


def from_layouts(
    routes: Sequence[Float[Array, "B L C"]], height: Size, width: Size, order: str = "cross2d"
) -> FeatureMap:
    """Adds K sequences up on the map, each of them in the order of its layout (none reversed)."""
    routes_of(order)
    batch, _, channels = routes[0].shape
    if order in ("unidi", "bidi"):
        return reduce(add, routes).reshape(batch, height, width, channels)
    rows, columns = (reduce(add, routes[g::2]) for g in (0, 1))
    columns = columns.reshape(batch, width, height, channels).swapaxes(1, 2)
    columns = columns if order == "cross2d" else columns[:, :, ::-1]
    return rows.reshape(batch, height, width, channels) + columns


def positions(order: str, height: int, width: int) -> np.ndarray:
    """Which position of the map, 0 to H W - 1, each route reads at each step: (K, L) int32.

    Raises:
        ValueError: for an unknown order.
    """
    forward, reverse = routes_of(order)
    at = np.arange(height * width, dtype=np.int32).reshape(height, width)
    layouts = [at.ravel()]
    if order not in ("unidi", "bidi"):
        layouts.append((at if order == "cross2d" else at[:, ::-1]).T.ravel())
    routes = [layouts[k % len(layouts)] for k in range(forward + reverse)]
    return np.stack(routes[:forward] + [r[::-1] for r in routes[forward:]])


def cross_scan(x: FeatureMap, order: str = "cross2d") -> Float[Array, "B L K C"]:
    """Reads a map along K = 4 routes, each as a sequence in its own reading direction.

    Raises:
        ValueError: for an unknown order.
    """
    forward, reverse = routes_of(order)
    layouts = to_layouts(x, order)
    routes = [layouts[k % len(layouts)] for k in range(forward + reverse)]
    return jnp.stack(routes[:forward] + [r[:, ::-1] for r in routes[forward:]], axis=2)


def cross_merge(
    y: Float[Array, "B L K C"], height: Size, width: Size, order: str = "cross2d"
) -> FeatureMap:
    """Puts K = 4 sequences back on the map and adds them up: the transpose of `cross_scan`.

    Raises:
        ValueError: for an unknown order.
    """
    forward, _ = routes_of(order)
    routes = [y[:, :, k] if k < forward else y[:, ::-1, k] for k in range(y.shape[2])]
    return from_layouts(routes, height, width, order)

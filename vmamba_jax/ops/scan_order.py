"""2-D traversal orders: how a feature map becomes sequences, and sequences a feature map again.

A traversal has K = 4 routes, but at most two of them read the map in a *layout* of their own;
the others are those layouts read backwards (or again). `to_layouts` and `from_layouts` move
between the map and its layouts without a reversed copy, since a scan can run in reverse;
`cross_scan` and `cross_merge` are the same traversals with every route spelled out.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp

from vmamba_jax._closest import closest
from vmamba_jax.typing import Array, FeatureMap, Float

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


def to_layouts(x: FeatureMap, order: str = "cross2d") -> Float[Array, "B L G C"]:
    """The distinct sequences of a traversal, G = 1 or 2; the reverse routes read them backwards."""
    routes_of(order)
    batch, height, width, channels = x.shape
    if order in ("unidi", "bidi"):
        return x.reshape(batch, height * width, 1, channels)
    # Turned by 90 degrees, a map's rows are its columns from last to first.
    columns = (x if order == "cross2d" else x[:, :, ::-1]).swapaxes(1, 2)
    shape = (batch, height * width, channels)
    return jnp.stack([x.reshape(shape), columns.reshape(shape)], axis=2)


def from_layouts(
    y: Float[Array, "B L G C"], height: int, width: int, order: str = "cross2d"
) -> FeatureMap:
    """Adds the layouts up on the map: the transpose of `to_layouts`."""
    routes_of(order)
    batch, _, _, channels = y.shape
    rows = y[:, :, 0].reshape(batch, height, width, channels)
    if order in ("unidi", "bidi"):
        return rows
    columns = y[:, :, 1].reshape(batch, width, height, channels).swapaxes(1, 2)
    return rows + (columns if order == "cross2d" else columns[:, :, ::-1])


def cross_scan(x: FeatureMap, order: str = "cross2d") -> Float[Array, "B L K C"]:
    """Reads a map along K = 4 routes, each as a sequence in its own reading direction.

    Raises:
        ValueError: for an unknown order.
    """
    forward, reverse = routes_of(order)
    layouts = to_layouts(x, order)
    batch, length, _, channels = layouts.shape
    ahead = jnp.broadcast_to(layouts, (batch, length, max(forward, reverse), channels))
    return jnp.concatenate([ahead[:, :, :forward], ahead[:, ::-1, :reverse]], axis=2)


def cross_merge(
    y: Float[Array, "B L K C"], height: int, width: int, order: str = "cross2d"
) -> FeatureMap:
    """Puts K = 4 sequences back on the map and adds them up: the transpose of `cross_scan`.

    Raises:
        ValueError: for an unknown order.
    """
    forward, reverse = routes_of(order)
    ahead = y[:, :, :forward]
    if reverse:
        ahead = ahead + y[:, ::-1, forward:]
    if order in ("unidi", "bidi"):
        ahead = ahead.sum(axis=2, keepdims=True)
    return from_layouts(ahead, height, width, order)

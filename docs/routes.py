"""Draws docs/routes.svg, the routes of every traversal, from `vmamba_jax.ops.cross_scan` itself.

``python docs/routes.py`` writes it again; a test compares the two.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vmamba_jax.ops import cross_scan

ORDERS = {
    "cross2d": "v05 and most others",
    "unidi": "v051d",
    "bidi": "v052d",
    "rot90": "v052d3",
}
HEIGHT, WIDTH = 3, 4  # of the map, in positions
_CELL, _PANEL, _LABEL, _ROW = 30, 160, 20, 150


def routes(order: str) -> np.ndarray:
    """Row and column of every position in the order in which each route reads it, (K, L, 2)."""
    rows, columns = jnp.indices((HEIGHT, WIDTH), jnp.int32).astype(jnp.float32)
    positions = jnp.stack([rows, columns], axis=-1)[None]
    return np.asarray(cross_scan(positions, order)[0]).swapaxes(0, 1).astype(int)


def svg() -> str:
    """The picture: a row for each order, a panel for each route."""
    width, height = 4 * _PANEL, len(ORDERS) * _ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#3367d6"/></marker>'
        "</defs>",
    ]
    for row, (order, used_by) in enumerate(ORDERS.items()):
        top = row * _ROW
        lines.append(f'<text x="8" y="{top + 14}" fill="#888">{order}: {used_by}</text>')
        for k, route in enumerate(routes(order)):
            lines += _panel(k, route, k * _PANEL + 8, top + _LABEL)
    return "\n".join([*lines, "</svg>", ""])


def _panel(k: int, route: np.ndarray, left: int, top: int) -> list[str]:
    places = [(left + _CELL * (c + 0.5), top + _CELL * (r + 0.5)) for r, c in route]
    cells = [
        f'<rect x="{left + _CELL * c}" y="{top + _CELL * r}" width="{_CELL}" height="{_CELL}" '
        'fill="none" stroke="#888" stroke-opacity="0.5"/>'
        for r in range(HEIGHT)
        for c in range(WIDTH)
    ]
    points = " ".join(f"{x:g},{y:g}" for x, y in places)
    x, y = places[0]
    return [
        *cells,
        f'<polyline points="{points}" fill="none" stroke="#3367d6" stroke-width="2" '
        'stroke-linejoin="round" '
        'marker-end="url(#end)"/>',
        f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="#3367d6"/>',
        f'<text x="{left}" y="{top + _CELL * HEIGHT + 16}" fill="#888">route {k}</text>',
    ]


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg())

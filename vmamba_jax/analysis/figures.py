"""Figures of the analyses, for a paper or a notebook. Needs matplotlib (extra `demo`)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vmamba_jax.analysis.activation import ActivationMaps
from vmamba_jax.analysis.erf import contribution_area
from vmamba_jax.analysis.features import map_colors, map_norm
from vmamba_jax.analysis.resolution import Resolution
from vmamba_jax.config import parse_forward_type
from vmamba_jax.typing import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 2.2  # inches
_SHARES = (0.5, 0.99)

_ROUTE_NAMES = {
    "cross2d": ("rows", "columns", "rows, reversed", "columns, reversed"),
    "unidi": ("rows (1)", "rows (2)", "rows (3)", "rows (4)"),
    "bidi": ("rows (1)", "rows (2)", "reversed (1)", "reversed (2)"),
    "rot90": ("turned 0°", "turned 90°", "turned 180°", "turned 270°"),
    "cascade2d": ("row", "row, reversed", "column", "column, reversed"),
}


def draw_receptive_fields(fields: Mapping[str, Float[np.ndarray, "H W"]]) -> "Figure":
    """Effective receptive fields side by side.

    Each is scaled by its largest value and shown as its fifth root, as in the VMamba paper's
    figure; the title says what share of the image holds half and 99 % of the contributions.

    Args:
        fields: of `effective_receptive_field`, of a map's centre, by title.
    """
    from matplotlib.colors import PowerNorm  # noqa: PLC0415 (of the demo extra)

    figure, axes = _grid(1, len(fields), next(iter(fields.values())).shape, extra=0.5)
    picture = None
    for axis, (title, field) in zip(axes[0], fields.items(), strict=True):
        largest = max(float(field.max()), 1e-30)
        picture = axis.imshow(field / largest, norm=PowerNorm(0.2, 0, 1), cmap="magma")
        axis.set_title(f"{title}{_shares(field)}", fontsize=8)
    if picture is not None:
        bar = figure.colorbar(
            picture, ax=axes[0].tolist(), label="contribution over the largest", shrink=0.8
        )
        bar.set_ticks([0, 1e-4, 1e-2, 0.1, 0.5, 1], labels=["0", "1e-4", "0.01", "0.1", "0.5", "1"])
    return figure


def draw_activation_maps(
    picture: Float[np.ndarray, "H W 3"],
    maps: Mapping[str, ActivationMaps],
    queries: Sequence[tuple[float, float]],
    forward_type: str,
) -> "Figure":
    """What the scan reads for some positions: a row for each of them and each entry of `maps`.

    Each map is scaled by its own largest weight.

    Args:
        picture: RGB between 0 and 1.
        maps: of `activation_maps`, by title.
        queries: rows and columns of the positions, between 0 and 1 of the picture's sides.
        forward_type: the model's, which names the routes.
    """
    names = _ROUTE_NAMES[parse_forward_type(forward_type).scan_order]
    rows = [(title, maps[title], q) for title in maps for q in range(len(queries))]
    figure, axes = _grid(len(rows), 2 + len(names), picture.shape[:2])
    height, width = picture.shape[:2]
    for i, (cells, (title, found, q)) in enumerate(zip(axes, rows, strict=True)):
        y, x = queries[q]
        cells[0].imshow(picture, extent=(0, width, height, 0))
        shown = (*found.routes[q], found.merged[q])
        for cell, name, weights in zip(cells[1:], (*names, "merged"), shown, strict=True):
            largest = max(float(weights.max()), 1e-30)
            cell.imshow(np.asarray(weights) / largest, cmap="magma", extent=(0, width, height, 0))
            if i == 0:
                cell.set_title(name, fontsize=9)
        for cell in cells:
            cell.plot(x * width, y * height, "+", color="cyan", markersize=8)
            cell.set(xlim=(0, width), ylim=(height, 0))
        _label(cells[0], title)
    return figure


def draw_stage_maps(
    picture: Float[np.ndarray, "H W 3"], maps: Sequence[Float[np.ndarray, "_ _ _"]]
) -> "Figure":
    """An image and its stages' maps: their norm above, their principal components below.

    Args:
        picture: RGB between 0 and 1.
        maps: of `stage_maps`, of one image (h, w, C).
    """
    figure, axes = _grid(2, 1 + len(maps), picture.shape[:2])
    axes[0, 0].imshow(picture)
    for stage, features in enumerate(maps):
        axes[0, 1 + stage].imshow(map_norm(features), cmap="viridis")
        axes[0, 1 + stage].set_title(f"stage {stage}", fontsize=9)
        axes[1, 1 + stage].imshow(map_colors(features))
    if maps:
        _label(axes[0, 1], "norm")
        _label(axes[1, 1], "components")
    axes[1, 0].set_axis_off()
    return figure


def draw_resolutions(rows: Sequence[Resolution]) -> "Figure":
    """Time, memory, operations, and how the answers change with the image's size.

    Args:
        rows: of `resolution_sweep`.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(12, 3), layout="constrained")
    time, memory, flops, answers = figure.subplots(1, 4)
    sizes = [row.size for row in rows]
    time.plot(sizes, [1e3 * row.seconds for row in rows], "o-")
    time.set_ylabel("time per image (ms)")
    memory.plot(sizes, [row.memory / 2**20 for row in rows], "o-")
    memory.set_ylabel("memory of a batch (MiB)")
    flops.plot(sizes, [row.flops / 1e9 for row in rows], "o-")
    flops.set_ylabel("GFLOPs per image")
    for axis in (time, memory, flops):
        axis.set_ylim(bottom=0)
    answers.plot(sizes, [row.drift for row in rows], "o-", label="drift of the logits")
    answers.plot(sizes, [row.agreement for row in rows], "s--", label="same class as first")
    if rows and rows[0].accuracy is not None:
        answers.plot(sizes, [row.accuracy or 0.0 for row in rows], "^-.", label="accuracy")
    answers.set_ylim(bottom=0)
    answers.legend(fontsize=7)
    for axis in (time, memory, flops, answers):
        axis.set_xlabel("side of the image (pixels)")
        axis.grid(alpha=0.3)
    return figure


def _grid(
    rows: int, columns: int, shape: tuple[int, ...], extra: float = 0.0
) -> tuple["Figure", np.ndarray]:
    """Cells for pictures of one shape, without ticks."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    height = _CELL * min(max(shape[0] / shape[1], 0.3), 3)
    size = (_CELL * columns + 0.4 + extra, height * rows + 0.4 + extra)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _shares(field: np.ndarray) -> str:
    if not field.any():
        return "\nno pixel contributes"
    shares = (f"{share:.0%}: {contribution_area(field, share):.1%}" for share in _SHARES)
    return f"\n{', '.join(shares)} of the area"


def _label(axis: "Axes", text: str) -> None:
    axis.set_ylabel(text, fontsize=9)

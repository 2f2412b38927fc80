"""Non-maximum suppression in fixed shapes: greedy, exact, a tile of candidates at a time.

The best box left is kept and those that overlap it are dropped, over and over. One box a step
would be thousands of tiny steps for an accelerator. Here the candidates come in descending order, a
tile at a time: the boxes kept so far drop theirs of the tile at once, and inside the tile a few
passes over its matrix of overlaps settle the rest. It stops when enough are kept or no candidate is
left.
"""

import jax
import jax.numpy as jnp

from vmamba_jax.detection.boxes import box_iou
from vmamba_jax.typing import Array, Bool, Float, Int

_TILE = 512


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, "n"],
    valid: Bool[Array, "n"],
    groups: Int[Array, "n"],
    *,
    iou_threshold: float,
    max_outputs: int,
) -> tuple[Int[Array, "kept"], Bool[Array, "kept"]]:
    """The boxes that no better one of their group overlaps.

    Args:
        boxes: corners that are not negative, float32.
        scores: how good each box is; of equal ones the first is better.
        valid: which boxes take part.
        groups: boxes of different groups (classes, or levels of a pyramid) don't suppress each
            other.
        iou_threshold: a box is dropped when its overlap with a kept one is larger.
        max_outputs: how many are kept at most.

    Returns:
        Indices of the kept boxes, best first, and which of these `max_outputs` places are filled;
        the others hold 0.
    """
    if not len(boxes):
        return jnp.zeros(max_outputs, jnp.int32), jnp.zeros(max_outputs, bool)
    # Apart by more than the picture's size, boxes of two groups can't overlap. Their coordinates
    # are rounded there, and with them the overlaps: as in mmdetection.
    apart = jnp.where(valid[:, None], boxes, 0).max() + 1
    boxes = boxes + (groups.astype(boxes.dtype) * apart)[:, None]

    tile = min(_TILE, len(boxes))
    tiles = -(-len(boxes) // tile)
    worst_last = jnp.where(valid, -scores, jnp.inf)
    order = jnp.argsort(worst_last, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, tiles * tile - len(boxes)))
    candidates = jnp.minimum(valid.sum(), len(boxes)).astype(jnp.int32)

    def unfinished(state: tuple[Array, ...]) -> Array:
        start, count, *_ = state
        return (start < candidates) & (count < max_outputs)

    def next_tile(state: tuple[Array, ...]) -> tuple[Array, ...]:
        start, count, indices, kept_boxes = state
        here = jax.lax.dynamic_slice(order, (start,), (tile,))
        mine = boxes[here]
        overlapped = (box_iou(kept_boxes, mine) > iou_threshold).any(axis=0)
        free = (start + jnp.arange(tile, dtype=jnp.int32) < candidates) & ~overlapped
        keep = _settle(free, box_iou(mine, mine) > iou_threshold)
        # Dropped boxes, and kept ones beyond the last place, are written to no place.
        place = jnp.where(keep, count + jnp.cumsum(keep.astype(jnp.int32)) - 1, max_outputs)
        indices = indices.at[place].set(here, mode="drop")
        kept_boxes = kept_boxes.at[place].set(mine, mode="drop")
        count = jnp.minimum(count + keep.sum().astype(jnp.int32), max_outputs)
        return start + tile, count, indices, kept_boxes

    zero = jnp.zeros_like(candidates)
    # No box overlaps an empty one: the places not filled yet suppress nothing.
    empty = jnp.zeros((max_outputs, 4), boxes.dtype)
    state = (zero, zero, jnp.zeros(max_outputs, jnp.int32), empty)
    _, count, indices, _ = jax.lax.while_loop(unfinished, next_tile, state)
    return indices, jnp.arange(max_outputs, dtype=jnp.int32) < count


def _settle(free: Bool[Array, "n"], overlap: Bool[Array, "n n"]) -> Bool[Array, "n"]:
    """Greedy suppression among candidates in descending order.

    A candidate is kept if no kept one before it overlaps it. Passed over all of them at once, the
    first k are right after k passes, and when a pass changes nothing all are.
    """
    index = jnp.arange(len(free), dtype=jnp.int32)
    suppresses = overlap & (index[:, None] < index[None])

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        keep, _ = state
        new = free & ~(suppresses & keep[:, None]).any(axis=0)
        return new, (new != keep).any()

    keep, _ = jax.lax.while_loop(lambda state: state[1], again, (free, free.any()))
    return keep

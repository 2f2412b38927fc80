"""The loss of semantic segmentation."""

import jax.numpy as jnp
import optax

from vmamba_jax.data.decode import IGNORED
from vmamba_jax.segmentation.upernet import SegmenterLogits, resize
from vmamba_jax.typing import Array, Float, Int


def segmentation_loss(
    logits: SegmenterLogits, labels: Int[Array, "B H W"], auxiliary_weight: float = 0.4
) -> Float[Array, ""]:
    """The decode head's cross-entropy plus `auxiliary_weight` times the auxiliary head's.

    Logits are resized to the labels. The cross-entropy is summed over the pixels that count and
    divided by the number of all pixels, as in the published training runs.

    Args:
        logits: of a `UPerNet`.
        labels: classes, 0 to classes - 1, or `IGNORED`.
        auxiliary_weight: the published 0.4.

    Returns:
        A float32 scalar.
    """
    loss = pixel_cross_entropy(logits.decode, labels)
    if logits.auxiliary is not None:
        loss = loss + auxiliary_weight * pixel_cross_entropy(logits.auxiliary, labels)
    return loss


def pixel_cross_entropy(
    logits: Float[Array, "B h w classes"], labels: Int[Array, "B H W"]
) -> Float[Array, ""]:
    """Cross-entropy summed over the pixels that count, over the number of all pixels, float32."""
    logits = resize(logits.astype(jnp.float32), labels.shape[1:3])
    counts = labels != IGNORED
    # An ignored pixel still needs a class that there is, for a gradient of zero and not of NaN.
    known = jnp.where(counts, labels, jnp.zeros_like(labels)).astype(jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, known)
    return jnp.sum(jnp.where(counts, loss, jnp.zeros_like(loss))) / labels.size

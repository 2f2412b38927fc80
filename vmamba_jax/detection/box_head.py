"""The box head: what is in a region, and where exactly."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vmamba_jax.detection.boxes import decode_boxes
from vmamba_jax.detection.config import InferenceConfig
from vmamba_jax.detection.nms import nms
from vmamba_jax.typing import Array, Bool, Dtype, Float, Int

_STDS = (0.1, 0.1, 0.2, 0.2)


class BoxHead(nn.Module):
    """Two hidden layers, then a class and a correction of the region for each class.

    Attributes:
        num_classes: of objects.
        features: channels of the hidden layers.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    num_classes: int = 80
    features: int = 1024
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, regions: Float[Array, "n size size C"]
    ) -> tuple[Float[Array, "n logits"], Float[Array, "n coordinates"]]:
        """Looks at the features of each region.

        Returns:
            Logits of the classes, the background last, ``num_classes + 1``; and the corrections,
            a class's four side by side, ``4 * num_classes``; float32.
        """
        dense = partial(nn.DenseGeneral, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = partial(dense, self.features, kernel_init=nn.initializers.xavier_uniform())
        x = nn.relu(hidden(axis=(-3, -2, -1), name="shared_fcs_0")(regions))
        x = nn.relu(hidden(name="shared_fcs_1")(x))
        normal = nn.initializers.normal
        logits = dense(self.num_classes + 1, kernel_init=normal(0.01), name="fc_cls")(x)
        deltas = dense(4 * self.num_classes, kernel_init=normal(0.001), name="fc_reg")(x)
        return logits.astype(jnp.float32), deltas.astype(jnp.float32)


def select_detections(
    proposals: Float[Array, "n 4"],
    filled: Bool[Array, "n"],
    logits: Float[Array, "n logits"],
    deltas: Float[Array, "n coordinates"],
    size: Int[Array, "2"],
    inference: InferenceConfig,
) -> tuple[
    Float[Array, "found 4"], Float[Array, "found"], Int[Array, "found"], Bool[Array, "found"]
]:
    """The detections in one picture: the likeliest boxes of each class that don't overlap.

    Args:
        proposals: regions, in pixels.
        filled: which of them there are.
        logits: of `BoxHead`.
        deltas: of `BoxHead`.
        size: height and width of the picture without padding, in pixels.
        inference: thresholds and the number of detections.

    Returns:
        Boxes in pixels, probabilities, classes, best first, and which of the places are filled;
        the others hold zeros.
    """
    count, classes = len(proposals), logits.shape[-1] - 1
    scores = jax.nn.softmax(logits, axis=-1)[:, :-1]
    every_class = jnp.broadcast_to(proposals[:, None], (count, classes, 4))
    boxes = decode_boxes(every_class, deltas.reshape(count, classes, 4), _STDS, size)
    labels = jnp.broadcast_to(jnp.arange(classes, dtype=jnp.int32)[None], scores.shape)
    valid = (scores > inference.score_threshold) & filled[:, None]
    boxes, scores, labels = boxes.reshape(-1, 4), scores.reshape(-1), labels.reshape(-1)
    kept, found = nms(
        boxes,
        scores,
        valid.reshape(-1),
        labels,
        iou_threshold=inference.iou_threshold,
        max_outputs=inference.max_detections,
    )
    boxes = jnp.where(found[:, None], boxes[kept], 0)
    return boxes, jnp.where(found, scores[kept], 0), jnp.where(found, labels[kept], 0), found

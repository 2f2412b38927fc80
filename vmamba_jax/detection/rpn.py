"""The region proposal network, https://arxiv.org/abs/1506.01497."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from vmamba_jax.detection.anchors import anchors_at, base_anchors
from vmamba_jax.detection.boxes import decode_boxes
from vmamba_jax.detection.config import InferenceConfig, MaskRCNNConfig
from vmamba_jax.detection.nms import nms
from vmamba_jax.typing import Array, Bool, Dtype, Float, Int

_STDS = (1.0, 1.0, 1.0, 1.0)


class RPNHead(nn.Module):
    """Of each anchor at each position of a level: is there an object, and where exactly.

    Attributes:
        features: channels of the hidden layer.
        anchors: at each position.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    features: int = 256
    anchors: int = 3
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, levels: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """One network for all levels.

        Returns:
            For each level the logits ``(B, H, W, anchors)`` and the corrections of the anchors
            ``(B, H, W, 4 * anchors)``, an anchor's four side by side; float32.
        """

        def conv(features: int, kernel: int, name: str) -> nn.Conv:
            return nn.Conv(
                features,
                (kernel, kernel),
                padding=kernel // 2,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.normal(0.01),
                name=name,
            )

        hidden, cls, reg = (
            conv(self.features, 3, "rpn_conv"),
            conv(self.anchors, 1, "rpn_cls"),
            conv(4 * self.anchors, 1, "rpn_reg"),
        )
        hiddens = [nn.relu(hidden(x)) for x in levels]
        logits = [cls(x).astype(jnp.float32) for x in hiddens]
        return logits, [reg(x).astype(jnp.float32) for x in hiddens]


def propose(
    logits: Sequence[Array],
    deltas: Sequence[Array],
    size: Int[Array, "2"],
    config: MaskRCNNConfig,
    inference: InferenceConfig,
) -> tuple[Float[Array, "proposals 4"], Float[Array, "proposals"], Bool[Array, "proposals"]]:
    """The regions of one picture that look most like objects.

    Args:
        logits: of `RPNHead`, of each level (H, W, anchors).
        deltas: of `RPNHead`, of each level (H, W, 4 * anchors).
        size: height and width of the picture without padding, in pixels.
        config: the architecture.
        inference: how many candidates and proposals, and the overlap allowed.

    Returns:
        Boxes in pixels, their probabilities, best first, and which of the places are filled; the
        others hold zeros.
    """
    boxes, scores, groups = [], [], []
    for level, (logit, delta) in enumerate(zip(logits, deltas, strict=True)):
        score = jax.nn.sigmoid(logit.reshape(-1))
        score, index = jax.lax.top_k(score, min(inference.level_proposals, len(score)))
        stride = config.strides[level]
        base = base_anchors(stride, config.anchor_scale, config.anchor_ratios)
        anchors = anchors_at(index, logit.shape[1], stride, base)
        boxes.append(decode_boxes(anchors, delta.reshape(-1, 4)[index], _STDS, size))
        scores.append(score)
        groups.append(jnp.full_like(index, level))
    boxes, scores, groups = map(jnp.concatenate, (boxes, scores, groups))
    kept, filled = nms(
        boxes,
        scores,
        (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]),
        groups,
        iou_threshold=inference.proposal_iou,
        max_outputs=inference.max_proposals,
    )
    boxes = jnp.where(filled[:, None], boxes[kept], 0)
    return boxes, jnp.where(filled, scores[kept], 0), filled

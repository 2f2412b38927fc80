"""MaskRCNN, the detector: a VMamba, a feature pyramid, and three heads."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vmamba_jax.detection.box_head import BoxHead, select_detections
from vmamba_jax.detection.config import InferenceConfig, MaskRCNNConfig
from vmamba_jax.detection.fpn import FPN
from vmamba_jax.detection.mask_head import MaskHead
from vmamba_jax.detection.roi_align import roi_align
from vmamba_jax.detection.rpn import RPNHead, propose
from vmamba_jax.models import VSSMBackbone
from vmamba_jax.models.layers import dtypes_of
from vmamba_jax.ops._parts import largest_divisor
from vmamba_jax.typing import Array, Bool, Dtype, Float, Int, Num

BOX_BINS, MASK_BINS = 7, 14
_MASKS = 20  # that the mask head makes at a time


class Detections(NamedTuple):
    """What a detector finds in pictures, in places of a fixed number.

    Attributes:
        boxes: corners ``(x1, y1, x2, y2)``, in pixels of the picture that the detector was given.
        scores: probabilities, best first.
        labels: classes, int32.
        masks: probability of each of 28 x 28 cells of a box to be of the object.
        found: which places are filled; the others hold zeros.
    """

    boxes: Float[Array, "B n 4"]
    scores: Float[Array, "B n"]
    labels: Int[Array, "B n"]
    masks: Float[Array, "B n h w"]
    found: Bool[Array, "B n"]


class MaskRCNN(nn.Module):
    """Mask R-CNN (https://arxiv.org/abs/1703.06870) on a VMamba, for inference.

    Attributes:
        config: the architecture.
        inference: how the outputs become detections.
        scan_implementation: see `vmamba_jax.ops.selective_scan`.
        dtype: compute dtype of the backbone's blocks, the pyramid and the heads; what they put out
            and all that is done with boxes is float32.
        param_dtype: dtype of the parameters.
    """

    config: MaskRCNNConfig
    inference: InferenceConfig = InferenceConfig()
    scan_implementation: str | Sequence[str] | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Names the parts as PyTorch does."""
        config, dtypes = self.config, dtypes_of(self)
        classes = config.num_classes
        self.backbone = VSSMBackbone(
            config.backbone,
            tuple(range(len(config.depths))),
            scan_implementation=self.scan_implementation,
            **dtypes,
        )
        self.neck = FPN(config.fpn_channels, **dtypes)
        self.rpn_head = RPNHead(config.rpn_channels, len(config.anchor_ratios), **dtypes)
        self.bbox_head = BoxHead(classes, config.box_channels, **dtypes)
        self.mask_head = MaskHead(classes, config.mask_channels, config.mask_convs, **dtypes)

    def __call__(self, images: Num[Array, "..."], sizes: Int[Array, "B 2"]) -> Detections:
        """Finds objects.

        Args:
            images: normalised float images (B, H, W, in_chans), padded with zeros at the bottom
                and the right; mmdetection pads to a multiple of 32.
            sizes: height and width of each without padding, in pixels.

        Raises:
            ValueError: for integer images, a wrong rank or channel count, or images too small.
        """
        levels = self.pyramid(images)
        if self.is_initializing():
            return self._initialise(levels)
        return self.detections(levels, sizes)

    def detections(self, levels: Sequence[Array], sizes: Int[Array, "B 2"]) -> Detections:
        """What is found in pictures of given levels of the pyramid and sizes."""
        boxes, _, filled = self.proposals(levels, sizes)
        logits, deltas = self.box_outputs(levels, boxes)
        select = partial(select_detections, inference=self.inference)
        boxes, scores, labels, found = jax.vmap(select)(boxes, filled, logits, deltas, sizes)
        return Detections(boxes, scores, labels, self._masks(levels, boxes, labels, found), found)

    def pyramid(self, images: Num[Array, "..."]) -> list[Array]:
        """The levels of the feature pyramid (B, H, W, C), the finest first."""
        return self.neck(self.backbone(images))

    def rpn_outputs(self, levels: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Logits and corrections of the anchors of each level, see `RPNHead`."""
        return self.rpn_head(levels)

    def proposals(
        self, levels: Sequence[Array], sizes: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B n 4"], Float[Array, "B n"], Bool[Array, "B n"]]:
        """Regions of each picture that look like objects, see `propose`."""
        logits, deltas = self.rpn_outputs(levels)
        one = partial(propose, config=self.config, inference=self.inference)
        return jax.vmap(one)(logits, deltas, sizes)

    def box_outputs(
        self, levels: Sequence[Array], boxes: Float[Array, "B n 4"]
    ) -> tuple[Float[Array, "B n logits"], Float[Array, "B n coordinates"]]:
        """Logits and corrections of regions, see `BoxHead`."""
        regions = self._regions(levels, boxes, BOX_BINS)
        logits, deltas = self.bbox_head(regions)
        return logits.reshape(*boxes.shape[:2], -1), deltas.reshape(*boxes.shape[:2], -1)

    def mask_logits(
        self, levels: Sequence[Array], boxes: Float[Array, "B n 4"]
    ) -> Float[Array, "B n h w classes"]:
        """Logits of the mask of every class in regions, see `MaskHead`."""
        logits = self.mask_head(self._regions(levels, boxes, MASK_BINS))
        return logits.reshape(*boxes.shape[:2], *logits.shape[1:])

    def _initialise(self, levels: Sequence[Array]) -> Detections:
        # Parameters depend on no box, and what is done with boxes takes long to trace.
        boxes = jnp.zeros((len(levels[0]), 1, 4), jnp.float32)
        self.rpn_outputs(levels)
        self.box_outputs(levels, boxes)
        masks = self.mask_logits(levels, boxes)[..., 0]
        one = boxes[..., 0]
        return Detections(boxes, one, one.astype(jnp.int32), masks, one.astype(bool))

    def _regions(self, levels: Sequence[Array], boxes: Array, bins: int) -> Array:
        # The coarsest level only proposes.
        maps, strides = levels[:-1], self.config.strides[:-1]
        regions = roi_align(maps, boxes, strides=strides, output_size=bins)
        return regions.reshape(-1, *regions.shape[2:])

    def _masks(self, levels: Sequence[Array], boxes: Array, labels: Array, found: Array) -> Array:
        """Probabilities of the masks of the labels, zeros where nothing was found."""
        regions = self._regions(levels, boxes, MASK_BINS)
        places = (*labels.shape, 2 * MASK_BINS, 2 * MASK_BINS)
        head, variables = self.mask_head.unbind()

        def of_labels(regions: Array, labels: Array) -> Array:
            logits = head.apply(variables, regions)
            chosen = jnp.take_along_axis(logits, labels.reshape(-1, 1, 1, 1), axis=-1)  # pyright: ignore[reportArgumentType]
            return jax.nn.sigmoid(chosen[..., 0])

        def some(part: tuple[Array, Array, Array]) -> Array:
            regions, labels, found = part
            nothing = jnp.zeros((len(labels), *places[2:]), jnp.float32)
            # Most pictures hold far fewer objects than there are places.
            masks = jax.lax.cond(found.any(), of_labels, lambda *_: nothing, regions, labels)
            return jnp.where(found.reshape(-1, 1, 1), masks, 0)

        size = largest_divisor(labels.size, _MASKS)
        parts = jax.tree.map(
            lambda x: x.reshape(-1, size, *x.shape[1:]),
            (regions, labels.reshape(-1), found.reshape(-1)),
        )
        return jax.lax.map(some, parts).reshape(places)

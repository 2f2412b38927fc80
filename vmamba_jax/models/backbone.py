"""VSSMBackbone, VMamba without its classifier: the stages' maps for a detector or a segmenter."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from vmamba_jax.config import VMambaConfig
from vmamba_jax.models.layers import norm
from vmamba_jax.models.vssm import VSSM
from vmamba_jax.typing import Array, Dtype, Num, Precision


class FeatureInfo(NamedTuple):
    """What a decoder has to know of one map.

    Attributes:
        channels: of the map.
        stride: pixels of the image from one position to the next.
    """

    channels: int
    stride: int


class VSSMBackbone(nn.Module):
    """The stages of a `VSSM`, each one's map normalised by a norm of its own.

    Its parameters are those of the VSSM under the same names, less the classifier's, and one norm
    ``outnorm{i}`` a map. A position embedding is not applied, as in the PyTorch backbone, so that
    images may be of any size.

    Attributes:
        config: the architecture; `num_classes`, `posembed` and `imgsize` play no part.
        out_indices: the stages whose maps are returned, in this order. Stages after the last one
            are not built.
        scan_implementation: see `vmamba_jax.ops.selective_scan`.
        dtype: compute dtype of the blocks, see `VSSM`.
        param_dtype: dtype of the parameters.
        scan_blocks: run the blocks of a stage in a loop, see `VSSM`.
        precision: of the float32 products outside of the blocks, see `VSSM`.
    """

    config: VMambaConfig
    out_indices: Sequence[int] = (0, 1, 2, 3)
    scan_implementation: str | Sequence[str] | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_blocks: bool = False
    precision: Precision = "highest"

    @nn.compact
    def __call__(self, images: Num[Array, "..."], train: bool = False) -> list[Array]:
        """Maps images to features.

        Args:
            images: normalised float images (B, H, W, in_chans), of any size that leaves a pixel
                in the last stage.
            train: stochastic depth and dropout (rng ``"dropout"``), and batch statistics with
                ``norm_layer="bn"``.

        Returns:
            One float32 map (B, h, w, C), or float64 if `dtype` is, for each of `out_indices`.

        Raises:
            ValueError: for integer images, a wrong rank, channel count or size, or an
                out_indices out of range.
        """
        trunk = VSSM(
            self.config.replace(posembed=False),
            scan_implementation=self.scan_implementation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            scan_blocks=self.scan_blocks,
            precision=self.precision,
            name="trunk",
        )
        nn.share_scope(self, trunk)  # the trunk's parameters are the backbone's own
        kind = self.config.norm_layer
        return [
            norm(kind, train, self.param_dtype, f"outnorm{i}")(x)
            for i, x in zip(
                self.out_indices, trunk.features(images, self.out_indices, train), strict=True
            )
        ]

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """Channels and stride of each map, in the order of `out_indices`."""
        dims = self.config.stage_dims
        step = 1 if self.config.downsample_version == "none" else 2
        return tuple(
            FeatureInfo(dims[i], self.config.patch_size * step**i) for i in self.out_indices
        )

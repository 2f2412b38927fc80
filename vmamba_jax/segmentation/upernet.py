"""UPerNet, a semantic segmenter, on a VMamba (Xiao et al., "Unified Perceptual Parsing", 2018).

The modules bear the names that mmsegmentation gives them, so that its files map onto them.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vmamba_jax.models.backbone import VSSMBackbone
from vmamba_jax.models.layers import BatchNorm, Dropout, dtypes_of
from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.typing import Array, Dtype, FeatureMap, Float, Num, ResampledMap, Size

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al., 2015
# Interpolation and means are products of matrices, which no accelerator may round.
_EXACT = jax.lax.Precision.HIGHEST


class SegmenterLogits(NamedTuple):
    """What a `UPerNet` returns.

    Attributes:
        decode: (B, h, w, classes) float32, of the size of the first stage's map.
        auxiliary: the auxiliary head's, (B, h', w', classes) float32 of the size of the map that
            it reads; for the loss alone. None if the network has no such head.
    """

    decode: Float[Array, "B h w classes"]
    auxiliary: Float[Array, "B h2 w2 classes"] | None


class UPerNet(nn.Module):
    """A VMamba backbone, a decode head over the maps of all its stages, and an auxiliary head.

    Attributes:
        config: the architecture.
        scan_implementation: see `vmamba_jax.ops.selective_scan`.
        dtype: compute dtype of the backbone's blocks and of the heads' convolutions; the heads'
            normalisations and logits are float32.
        param_dtype: dtype of the parameters.
        scan_blocks: run the blocks of a stage in a loop, see `VSSM`.
    """

    config: UPerNetConfig
    scan_implementation: str | Sequence[str] | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_blocks: bool = False

    @nn.compact
    def __call__(self, images: Num[Array, "..."], train: bool = False) -> SegmenterLogits:
        """Segments images.

        Args:
            images: normalised float images (B, H, W, in_chans), of any size that leaves a pixel
                in the last stage.
            train: stochastic depth and dropout (rng ``"dropout"``), and the batch's own statistics
                (collection ``"batch_stats"`` mutable).

        Returns:
            Logits below the images' size: `resize` brings them to it.

        Raises:
            ValueError: for integer images, or a wrong rank, channel count or size.
        """
        config, dtypes = self.config, dtypes_of(self)
        maps = VSSMBackbone(
            config.backbone,
            tuple(range(len(config.depths))),
            scan_implementation=self.scan_implementation,
            scan_blocks=self.scan_blocks,
            name="backbone",
            **dtypes,
        )(images, train)
        decode = UPerHead(
            config.num_classes,
            config.channels,
            config.pool_scales,
            config.dropout,
            name="decode_head",
            **dtypes,
        )(maps, train)
        if not config.auxiliary_channels:
            return SegmenterLogits(decode, None)
        auxiliary = FCNHead(
            config.num_classes,
            config.auxiliary_channels,
            config.dropout,
            name="auxiliary_head",
            **dtypes,
        )(maps[config.auxiliary_stage], train)
        return SegmenterLogits(decode, auxiliary)


class ConvModule(nn.Module):
    """A convolution without bias that keeps the map's size, BatchNorm, ReLU.

    Attributes:
        features: output channels.
        kernel: side of the window, odd.
        dtype: compute dtype of the convolution.
        param_dtype: dtype of the parameters.
    """

    features: int
    kernel: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Array], train: bool = False) -> Float[Array, "B H W c"]:
        """Maps (B, H, W, C) side by side, resized to the first's size, to one of `features`."""
        dtypes = dtypes_of(self)
        x = PyramidConv(self.features, self.kernel, name="conv", **dtypes)(maps)
        norm = BatchNorm(use_running_average=not train, param_dtype=self.param_dtype, name="bn")
        return jax.nn.relu(norm(x))


class PyramidConv(nn.Module):
    """A convolution without bias of several maps, as if resized to one size and concatenated.

    A smaller map is convolved by `resized_conv`, which multiplies at its own size.

    Attributes:
        features: output channels.
        kernel: side of the window, odd.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    features: int
    kernel: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> Float[Array, "B H W c"]:
        """Maps (B, H, W, C), the first of the result's size, to one of `features` channels."""
        channels = [x.shape[-1] for x in maps]
        shape = (self.kernel, self.kernel, sum(channels), self.features)
        kernel = self.param("kernel", _conv_init, shape, self.param_dtype).astype(self.dtype)
        kernels = jnp.split(kernel, list(accumulate(channels))[:-1], axis=2)
        first, *rest = (x.astype(self.dtype) for x in maps)
        by = self.kernel // 2
        y = jax.lax.conv_general_dilated(
            *(first, kernels[0], (1, 1), ((by, by), (by, by))),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        size = first.shape[1:3]
        parts = (resized_conv(x, k, size) for x, k in zip(rest, kernels[1:], strict=True))
        return sum(parts, y.astype(jnp.float32))


class UPerHead(nn.Module):
    """Pyramid pooling on the last map, a feature pyramid over all of them, a classifier of pixels.

    Attributes:
        num_classes: classes of a pixel.
        channels: of every map inside.
        pool_scales: sides of the maps that the pooling averages to.
        dropout: rate before the classifier.
        dtype: compute dtype of the convolutions.
        param_dtype: dtype of the parameters.
    """

    num_classes: int
    channels: int
    pool_scales: Sequence[int]
    dropout: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: list[Array], train: bool = False) -> Float[Array, "B h w classes"]:
        """Maps (B, H, W, C) of every stage, the largest first, to logits of the largest's size."""

        def conv(kernel: int, name: str, *maps: Array) -> Array:
            return ConvModule(self.channels, kernel, name=name, **dtypes_of(self))(maps, train)

        *lower, top = maps
        pooled = [
            conv(1, f"psp_modules_{i}", adaptive_average(top, scale))
            for i, scale in enumerate(self.pool_scales)
        ]
        top = conv(3, "bottleneck", top, *pooled)
        pyramid = [conv(1, f"lateral_convs_{i}", x) for i, x in enumerate(lower)] + [top]
        for i in reversed(range(len(lower))):
            pyramid[i] = pyramid[i] + resize(pyramid[i + 1], pyramid[i].shape[1:3])
        pyramid[:-1] = [conv(3, f"fpn_convs_{i}", x) for i, x in enumerate(pyramid[:-1])]
        x = conv(3, "fpn_bottleneck", *pyramid)
        return _classify_pixels(self.num_classes, self.dropout, x, train, self.param_dtype)


class FCNHead(nn.Module):
    """One convolution and a classifier of pixels (Long et al., 2015).

    Attributes:
        num_classes: classes of a pixel.
        channels: of the map between the two.
        dropout: rate before the classifier.
        dtype: compute dtype of the convolution.
        param_dtype: dtype of the parameters.
    """

    num_classes: int
    channels: int
    dropout: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> Float[Array, "B H W c"]:
        """``(B, H, W, C) -> (B, H, W, classes)``, float32."""
        x = ConvModule(self.channels, 3, name="convs_0", **dtypes_of(self))([x], train)
        return _classify_pixels(self.num_classes, self.dropout, x, train, self.param_dtype)


def _classify_pixels(
    num_classes: int, dropout: float, x: FeatureMap, train: bool, param_dtype: Dtype
) -> Float[Array, "B H W c"]:
    x = Dropout(dropout, broadcast_dims=(1, 2))(x, train)
    return nn.Conv(
        num_classes,
        (1, 1),
        dtype=jnp.float32,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.normal(0.01),
        name="conv_seg",
    )(x)


def resize(x: FeatureMap, size: Sequence[Size]) -> ResampledMap:
    """Resamples a map bilinearly as PyTorch's ``interpolate`` does.

    Half-pixel centres, edges repeated, no antialiasing.

    Args:
        x: a map.
        size: height and width of the result.
    """
    if x.shape[1:3] == tuple(size):
        return x
    shape = (x.shape[0], *size, x.shape[-1])
    return jax.image.resize(x, shape, "linear", antialias=False, precision=_EXACT)


def resized_conv(
    x: FeatureMap, kernel: Float[Array, "S S C c"], size: Sequence[Size]
) -> Float[Array, "B h w c"]:
    """The convolution of a map that `resize` has brought to `size`, padded to keep that size.

    Resampling mixes positions and a kernel's tap mixes channels, so that either may come first.
    Each tap multiplies the map as it is, a small part of the products at the larger size, and the
    results are resampled and shifted in one, by the rows and then by the columns.

    Args:
        x: a map.
        kernel: of odd S.
        size: height and width of the result.
    """
    products = jnp.einsum("bhwc,ijcd->bhwijd", x, kernel, preferred_element_type=jnp.float32)

    def taps(old: Size, new: Size) -> Float[Array, "S new old"]:
        """What each position of the result takes of each old one, by each tap."""
        tap = jnp.arange(len(kernel))[:, None] - len(kernel) // 2
        position = jnp.arange(new)[None] + tap
        inside = (position >= 0) & (position < new)
        old_side, new_side = (jnp.asarray(side, jnp.float32) for side in (old, new))
        at = (position.astype(jnp.float32) + 0.5) * (old_side / new_side) - 0.5
        at = jnp.clip(at, 0, old_side - 1)
        distance = jnp.abs(at[..., None] - jnp.arange(old, dtype=jnp.float32)[None, None])
        return jnp.where(inside[..., None], jnp.maximum(1 - distance, 0), 0)

    rows, columns = taps(x.shape[1], size[0]), taps(x.shape[2], size[1])
    products = jnp.einsum("iyh,bhwijd->bywjd", rows, products, precision=_EXACT)
    return jnp.einsum("jxw,bywjd->byxd", columns, products, precision=_EXACT)


def adaptive_average(x: FeatureMap, side: int) -> ResampledMap:
    """Means over `side` x `side` bins as PyTorch's ``adaptive_avg_pool2d`` lays them.

    Bin i of a side L covers ``floor(i * L / side)`` to ``ceil((i + 1) * L / side)``, so that bins
    overlap where they don't divide it.

    Args:
        x: a map.
        side: height and width of the result, in bins.
    """

    def bins(length: Size) -> Float[Array, "side length"]:
        # Of JAX's numbers, since the length of a map of any size is one only when it is run.
        i, position = jnp.arange(side)[:, None], jnp.arange(length)[None]
        first, end = i * length // side, -(-(i + 1) * length // side)
        inside = ((first <= position) & (position < end)).astype(jnp.float32)
        return inside / inside.sum(axis=1, keepdims=True)

    rows, columns = bins(x.shape[1]), bins(x.shape[2])
    x = x.astype(jnp.float32)
    return jnp.einsum("sh,bhwc,tw->bstc", rows, x, columns, precision=_EXACT)

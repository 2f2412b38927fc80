"""The feature pyramid network, https://arxiv.org/abs/1612.03144."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vmamba_jax.typing import Array, Dtype, FeatureMap, ResampledMap


class FPN(nn.Module):
    """Maps of a backbone to levels of equal channels, each with what the coarser ones know.

    Attributes:
        features: channels of each level.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    features: int = 256
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[Array]) -> list[Array]:
        """From maps (B, H, W, C), one level a map, and one of half the size of the last."""

        def conv(kernel: int, name: str) -> nn.Conv:
            return nn.Conv(
                self.features,
                (kernel, kernel),
                padding=kernel // 2,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )

        laterals = [conv(1, f"lateral_convs_{i}")(x) for i, x in enumerate(maps)]
        for i in reversed(range(len(laterals) - 1)):
            laterals[i] += _upsample(laterals[i + 1], laterals[i].shape[1], laterals[i].shape[2])
        levels = [conv(3, f"fpn_convs_{i}")(x) for i, x in enumerate(laterals)]
        return [*levels, levels[-1][:, ::2, ::2]]


def _upsample(x: FeatureMap, height: int, width: int) -> ResampledMap:
    """Repeats the position at the same share of the size, rounded down, as PyTorch does."""
    rows = np.arange(height) * x.shape[1] // height
    columns = np.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]

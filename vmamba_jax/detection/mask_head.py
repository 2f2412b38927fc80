"""The mask head, https://arxiv.org/abs/1703.06870: which part of a region is the object."""

import flax.linen as nn
import jax.numpy as jnp

from vmamba_jax.typing import Array, Dtype, Float, ResampledMap

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # Kaiming's, for ReLU


class MaskHead(nn.Module):
    """Convolutions, an upsampling to twice the size, and a mask of each class.

    Attributes:
        num_classes: of objects.
        features: channels of the hidden layers.
        convs: how many 3x3 convolutions come first.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    num_classes: int = 80
    features: int = 256
    convs: int = 4
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, regions: Float[Array, "n size size C"]) -> Float[Array, "n h w classes"]:
        """Looks at the features of each region.

        Returns:
            float32 logits of each class's mask, at twice the size.
        """

        def conv(features: int, kernel: int, name: str) -> nn.Conv:
            return nn.Conv(
                features,
                (kernel, kernel),
                padding=kernel // 2,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=_init,
                name=name,
            )

        x = regions
        for i in range(self.convs):
            x = nn.relu(conv(self.features, 3, f"convs_{i}")(x))
        x = nn.relu(Upsample(self.features, self.dtype, self.param_dtype, name="upsample")(x))
        return conv(self.num_classes, 1, "conv_logits")(x).astype(jnp.float32)


class Upsample(nn.Module):
    """A transposed convolution with a 2x2 kernel and stride 2: each position becomes four.

    Attributes:
        features: output channels.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n H W C"]) -> ResampledMap:
        """``(n, H, W, C) -> (n, 2 * H, 2 * W, features)``."""
        shape = (2, 2, x.shape[-1], self.features)
        kernel = jnp.asarray(self.param("kernel", _init, shape, self.param_dtype), self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], self.param_dtype)
        count, height, width, _ = x.shape
        # No two windows overlap: it is one linear layer to the four positions of a cell.
        y = jnp.einsum("nhwc,abcd->nhawbd", x.astype(self.dtype), kernel)
        y = y.reshape(count, 2 * height, 2 * width, self.features)
        return y + jnp.asarray(bias, self.dtype).reshape(1, 1, 1, -1)

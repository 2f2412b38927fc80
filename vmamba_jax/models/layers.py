"""The layers around SS2D: normalisation, convolutions, patch embedding, downsampling, MLPs.

Linear layers inside a block compute in `dtype`; all else is float32, or float64 where it is given
that. Initial values follow
PyTorch's defaults and VMamba's own, so that a model trained from scratch starts where the original
does.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vmamba_jax import ops
from vmamba_jax.ops.layer_norm import EPSILON
from vmamba_jax.ops.per_device import split_like
from vmamba_jax.ops.wide import wide, widened
from vmamba_jax.typing import Array, Dtype, FeatureMap, Float, Images, Precision, ResampledMap


@jax.custom_jvp
def _erf(x: Array) -> Array:
    return jax.lax.erf(x)


@_erf.defjvp
def _erf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # JAX 0.12's own derivative of erf can't be traced inside `jax.shard_map` with its checks on.
    (x,), (dx,) = primals, tangents
    return _erf(x), 2 / math.sqrt(math.pi) * jnp.exp(-x * x) * dx


def gelu(x: Array) -> Array:
    """Exact GELU by erf, PyTorch's formula; JAX's, by erfc, takes twice as long on a CPU.

    Below -8 it is zero anyway, at minus infinity only in the limit. And a select keeps XLA's CPU
    compiler from a library call for which it would write every constant out in the size of x.
    """
    return jnp.where(x < -8, 0, 0.5 * x * (1 + _erf(x * math.sqrt(0.5))))


Activation = Callable[..., Array]
"""``(x, bias=None)`` -> the activation of ``x + bias``, in float32, or wider if `x` is."""


def _widening(function: Callable[[Array], Array]) -> Activation:
    def activation(x: Array, bias: Array | None = None) -> Array:
        if bias is not None:
            x = ops.add_bias(x, bias)
        return function(widened(x))

    # For the gradient a step keeps the input only, and no erf or exponential of its size.
    return jax.checkpoint(activation)


activations: dict[str, Activation] = {
    "silu": _widening(jax.nn.silu),
    "gelu": _widening(gelu),
    "relu": _widening(jax.nn.relu),
    "sigmoid": _widening(jax.nn.sigmoid),
}
"""By name."""


def of_few_sizes(draw: nn.initializers.Initializer) -> nn.initializers.Initializer:
    """Draws a power of four of values and takes the first of them, the ones that `draw` would give.

    XLA builds the random numbers of each size anew, a third of a second on a CPU: a model has some
    forty shapes of parameters, and a few such sizes.
    """

    def init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        count = math.prod(shape)
        size = 4 ** max(4, ((count - 1).bit_length() + 1) // 2)
        return draw(key, (size,), dtype)[:count].reshape(shape)

    return init


# timm's trunc_normal_(std=0.02) cuts at +-2, a hundred standard deviations away.
linear_init = of_few_sizes(nn.initializers.normal(0.02))


def uniform_init(bound: float) -> nn.initializers.Initializer:
    """Uniform between -bound and bound."""

    def draw(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return of_few_sizes(draw)


def dtypes_of(module: Any) -> dict[str, Any]:
    """A module's compute and storage dtype, to hand on to the modules inside it."""
    return {"dtype": module.dtype, "param_dtype": module.param_dtype}


class Dense(nn.Module):
    """A linear layer with VMamba's initial values.

    Attributes:
        features: output channels.
        use_bias: whether it has a bias.
        act_layer: activation after it, a key of `activations`, which then adds the bias: a
            gradient keeps the product, and needs no second map with the bias added.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
        precision: of the product, see `jax.lax.Precision`.
    """

    features: int
    use_bias: bool = True
    act_layer: str | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... c"]:
        """Maps each position by itself."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", linear_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
            bias = jnp.asarray(bias, self.dtype)
        # Converted weights may still be NumPy arrays.
        x, kernel = jnp.asarray(x, self.dtype), jnp.asarray(kernel, self.dtype)
        linear = partial(ops.linear, precision=self.precision)
        if self.act_layer is None:
            return linear(x, kernel, bias)
        return activations[self.act_layer](linear(x, kernel), bias)


def _as_wide_as_the_map(x: Any, *weights: Any, **_: Any) -> list[Array | None]:
    """What Linen promotes a layer's arrays with; converted weights may still be NumPy arrays."""
    return [x, *(None if w is None else jnp.asarray(w, wide(x.dtype)) for w in weights)]


def conv(
    features: int,
    kernel: int,
    *,
    in_features: int,
    stride: int = 1,
    padding: int = 0,
    precision: Precision = None,
    param_dtype: Dtype,
    name: str,
) -> nn.Conv:
    """A square convolution, padded explicitly, with PyTorch's default initial values."""
    bound = (in_features * kernel * kernel) ** -0.5
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        param_dtype=param_dtype,
        kernel_init=uniform_init(bound),
        bias_init=uniform_init(bound),
        promote_dtype=_as_wide_as_the_map,
        conv_general_dilated=lambda x, kernel, *_, **__: ops.strided_conv(
            widened(x), kernel, stride=stride, padding=padding, precision=precision
        ),
        name=name,
    )


def depthwise_conv(
    features: int, kernel: int, *, use_bias: bool, param_dtype: Dtype, name: str
) -> nn.Conv:
    """A convolution of each channel by itself, widened; an odd kernel keeps the map's size."""
    bound = 1 / kernel
    return nn.Conv(
        features,
        (kernel, kernel),
        feature_group_count=features,
        use_bias=use_bias,
        param_dtype=param_dtype,
        kernel_init=uniform_init(bound),
        bias_init=uniform_init(bound),
        # No matrix unit multiplies here: nothing needs rounding to the compute dtype.
        promote_dtype=_as_wide_as_the_map,
        conv_general_dilated=lambda x, kernel, *_, **__: ops.depthwise_conv(x, kernel[:, :, 0]),
        name=name,
    )


class LayerNorm(nn.Module):
    """LayerNorm over the channels, in float32, or wider if it is given that: see `ops.layer_norm`.

    Attributes:
        dtype: what the normalised map is rounded to, and kept in for the gradient, before it is
            scaled; None rounds nothing.
        param_dtype: dtype of the parameters.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:
        """Normalises each position by itself; the shape stays."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        # Converted weights may still be NumPy arrays.
        return ops.layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.dtype)


class BatchNorm(nn.BatchNorm):
    """BatchNorm as PyTorch's, in float32, or wider if it is given that.

    The variance is taken in a second pass, as the fast way cancels when the mean is large; a batch
    is normalised by the biased one, and the running one is unbiased.
    """

    epsilon: float = EPSILON
    momentum: float = 0.9  # PyTorch's 0.1, counted from the other end
    use_fast_variance: bool = False

    @nn.compact
    def __call__(self, x: FeatureMap) -> FeatureMap:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalises each channel; the shape stays."""
        before = self.get_variable("batch_stats", "var")
        x = widened(x)
        with jax.numpy_dtype_promotion("standard"):  # Linen's statistics are float32 beside float64
            y = super().__call__(x).astype(x.dtype)
        if not self.use_running_average and not self.is_initializing():
            biased = self.get_variable("batch_stats", "var") - self.momentum * before
            count = x.size // x.shape[-1]
            unbiased = biased * (count / max(count - 1, 1))
            self.put_variable("batch_stats", "var", self.momentum * before + unbiased)
        return y


def norm(
    kind: str, train: bool, param_dtype: Dtype, name: str, dtype: Dtype | None = None
) -> LayerNorm | BatchNorm:
    """The normalisation of a config: ``"ln"``, ``"ln2d"`` (the same, channels-last) or ``"bn"``.

    `dtype` is that of `LayerNorm`.
    """
    if kind == "bn":
        return BatchNorm(use_running_average=not train, param_dtype=param_dtype, name=name)
    return LayerNorm(dtype=dtype, param_dtype=param_dtype, name=name)


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014) that draws as Linen's, under Explicit meshes too.

    Attributes:
        rate: share of the values that become zero; the others grow to keep the mean.
        broadcast_dims: axes along which values are dropped together; (1, 2) drops whole channels.
    """

    rate: float
    broadcast_dims: Sequence[int] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], train: bool = False) -> Float[Array, "B ..."]:
        """Drops values in training (rng ``"dropout"``); the shape stays."""
        if not train or self.rate == 0:
            return x
        shape = [1 if axis in self.broadcast_dims else n for axis, n in enumerate(x.shape)]
        kept = split_like(jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape), x)
        return jnp.where(jnp.broadcast_to(kept, x.shape), x / (1 - self.rate), jnp.zeros_like(x))


class PatchEmbed(nn.Module):
    """Image to feature map, one position a patch.

    Attributes:
        features: output channels.
        patch_size: side of a patch, in pixels.
        version: ``"v1"``: one convolution of stride `patch_size`; ``"v2"``: two overlapping ones
            of half that stride with GELU between.
        patch_norm: whether the convolutions are normalised.
        norm_layer: see `norm`.
        param_dtype: dtype of the parameters; it computes in float32, or wider if it is given that.
        precision: of its products, see `jax.lax.Precision`.
    """

    features: int
    patch_size: int = 4
    version: str = "v1"
    patch_norm: bool = True
    norm_layer: str = "ln"
    param_dtype: Dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, images: Images, train: bool = False) -> FeatureMap:
        """``(B, H, W, 3) -> (B, H / patch, W / patch, C)``, widened."""

        def normalise(x: FeatureMap, name: str) -> FeatureMap:
            if not self.patch_norm:
                return x
            return norm(self.norm_layer, train, self.param_dtype, name)(x)

        convolve = partial(conv, param_dtype=self.param_dtype, precision=self.precision)
        channels = images.shape[-1]
        if self.version == "v1":
            patch = self.patch_size
            x = convolve(self.features, patch, stride=patch, in_features=channels, name="conv")(
                images
            )
            return normalise(x, "norm")
        stride = self.patch_size // 2
        half = self.features // 2
        overlapping = partial(convolve, kernel=stride + 1, stride=stride, padding=1)
        x = overlapping(half, in_features=channels, name="conv1")(images)
        x = activations["gelu"](normalise(x, "norm1"))
        x = overlapping(self.features, in_features=half, name="conv2")(x)
        return normalise(x, "norm2")


class PatchMerging(nn.Module):
    """Swin's downsampling: the four positions of each 2x2 cell side by side, normalised, projected.

    A map of odd size is padded by one row or column of zeros at its end.

    Attributes:
        features: output channels.
        norm_layer: see `norm`.
        param_dtype: dtype of the parameters; it computes in float32, or wider if it is given that.
        precision: of its products, see `jax.lax.Precision`.
    """

    features: int
    norm_layer: str = "ln"
    param_dtype: Dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> ResampledMap:
        """``(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), features)``."""
        batch, height, width, channels = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
        # The column offset varies slowest in PyTorch's concatenation.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(*x.shape[:2], x.shape[3], 4 * channels)
        x = norm(self.norm_layer, train, self.param_dtype, "norm")(x)
        reduction = Dense(
            self.features,
            use_bias=False,
            dtype=x.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name="reduction",
        )
        return reduction(x)


class ConvDownsample(nn.Module):
    """Downsampling by a convolution of stride 2, normalised.

    Attributes:
        features: output channels.
        kernel: 2 (no padding: an odd row or column is dropped) or 3 (padded by one).
        norm_layer: see `norm`.
        param_dtype: dtype of the parameters; it computes in float32, or wider if it is given that.
        precision: of its products, see `jax.lax.Precision`.
    """

    features: int
    kernel: int = 3
    norm_layer: str = "ln"
    param_dtype: Dtype = jnp.float32
    precision: Precision = None

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> ResampledMap:
        """``(B, H, W, C) -> (B, H / 2, W / 2, features)``, rounded down (kernel 2) or up (3)."""
        x = conv(
            self.features,
            self.kernel,
            stride=2,
            padding=self.kernel - 2,
            in_features=x.shape[-1],
            name="conv",
            param_dtype=self.param_dtype,
            precision=self.precision,
        )(x)
        return norm(self.norm_layer, train, self.param_dtype, "norm")(x)


class Mlp(nn.Module):
    """Two linear layers with an activation between.

    Attributes:
        hidden_features: channels between the two.
        act_layer: activation, a key of `activations`.
        dropout: rate after the activation and after the output.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    hidden_features: int
    act_layer: str = "gelu"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> FeatureMap:
        """Maps each position by itself; the shape stays."""
        dtypes = dtypes_of(self)
        drop = partial(Dropout(self.dropout), train=train)
        hidden = Dense(self.hidden_features, act_layer=self.act_layer, name="fc1", **dtypes)(x)
        return drop(Dense(x.shape[-1], name="fc2", **dtypes)(drop(hidden)))


class GatedMlp(nn.Module):
    """An MLP whose hidden layer is the product of a linear and an activated half.

    Attributes:
        hidden_features: channels of each half.
        act_layer: activation of the gate, a key of `activations`.
        dropout: rate after the output.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    hidden_features: int
    act_layer: str = "gelu"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> FeatureMap:
        """Maps each position by itself; the shape stays."""
        dtypes = dtypes_of(self)
        both = Dense(2 * self.hidden_features, name="fc1", **dtypes)(x)
        hidden, gate = jnp.split(both, 2, axis=-1)
        hidden = widened(hidden) * activations[self.act_layer](gate)
        out = Dense(x.shape[-1], name="fc2", **dtypes)(hidden)
        return Dropout(self.dropout)(out, train)

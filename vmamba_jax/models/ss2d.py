"""SS2D, VMamba's token mixer: project, convolve, scan the map along four routes, gate, project."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax.config import parse_forward_type
from vmamba_jax.models.layers import (
    Dense,
    Dropout,
    LayerNorm,
    activations,
    depthwise_conv,
    dtypes_of,
    of_few_sizes,
    uniform_init,
)
from vmamba_jax.ops import selective_scan_2d, ssd_2d
from vmamba_jax.ops.wide import widened
from vmamba_jax.typing import Array, Dtype, FeatureMap

ROUTES = 4

# Range of the step sizes at the start (Mamba, section 3.6).
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


@of_few_sizes
def dt_bias_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Biases whose softplus is log-uniform between `DT_MIN` and `DT_MAX`."""
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    dt = jnp.maximum(dt, DT_FLOOR)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)  # the inverse of softplus


def a_logs_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """``log(1 .. N)`` for every channel (S4D-real)."""
    del key
    return jnp.broadcast_to(jnp.asarray(np.log(np.arange(1, shape[-1] + 1)), dtype), shape)


class SS2D(nn.Module):
    """The 2-D selective scan operator (VMamba, section 4).

    Attributes:
        d_state: state size N.
        ssm_ratio: inner over outer channels.
        dt_rank: rank R of the delta projection (heads, for ``"m0"``); ``"auto"``: ceil(C / 16).
        act_layer: activation after the convolution and of the gate.
        d_conv: kernel size of the depthwise convolution; below 2 leaves it out.
        conv_bias: whether that convolution has a bias.
        dropout: rate after the output projection.
        initialize: initial values of A, D and the delta projection: ``"v0"`` (Mamba's), ``"v1"``
            (normal), ``"v2"`` (constant and uniform).
        forward_type: variant, see `vmamba_jax.config.parse_forward_type`. ``"v0"`` fixes the
            activation to SiLU, the convolution to 3x3 with bias and the initialisation to v0.
        scan_implementation: see `vmamba_jax.ops.selective_scan`.
        dtype: compute dtype; the scan itself is float32 inside.
        param_dtype: dtype of the parameters.
    """

    d_state: int = 16
    ssm_ratio: float = 2.0
    dt_rank: int | str = "auto"
    act_layer: str = "silu"
    d_conv: int = 3
    conv_bias: bool = True
    dropout: float = 0.0
    initialize: str = "v0"
    forward_type: str = "v2"
    scan_implementation: str | Sequence[str] | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> FeatureMap:
        """Mixes the positions of a map; the shape stays.

        Raises:
            ValueError: for an unknown `forward_type`, or one that the other attributes do not fit.
        """
        variant = parse_forward_type(self.forward_type)
        first_release = variant.operator == "v0"
        act = activations["silu" if first_release else self.act_layer]
        d_conv = 3 if first_release else self.d_conv
        conv_bias = True if first_release else self.conv_bias
        dtypes = dtypes_of(self)
        channels = x.shape[-1]
        inner = int(self.ssm_ratio * channels)

        x = Dense(inner * (1 + variant.gate), use_bias=False, name="in_proj", **dtypes)(x)
        gate = None
        if variant.gate:
            x, gate = jnp.split(x, 2, axis=-1)
            gate = act(gate) if variant.gate_act else widened(gate)
        if d_conv > 1:
            x = depthwise_conv(
                inner, d_conv, use_bias=conv_bias, name="conv2d", param_dtype=self.param_dtype
            )(x)
        x = act(x).astype(self.dtype)
        y = self._mamba2(x, channels) if variant.operator == "m0" else self._scan(x, channels)
        y = self._out_norm(y, variant.out_norm)
        y = activations["gelu"](y) if variant.out_act else y
        y = y if gate is None else y * gate
        y = Dense(channels, use_bias=False, name="out_proj", **dtypes)(y)
        return Dropout(self.dropout)(y, train)

    def _rank(self, channels: int) -> int:
        return math.ceil(channels / 16) if self.dt_rank == "auto" else int(self.dt_rank)

    def _weight(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype: Dtype
    ) -> Array:
        # Converted weights may still be NumPy arrays.
        return jnp.asarray(self.param(name, init, (ROUTES, *shape), self.param_dtype), dtype)

    def _x_proj(self, rank: int, inner: int) -> Array:
        shape = (rank + 2 * self.d_state, inner)
        return self._weight("x_proj_weight", uniform_init(inner**-0.5), shape, self.dtype)

    def _scan(self, x: FeatureMap, channels: int) -> FeatureMap:
        variant = parse_forward_type(self.forward_type)
        initialize = "v0" if variant.operator == "v0" else self.initialize
        rank, inner, states = self._rank(channels), x.shape[-1], self.d_state
        a_logs, dt_proj, dt_bias = {
            "v0": (a_logs_init, uniform_init(rank**-0.5), dt_bias_init),
            "v1": (
                nn.initializers.normal(1.0),
                nn.initializers.normal(0.1),
                nn.initializers.normal(0.1),
            ),
            "v2": (
                nn.initializers.zeros,
                nn.initializers.uniform(0.1),
                nn.initializers.uniform(0.1),
            ),
        }[initialize]
        dtype = self.param_dtype
        return selective_scan_2d(
            x,
            self._x_proj(rank, inner),
            self._weight("dt_projs_weight", dt_proj, (inner, rank), self.dtype),
            self._weight("dt_projs_bias", dt_bias, (inner,), dtype),
            self._weight("A_logs", a_logs, (inner, states), dtype),
            self._weight("Ds", nn.initializers.ones, (inner,), dtype),
            order=variant.scan_order,
            force_fp32=variant.force_fp32,
            implementation=self.scan_implementation,
        )

    def _mamba2(self, x: FeatureMap, channels: int) -> FeatureMap:
        heads, inner = self._rank(channels), x.shape[-1]
        if inner % heads:
            raise ValueError(
                f"forward_type 'm0' needs heads ({heads}) to divide channels ({inner})"
            )
        if self.initialize not in ("v1", "v2"):
            raise ValueError("forward_type 'm0' needs initialize 'v1' or 'v2'")
        normal = self.initialize == "v1"
        a_logs = nn.initializers.normal(1.0) if normal else nn.initializers.zeros
        dt_bias = nn.initializers.normal(0.1) if normal else nn.initializers.uniform(0.1)
        dtype = self.param_dtype
        return ssd_2d(
            x,
            self._x_proj(heads, inner),
            self._weight("dt_projs_bias", dt_bias, (heads,), dtype),
            self._weight("A_logs", a_logs, (heads,), dtype),
            self._weight("Ds", nn.initializers.ones, (heads, inner // heads), dtype),
        )

    def _out_norm(self, y: FeatureMap, kind: str) -> FeatureMap:
        if kind == "none":
            return y
        if kind == "sigmoid":
            return jax.nn.sigmoid(y)
        if kind == "softmax":
            return jax.nn.softmax(y, axis=(1, 2))  # over the positions, channel by channel
        if kind == "dwconv3":
            return depthwise_conv(
                y.shape[-1], 3, use_bias=False, name="out_norm_conv", param_dtype=self.param_dtype
            )(y)
        y = LayerNorm(name="out_norm", **dtypes_of(self))(y)
        if kind == "cnorm":
            y = depthwise_conv(
                y.shape[-1], 3, use_bias=False, name="out_norm_conv", param_dtype=self.param_dtype
            )(y)
        return y

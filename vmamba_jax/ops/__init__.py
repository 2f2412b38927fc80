"""Pure functions on arrays: selective scans, 2-D traversal orders, the Mamba-2 form. No Flax."""

from vmamba_jax.ops.depthwise import depthwise_conv
from vmamba_jax.ops.layer_norm import layer_norm
from vmamba_jax.ops.linear import add_bias, linear
from vmamba_jax.ops.scan_2d import selective_scan_2d, ssd_2d
from vmamba_jax.ops.scan_order import cross_merge, cross_scan
from vmamba_jax.ops.selective_scan import IMPLEMENTATIONS, selective_scan
from vmamba_jax.ops.ssd import ssd
from vmamba_jax.ops.strided_conv import strided_conv

__all__ = [
    "IMPLEMENTATIONS",
    "add_bias",
    "cross_merge",
    "cross_scan",
    "depthwise_conv",
    "layer_norm",
    "linear",
    "selective_scan",
    "selective_scan_2d",
    "ssd",
    "ssd_2d",
    "strided_conv",
]

"""What a model costs and what it looks at.

Functions that return arrays; `vmamba_jax.analysis.figures` draws them, and the command
``vmamba-jax analyze`` does both for image files.
"""

from vmamba_jax.analysis.activation import ActivationMaps, activation_maps
from vmamba_jax.analysis.erf import contribution_area, effective_receptive_field
from vmamba_jax.analysis.features import map_colors, map_norm, stage_maps
from vmamba_jax.analysis.flops import summarize
from vmamba_jax.analysis.resolution import Resolution, resolution_sweep

__all__ = [
    "ActivationMaps",
    "Resolution",
    "activation_maps",
    "contribution_area",
    "effective_receptive_field",
    "map_colors",
    "map_norm",
    "resolution_sweep",
    "stage_maps",
    "summarize",
]

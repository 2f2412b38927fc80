"""The VMamba modules, Flax Linen, channels-last."""

from vmamba_jax.models.backbone import FeatureInfo, VSSMBackbone
from vmamba_jax.models.layers import GatedMlp, Mlp, PatchEmbed, PatchMerging
from vmamba_jax.models.ss2d import SS2D
from vmamba_jax.models.vssm import VSSM, VSSBlock

__all__ = [
    "SS2D",
    "VSSM",
    "FeatureInfo",
    "GatedMlp",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "VSSBlock",
    "VSSMBackbone",
]

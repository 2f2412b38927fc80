"""VMamba, the visual state space model, in functional Flax."""

from vmamba_jax.config import VMambaConfig
from vmamba_jax.detection import MaskRCNN, create_detector
from vmamba_jax.models import SS2D, VSSM, VSSBlock, VSSMBackbone
from vmamba_jax.ops import selective_scan
from vmamba_jax.registry import (
    create_backbone,
    create_model,
    list_models,
    model_config,
    register_model,
)
from vmamba_jax.segmentation import UPerNet, create_segmenter

__version__ = "0.1.0"

__all__ = [
    "SS2D",
    "VSSM",
    "MaskRCNN",
    "UPerNet",
    "VMambaConfig",
    "VSSBlock",
    "VSSMBackbone",
    "__version__",
    "create_backbone",
    "create_detector",
    "create_model",
    "create_segmenter",
    "list_models",
    "model_config",
    "register_model",
    "selective_scan",
]

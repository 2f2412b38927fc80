"""VMamba, the visual state space model, in functional Flax."""

from vmamba_jax.config import VMambaConfig

__version__ = "0.1.0"

__all__ = ["VMambaConfig", "__version__"]

"""Models as programs of StableHLO that run without this package and without Flax.

Writing loads Flax; reading, `load_exported`, needs JAX and NumPy alone, and so do the few lines of
docs/guides/export.md that read a file without this package.
"""

from vmamba_jax.export.artifact import ExportedModel, load_exported
from vmamba_jax.export.program import export_model

__all__ = ["ExportedModel", "export_model", "load_exported"]

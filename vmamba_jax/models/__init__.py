"""The VMamba modules, Flax Linen."""

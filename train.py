"""Trains a VMamba; `python train.py --help` lists what can be set."""

import sys

from vmamba_jax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())

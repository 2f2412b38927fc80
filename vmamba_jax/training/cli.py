"""The command line behind train.py: which command, which preset, one clear error."""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from vmamba_jax._closest import closest
from vmamba_jax.checkpoint import CheckpointError
from vmamba_jax.training.config import PRESETS, RunConfig
from vmamba_jax.training.loop import RunError, train
from vmamba_jax.training.report import NotFiniteError

_DESCRIPTION = f"""Train a VMamba.

python train.py [PRESET] [OPTIONS]; without arguments: handwritten digits, in a few minutes.
Presets: {", ".join(PRESETS)}. The same command again goes on where a run stopped.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line; that of the process by default.

    Returns:
        The exit status: 0, or 1 after an error message.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "digits"
    console = Console(highlight=False)
    try:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}." + closest(preset, PRESETS))
        config = tyro.cli(
            RunConfig,
            args=arguments,
            default=PRESETS[preset],
            prog=f"train.py {preset}",
            description=_DESCRIPTION,
        )
        result = train(config, console)
    except (ValueError, RunError, NotFiniteError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result is not None:
        print(f"held-out accuracy {100 * result.accuracy:.2f}%")
    return 0

"""The command line of training: which command, which preset, one clear error.

It is train.py, and ``vmamba-jax train``.
"""

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import tyro
from rich.console import Console

from vmamba_jax._closest import closest
from vmamba_jax.errors import told
from vmamba_jax.local_path import check_arguments
from vmamba_jax.training.classification import evaluate_classifier
from vmamba_jax.training.config import PRESETS, EvalConfig, RunConfig, from_json
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.loop import train
from vmamba_jax.training.report import NotFiniteError
from vmamba_jax.training.segmentation import evaluate_segmenter
from vmamba_jax.training.segmentation_config import (
    SEGMENTATION_PRESETS,
    AnyRun,
    SegmentationConfig,
    SegmentationEvalConfig,
)
from vmamba_jax.training.sharding import MeshConfig, join_processes
from vmamba_jax.training.start import RunError, kind_of_run
from vmamba_jax.training.throughput import ThroughputConfig, measure_throughput
from vmamba_jax.training.topology import CompileConfig, TopologyError, compile_for_topology

_PRESETS: dict[str, AnyRun] = {**PRESETS, **SEGMENTATION_PRESETS}
_COMMANDS: dict[str, tuple[type[AnyRun], ...]] = {
    "train": (RunConfig, SegmentationConfig),
    "eval": (EvalConfig, SegmentationEvalConfig),
    "throughput": (ThroughputConfig,),
    "compile": (CompileConfig,),
}
"""What each command takes: a classifier's configuration and, where it can, a segmenter's."""
_DESCRIPTION = f"""Train a VMamba.

{{prog}} [COMMAND] [PRESET] [OPTIONS]

Commands: train (the default); eval, the held-out accuracy or mean IoU of a run, with the run's own
settings, or of pretrained weights; throughput, in images per second; compile, which tells whether a
run fits a TPU.
Presets: {", ".join(PRESETS)} classify; {", ".join(SEGMENTATION_PRESETS)} segment.
Without arguments: train digits, in a few minutes.
The same command again goes on where a run stopped.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Runs a command.

    Args:
        arguments: the command line; that of the process by default.
        prog: what the command line calls itself.

    Returns:
        The exit status: 0, also of a run that a signal ended; 1 after an error message; 130 if it
        was interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words[:1] and words[0] in _COMMANDS else "train"
    stop = StopRequest()
    with ExitStack() as stack:
        if command == "train":
            stack.enter_context(stop)
            if arguments is None:
                # Of a process that ends after this a signal must not change the exit status.
                stack.pop_all()
        try:
            return _run(command, words, prog, stop)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            _leave_others(130)
            return 130


def _leave_others(status: int) -> None:
    """Ends a failed process of several at once, and so has the others hear of it.

    At its usual end JAX would wait for the others, which wait for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(command: str, arguments: list[str], prog: str, stop: StopRequest) -> int:
    console = Console(highlight=False)
    try:
        check_arguments(arguments)
        config = _parse(command, arguments, prog)
        join_processes(config.mesh)
        match config:
            case EvalConfig():
                result = evaluate_classifier(config, console)
            case SegmentationEvalConfig():
                result = evaluate_segmenter(config, console)
            case ThroughputConfig():
                measure_throughput(config, console)
                return 0
            case CompileConfig():
                compile_for_topology(config, console)
                return 0
            case _:
                result = train(config, console, stop)
    except (ValueError, OSError, RunError, NotFiniteError, TopologyError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        _leave_others(1)
        return 1
    except Exception:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            _leave_others(1)
        raise
    if result is not None and jax.process_index() == 0:
        print(result.headline())
    return 0


def _parse(command: str, arguments: list[str], prog: str) -> AnyRun:
    """Reads ``[PRESET] [OPTIONS]``; the preset gives the task and the options' defaults."""
    preset, options = "digits", arguments
    if arguments and not arguments[0].startswith("-"):
        preset, *options = arguments
    if preset not in _PRESETS:
        raise ValueError(
            f"unknown command or preset {preset!r}." + closest(preset, (*_COMMANDS, *_PRESETS))
        )
    recipe = _PRESETS[preset]
    if command == "eval":
        recipe = _settings_of_run(recipe, options)
    kind = next((kind for kind in _COMMANDS[command] if issubclass(kind, type(recipe))), None)
    if kind is None:
        raise ValueError(f"{command} is for classifiers, and preset {preset!r} segments")
    default = kind(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)})
    return tyro.cli(
        kind,
        args=options,
        default=default,
        prog=f"{prog.removesuffix(f' {command}')} {command} {preset}",
        description=_DESCRIPTION.format(prog=prog),
    )


def _settings_of_run(recipe: AnyRun, options: list[str]) -> AnyRun:
    """The settings that a run was trained with, if it is there; else the preset's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=recipe.run)
    run = parser.parse_known_args(options)[0].run
    try:
        saved = json.loads((run / "config.json").read_text())
        recipe = from_json(kind_of_run(saved), saved)
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(f"{run / 'config.json'}: {error}") from error
    # Its devices may be others here, and what it started from is not what it came to.
    return dataclasses.replace(recipe, run=run, mesh=MeshConfig(), init_from=None)

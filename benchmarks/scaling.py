"""The largest batch that a TPU holds, and the time to compile: needs libtpu, but no TPU.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --mesh    # the same step on 64 chips and on 1,024

Every step is compiled by `python train.py compile` in a process of its own. The batches are powers
of two: the next is compiled too, unless twice the temporaries of the last are more than there is.
What the results hold already is not compiled again: delete them to begin anew.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from _measure import RESULTS, environment, report

SETTINGS = ("--model.scan-blocks", "--model.recompute", "scan_inputs", "--mesh.fsdp", "16")
MODELS = ("imagenet-tiny", "imagenet-small", "imagenet-base")
# The topology, its devices and the batch a device to begin with.
TOPOLOGIES = (("v5e:4x4", 16, 256), ("v5e:16x16", 256, 256), ("v6e:8x8", 64, 512))
MESHES = (("v5p:4x4x4", 64), ("v5p:8x8x16", 1024))
REPOSITORY = Path(__file__).parent.parent


def main() -> None:
    """Compiles each and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", action="store_true", help="one step on meshes of two sizes")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu serves one process at a time
    if options.mesh:
        found = Found("scaling_mesh")
        for topology, devices in MESHES:
            found.step("imagenet-tiny", topology, devices, 64)
        return
    found = Found("scaling")
    for model, (topology, devices, images) in itertools.product(MODELS, TOPOLOGIES):
        largest(partial(found.step, model, topology, devices), images)


class Found:
    """The rows of a result, written after each, as they take minutes."""

    def __init__(self, name: str) -> None:
        """Begins with what the result of that name holds."""
        self.name, path = name, RESULTS / f"{name}.json"
        self.rows = json.loads(path.read_text())["rows"] if path.exists() else []

    def step(self, model: str, topology: str, devices: int, images: int) -> dict[str, Any]:
        """The row of a step, compiled unless it is there."""
        key = {"preset": model, "topology": topology, "batch": images * devices}
        for row in self.rows:
            if key.items() <= row.items():
                return row
        row = key | {"images a device": images} | compiled(**key)
        self.rows.append(row | {"commit": environment()["commit"]})
        report(self.name, self.rows, settings=" ".join(SETTINGS))
        return row


def largest(step: Callable[[int], dict[str, Any]], images: int) -> None:
    """Compiles for fewer images until they fit, or for more while they do."""
    row = step(images)
    while not row["fits"] and images > 1:
        images //= 2
        row = step(images)
        if row["fits"]:
            return
    while row["fits"] and row["total GiB"] + row["temporaries GiB"] <= row["memory GiB"]:
        images *= 2
        row = step(images)


def compiled(preset: str, topology: str, batch: int) -> dict[str, Any]:
    """What `train.py compile` tells of one step, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = ["train.py", "compile", preset, "--topology", topology]
        command += ["--data.batch-size", str(batch), *SETTINGS]
        print("$ python", *command, flush=True)
        command = [sys.executable, *command, "--output", str(output)]
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if run.returncode:
            if "does not fit" not in run.stdout + run.stderr:
                sys.exit(run.stdout + run.stderr)
            return {"fits": False}
        found = json.loads(output.read_text())
    size = {name: amount / 2**30 for name, amount in found["bytes_per_device"].items()}
    return {
        "fits": found["fits"],
        "total GiB": size["total"],
        "temporaries GiB": size["temporaries"],
        "memory GiB": found["memory_of_a_device"] / 2**30,
        "compile s": found["compile_seconds"],
        "lowering s": found["lowering_seconds"],
        "collectives": found["collectives"],
        "libtpu": found["versions"]["libtpu"],
    }


if __name__ == "__main__":
    main()

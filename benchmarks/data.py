"""How many photographs a second the host pipeline decodes and augments, per core and in all.

    python benchmarks/data.py [--beside CHECKOUT] [--output RESULT.json]

Works on JPEG files of about 500x375 pixels, ImageNet's usual size, cut out of the photographs that
ship with scikit-learn. First each step alone in one thread, the mean over all files; then the
whole pipeline with threads and with worker processes, batches of 32, each in a process of its own.
With `--beside` the pipeline of another checkout of this project takes turns with this one's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images

from vmamba_jax.data import (
    DigitsTransform,
    EvalTransform,
    RandAugment,
    TrainTransform,
    open_source,
    train_iterator,
)
from vmamba_jax.data.augment import random_resized_crop

FILES = 96
BATCH = 32
SECONDS = 5.0
ROUNDS = 3


def write_photographs(root: Path) -> float:
    """Writes ``root/train/{china,flower}/*.jpg``; returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        photo = Image.fromarray(pixels)  # 640x427
        for index in range(FILES // 2):
            left, top = int(rng.integers(80)), int(rng.integers(30))
            box = (left, top, left + 528, top + 396)
            crop = photo.resize((500, 375), Image.Resampling.LANCZOS, box=box)
            crop.save(folder / f"{index}.jpg", quality=92)
    files = list(root.rglob("*.jpg"))
    return sum(path.stat().st_size for path in files) / len(files)


def milliseconds(step: Callable[[int], Any]) -> float:
    """Mean time of a step over three rounds of all files; augmentation differs at every call."""
    start = time.perf_counter()
    for index in range(3 * FILES):
        step(index)
    return 1e3 * (time.perf_counter() - start) / (3 * FILES)


def time_steps(root: Path) -> dict[str, float]:
    """Milliseconds an image of each step, in one thread."""
    source = open_source("image_folder", root, "train")
    photos = [source[index]["image"] for index in range(FILES)]
    rng = np.random.default_rng(0)
    crops = [random_resized_crop(p, 224, (0.08, 1.0), (3 / 4, 4 / 3), rng) for p in photos]
    policy, train, evaluate = RandAugment(), TrainTransform(), EvalTransform()
    digits = open_source("digits", "", "train")
    move = DigitsTransform()

    def both(transform: Any, index: int) -> Any:
        return transform(source[index % FILES]["image"], rng)

    return {
        "decode": milliseconds(lambda i: source[i % FILES]),
        "random resized crop": milliseconds(
            lambda i: random_resized_crop(photos[i % FILES], 224, (0.08, 1.0), (3 / 4, 4 / 3), rng)
        ),
        "RandAugment": milliseconds(lambda i: policy(crops[i % FILES], rng)),
        "training sample, whole": milliseconds(lambda i: both(train, i)),
        "evaluation sample, whole": milliseconds(lambda i: both(evaluate, i)),
        "digit, whole": milliseconds(lambda i: move(digits[i]["image"], rng)),
    }


def images_per_second(root: Path, worker_count: int) -> tuple[float, float]:
    """Of the whole pipeline: images a second, and images a second of processor time."""
    source = open_source("image_folder", root, "train")
    batches = train_iterator(
        source, TrainTransform(), batch_size=BATCH, seed=0, worker_count=worker_count
    )
    try:
        for _ in range(2 + 2 * worker_count):  # workers start, buffers fill
            next(batches)
        start, cpu, count = time.perf_counter(), processor_time(), 0
        while time.perf_counter() - start < SECONDS:
            next(batches)
            count += BATCH
        wall = time.perf_counter() - start
        return count / wall, count / (processor_time() - cpu)
    finally:
        batches.close()


def processor_time() -> float:
    """Seconds of processor time used by this process and, on Linux, its running children."""
    total = time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in task.read_text().split():
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(checkout: Path) -> str:
    """The commit of a checkout, marked where the tree differs from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def in_turn(root: Path, checkouts: dict[str, Path], workers: int) -> dict[str, Any]:
    """The median rates of each checkout's pipeline, and the median of the rounds' ratios."""
    rates: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    for _ in range(ROUNDS):
        for name, checkout in checkouts.items():
            command = [sys.executable, __file__, "--photographs", str(root)]
            run = subprocess.run(
                [*command, "--workers", str(workers)],
                env=os.environ | {"PYTHONPATH": str(checkout)},
                check=True,
                capture_output=True,
                text=True,
            )
            rates[name].append(json.loads(run.stdout.splitlines()[-1]))
    entry: dict[str, Any] = {}
    for name, pairs in rates.items():
        rate, per_core = np.median(pairs, axis=0)
        entry[name] = {
            "images_per_second": round(rate, 1),
            "images_per_second_of_one_core": round(per_core, 1),
        }
    if len(rates) > 1:
        ours, theirs = (np.array(pairs) for pairs in rates.values())
        ratio, per_core = np.median(ours / theirs, axis=0)
        entry["ratio"] = {
            "images_per_second": round(ratio, 2),
            "images_per_second_of_one_core": round(per_core, 2),
        }
    return entry


def main() -> None:
    """Measures, prints a table and, given a path, writes the result there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", type=Path, help="another checkout of this project")
    parser.add_argument("--output", type=Path, help="where the result is written")
    parser.add_argument("--photographs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.photographs is not None:
        print(json.dumps(images_per_second(given.photographs, given.workers)))
        return
    here = Path(__file__).parents[1]
    checkouts = {"this": here} | ({} if given.beside is None else {"beside": given.beside})
    result: dict[str, Any] = {
        "command": "python benchmarks/data.py" + (" --beside CHECKOUT" if given.beside else ""),
        "date": date.today().isoformat(),
        "commits": {name: commit(checkout) for name, checkout in checkouts.items()},
        "device": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("pillow", "numpy", "grain")},
            "libjpeg-turbo": str(features.version_feature("libjpeg_turbo")),
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_photographs(root)
        result["images"] = f"{FILES} JPEG files, 500x375, {size / 1e3:.0f} kB on average"
        result["milliseconds_per_image_one_thread"] = {
            name: round(value, 3) for name, value in time_steps(root).items()
        }
        result["pipeline"] = {
            f"{workers} workers" if workers else "threads": in_turn(root, checkouts, workers)
            for workers in (0, 1, 2)
        }
    report(result)
    if given.output is not None:
        given.output.write_text(json.dumps(result, indent=2) + "\n")


def report(result: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    steps = Table("step", "ms an image", "images/s of one core", title=result["images"])
    for name, value in result["milliseconds_per_image_one_thread"].items():
        steps.add_row(name, f"{value:.3f}", f"{1e3 / value:.0f}")
    console.print(steps)
    rates = Table("pipeline", "", "images/s", "images/s of one core")
    for name, entry in result["pipeline"].items():
        for which, values in entry.items():
            rates.add_row(name, which, *(f"{value:g}" for value in values.values()))
    console.print(rates)
    console.print(result["device"], result["versions"], result["commits"])


if __name__ == "__main__":
    main()

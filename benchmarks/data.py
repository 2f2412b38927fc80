"""How many photographs a second the host pipeline decodes and augments, per core and in all.

    python benchmarks/data.py [RESULT.json]

Works on JPEG files of about 500x375 pixels, ImageNet's usual size, cut out of the photographs that
ship with scikit-learn. First each step alone in one thread, the mean over all files; then the
whole pipeline with threads and with worker processes, batches of 32, once with float32 batches
normalised on the host and once with bytes for the device to normalise.
"""

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
from vmamba_jax.data.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalize,
    random_erasing,
    random_resized_crop,
)

FILES = 96
BATCH = 32
SECONDS = 5.0


class BytesTransform(TrainTransform):
    """The training transform less normalisation and erasing, which the device would then do."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Any:
        """RGB image to uint8 ``(H, W, 3)``."""
        image = random_resized_crop(image, self.size, self.scale, self.ratio, rng)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert self.rand_augment is not None
        return np.asarray(self.rand_augment(image, rng))


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
        "normalise": milliseconds(
            lambda i: normalize(crops[i % FILES], IMAGENET_MEAN, IMAGENET_STD)
        ),
        "random erasing": milliseconds(
            lambda i: random_erasing(np.empty((224, 224, 3), np.float32), 0.25, rng)
        ),
        "training sample, whole": milliseconds(lambda i: both(train, i)),
        "evaluation sample, whole": milliseconds(lambda i: both(evaluate, i)),
        "digit, whole": milliseconds(lambda i: move(digits[i]["image"], rng)),
    }


def images_per_second(root: Path, transform: Any, worker_count: int) -> tuple[float, float]:
    """Of the whole pipeline: images a second, and images a second of processor time."""
    source = open_source("image_folder", root, "train")
    batches = train_iterator(source, transform, batch_size=BATCH, seed=0, worker_count=worker_count)
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


def commit() -> str:
    """The commit measured, marked where the tree differs from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def main() -> None:
    """Measures, prints a table and, given a path, writes the result there."""
    result: dict[str, Any] = {
        "command": "python benchmarks/data.py",
        "date": date.today().isoformat(),
        "commit": commit(),
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
        result["pipeline"] = {}
        for name, transform in (("float32", TrainTransform()), ("bytes", BytesTransform())):
            for workers in (0, 1, 2):
                rate, per_core = images_per_second(root, transform, workers)
                how = f"{workers} workers" if workers else "threads"
                result["pipeline"][f"{name}, {how}"] = {
                    "images_per_second": round(rate, 1),
                    "images_per_second_of_one_core": round(per_core, 1),
                }
    report(result)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")


def report(result: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    steps = Table("step", "ms an image", "images/s of one core", title=result["images"])
    for name, value in result["milliseconds_per_image_one_thread"].items():
        steps.add_row(name, f"{value:.3f}", f"{1e3 / value:.0f}")
    console.print(steps)
    rates = Table("pipeline", "images/s", "images/s of one core")
    for name, entry in result["pipeline"].items():
        rates.add_row(name, *(f"{value:.0f}" for value in entry.values()))
    console.print(rates)
    console.print(result["device"], result["versions"], result["commit"])


if __name__ == "__main__":
    main()

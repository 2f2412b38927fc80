"""Seconds a picture of Mask R-CNN on a VMamba, beside a plain PyTorch of the same semantics.

    python -m pip install -e ".[dev,parity]" && python benchmarks/detect.py

Both run in turn in this process, on the same weights from a seed and the same noise; how many of
the detections agree is reported too. The PyTorch side is tests/torch_mask_rcnn.py.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _measure import compile_timed, interleaved, matmul_run, report

from vmamba_jax import model_config
from vmamba_jax.convert import from_torch
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.detection import MaskRCNN, MaskRCNNConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@dataclass
class Options:
    """What to time, and how often."""

    model: str = "vmamba_tiny_s1l8"
    """The registered backbone; PyTorch's side knows the later releases'."""
    height: int = 800
    """Of the padded picture, in pixels."""
    width: int = 1216
    """Of the padded picture, in pixels."""
    rounds: int = 3
    """Times each side runs."""
    threads: int = 2
    """Of PyTorch."""
    output: str = "detect"
    """Name of the result file."""


def main(options: Options) -> None:
    """Times both sides and reports."""
    import recipe  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import torch_mask_rcnn  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    config = MaskRCNNConfig(model_config(options.model).replace(num_classes=0))
    shapes = {weight.key: weight.shape for weight in weight_table(config)}
    weights = recipe.state_dict(shapes, 7)
    nchw = recipe.images((1, 3, options.height, options.width), 7)
    size = (options.height, options.width)

    model = MaskRCNN(config)
    arguments: tuple[Any, ...] = (
        jax.device_put(from_torch(weights, config)),
        jnp.asarray(nchw.transpose(0, 2, 3, 1)),
        jnp.asarray([size], jnp.int32),
    )
    compiled, seconds = compile_timed(model.apply, *arguments)
    state = {key: torch.from_numpy(array) for key, array in weights.items()}
    image = torch.from_numpy(nchw)
    found: dict[str, Any] = {}

    def ours() -> object:
        found["ours"] = jax.block_until_ready(compiled(*arguments))
        return found["ours"]

    def theirs() -> None:
        with torch.inference_mode():
            found["torch"] = torch_mask_rcnn.detect(state, image, size)

    matmul, operations = matmul_run()
    times = interleaved({"matmul": matmul, "ours": ours, "torch": theirs}, options.rounds)
    boxes, _, labels, _, places = (np.asarray(x[0]) for x in found["ours"])
    boxes, labels = boxes[places], labels[places]
    expected = [x.numpy() for x in found["torch"]]
    agree = [
        bool(np.any((np.abs(boxes - box).max(axis=1) < 0.1) & (labels == label)))
        for box, label in zip(expected[0], expected[2], strict=True)
    ]
    row = {
        "model": options.model,
        "picture": f"{options.height}x{options.width}",
        "s": float(np.median(times["ours"])),
        "PyTorch s": float(np.median(times["torch"])),
        "times PyTorch": float(np.median(times["torch"] / times["ours"])),
        "detections": len(boxes),
        "of PyTorch's found": float(np.mean(agree)),
        "compile s": seconds,
        "temporaries MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    peak = operations / np.median(times["matmul"])
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k != "output"}
    report(options.output, [row], gemm_peak_gflops=peak / 1e9, options=settings)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

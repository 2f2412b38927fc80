"""Images a second of UPerNet on a VMamba, beside a plain PyTorch of the same semantics.

    python -m pip install -e ".[dev,parity]" && python benchmarks/segment.py

Both run in turn in this process, on the same weights from a seed and the same noise, from a
normalised image to the class of each of its pixels; the share of pixels on which they agree is
reported too. The PyTorch side is tests/torch_upernet.py.
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
from vmamba_jax.segmentation import UPerNet, UPerNetConfig
from vmamba_jax.segmentation.upernet import resize

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@dataclass
class Options:
    """What to time, and how often."""

    model: str = "vmamba_tiny_s1l8"
    """The registered backbone; PyTorch's side knows the later releases'."""
    size: int = 512
    """Height and width of the image, in pixels."""
    rounds: int = 5
    """Times each side runs."""
    threads: int = 2
    """Of PyTorch."""
    output: str = "segment"
    """Name of the result file."""


def main(options: Options) -> None:
    """Times both sides and reports."""
    import recipe  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import torch_upernet  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    config = UPerNetConfig(model_config(options.model).replace(num_classes=0))
    shapes = {weight.key: weight.shape for weight in weight_table(config)}
    weights = recipe.state_dict(shapes, 7)
    nchw = recipe.images((1, 3, options.size, options.size), 7)

    model = UPerNet(config)

    def segment(variables: Any, images: jax.Array) -> jax.Array:
        logits = model.apply(variables, images).decode
        return resize(logits, images.shape[1:3]).argmax(-1)

    arguments = (
        jax.device_put(from_torch(weights, config)),
        jnp.asarray(nchw.transpose(0, 2, 3, 1)),
    )
    compiled, seconds = compile_timed(segment, *arguments)
    state = {key: torch.from_numpy(array) for key, array in weights.items()}
    image = torch.from_numpy(nchw)
    found: dict[str, Any] = {}

    def ours() -> object:
        found["ours"] = jax.block_until_ready(compiled(*arguments))
        return found["ours"]

    def theirs() -> None:
        with torch.inference_mode():
            found["torch"] = torch_upernet.segment(state, image).argmax(dim=1)

    matmul, operations = matmul_run()
    times = interleaved({"matmul": matmul, "ours": ours, "torch": theirs}, options.rounds)
    row = {
        "model": options.model,
        "image": f"{options.size}x{options.size}",
        "images/s": float(1 / np.median(times["ours"])),
        "PyTorch images/s": float(1 / np.median(times["torch"])),
        "times PyTorch": float(np.median(times["torch"] / times["ours"])),
        "pixels alike": float(np.mean(np.asarray(found["ours"]) == found["torch"].numpy())),
        "compile s": seconds,
        "temporaries MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    peak = operations / np.median(times["matmul"])
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k != "output"}
    report(options.output, [row], gemm_peak_gflops=peak / 1e9, options=settings)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

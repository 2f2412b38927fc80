"""Size of an exported VMamba and the time it takes an image, beside a plain PyTorch of the same.

    python -m pip install -e ".[dev,parity]" && python benchmarks/export.py

All run in turn in this process, on the same weights from a seed and the same noise: the model
under `jax.jit`, its exports, ONNX Runtime where `--onnx` names a file of examples/export_onnx.py
for one image, and the PyTorch of tests/torch_backbone.py with a classifier. Each is compared with
the model's logits, but for ONNX Runtime's, whose file has its own weights.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _measure import interleaved, matmul_run, report

from vmamba_jax import VSSM, model_config
from vmamba_jax.convert import from_torch
from vmamba_jax.convert.mapping import weight_table
from vmamba_jax.export import export_model, load_exported

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@dataclass
class Options:
    """What to time, and how often."""

    model: str = "vmamba_tiny_s1l8"
    """A registered model; PyTorch's side knows the later releases'."""
    size: int = 224
    """Height and width of the image, in pixels."""
    rounds: int = 5
    """Times each runs."""
    threads: int = 2
    """Of PyTorch and of ONNX Runtime."""
    onnx: Path | None = None
    """A file of examples/export_onnx.py, for one image of this size."""
    output: str = "export"
    """Name of the result file."""


def main(options: Options) -> None:
    """Times all and reports."""
    import recipe  # noqa: PLC0415

    config = model_config(options.model)
    shapes = {weight.key: weight.shape for weight in weight_table(config)}
    weights = recipe.state_dict(shapes, 7)
    nchw = recipe.images((1, 3, options.size, options.size), 7)
    images = jnp.asarray(nchw.transpose(0, 2, 3, 1))
    variables = jax.device_put(from_torch(weights, config))
    megabytes = {"jax.jit": None, "PyTorch": sum(a.nbytes for a in weights.values()) / 1e6}
    model = jax.jit(VSSM(config).apply)
    runs: dict[str, Callable[[], Any]] = {"jax.jit": lambda: model(variables, images)}
    side = (options.size, options.size)
    kinds = {
        "exported, fixed sizes": {"batch_size": 1, "image_size": side},
        "exported, any batch": {"image_size": side},
        "exported, any batch and size": {"image_size": None},
        "exported, bfloat16 weights": {"image_size": side, "weight_dtype": "bfloat16"},
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, kind) in enumerate(kinds.items()):
            path = Path(folder) / f"{number}.npz"
            export_model(path, variables, config, **kind)
            megabytes[name] = path.stat().st_size / 1e6
            exported = load_exported(path)
            runs[name] = lambda exported=exported: exported(images)
    if options.onnx is not None:
        megabytes["ONNX Runtime"] = options.onnx.stat().st_size / 1e6
        runs["ONNX Runtime"] = _onnx(options, np.asarray(images))
    runs["PyTorch"] = _pytorch(options, weights, nchw)

    expected = np.asarray(runs["jax.jit"]())
    matmul, operations = matmul_run()
    times = interleaved({"matmul": matmul, **runs}, options.rounds)
    rows = []
    for name, run in runs.items():
        found = np.asarray(run())
        rows.append(
            {
                "what": name,
                "MB": megabytes[name] or "",
                "ms an image": float(np.median(times[name]) * 1e3),
                "times jax.jit": float(np.median(times[name] / times["jax.jit"])),
                "largest difference": float(np.abs(found - expected).max()),
                "rms error / std": float(
                    np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
                ),
            }
        )
        if name == "ONNX Runtime":  # of other weights
            del rows[-1]["largest difference"], rows[-1]["rms error / std"]
    settings = {k: str(v) for k, v in dataclasses.asdict(options).items() if k != "output"}
    peak = operations / np.median(times["matmul"])
    report(options.output, rows, gemm_peak_gflops=peak / 1e9, options=settings)


def _pytorch(options: Options, weights: dict[str, np.ndarray], nchw: np.ndarray) -> Any:
    """The classifier as the backbone of tests/torch_backbone.py and what follows its last map."""
    import torch  # noqa: PLC0415
    import torch_backbone  # noqa: PLC0415

    torch.set_num_threads(options.threads)
    tensors = {key: torch.from_numpy(array) for key, array in weights.items()}
    state = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
    for stage, channels in enumerate(model_config(options.model).stage_dims):
        # The backbone norms every map; the classifier has one norm, of the last.
        state[f"backbone.outnorm{stage}.weight"] = torch.ones(channels)
        state[f"backbone.outnorm{stage}.bias"] = torch.zeros(channels)
    state["backbone.outnorm3.weight"] = tensors["classifier.norm.weight"]
    state["backbone.outnorm3.bias"] = tensors["classifier.norm.bias"]
    image = torch.from_numpy(nchw)

    def run() -> Any:
        with torch.inference_mode():
            pooled = torch_backbone.backbone(state, image)[-1].mean(dim=(2, 3))
            return torch_backbone.linear(tensors, "classifier.head", pooled).numpy()

    return run


def _onnx(options: Options, images: np.ndarray) -> Any:
    import onnxruntime  # noqa: PLC0415

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = options.threads, 3
    session = onnxruntime.InferenceSession(
        options.onnx, settings, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"images": images})[0]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

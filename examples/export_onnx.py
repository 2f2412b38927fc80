"""Writes a model as ONNX through jax2onnx, and checks it in ONNX Runtime.

    python -m venv onnx && onnx/bin/pip install "jax2onnx==0.17.1" onnxruntime
    onnx/bin/pip install -e . && onnx/bin/pip install -U orbax-checkpoint
    onnx/bin/python examples/export_onnx.py model.onnx --checkpoint vmamba_tiny

An environment of its own, since jax2onnx asks for an older Orbax than this package reads models
with (pip says so; the conversion does not mind the newer one). The file is written if ONNX
Runtime's numbers equal the model's within the tolerance, else not.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import tyro
from jax2onnx import to_onnx
from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

from vmamba_jax.convert import read_weights
from vmamba_jax.convert.tasks import DETECTION, task_of
from vmamba_jax.export.cli import class_names_of, preprocessing_of


@register_primitive(
    jaxpr_primitive="platform_index",
    jax_doc="https://docs.jax.dev/en/latest/_autosummary/jax.lax.platform_dependent.html",
    onnx=[],
    since="0",
    context="primitives.lax",
    component="platform_index",
    testcases=[],
)
class PlatformIndex(PrimitiveLeafPlugin):
    """`jax.lax.platform_dependent`, which jax2onnx 0.17.1 does not know: the first, the CPU's."""

    def lower(self, ctx: Any, eqn: Any) -> None:
        """Binds the number of the branch."""
        ctx.bind_const_for_var(eqn.outvars[0], np.asarray(0, np.int32))


@dataclass
class Options:
    """What to convert."""

    target: tyro.conf.Positional[Path]
    """Where to: FILE.onnx."""
    checkpoint: Path
    """A converted model, a training run, a .pth or a .safetensors file."""
    batch_size: int = 1
    """Images at a time; jax2onnx converts loops of a known number of turns only."""
    image_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="PIXELS")] = ()
    """Height and width, or one number; by default the size that the model was evaluated at."""
    tolerance: float = 1e-4
    """Of the largest difference between ONNX Runtime's numbers and the model's."""


def main(options: Options) -> int:
    """Converts and checks; status 1 if the numbers differ."""
    target = options.target
    if target.exists():
        raise ValueError(f"{target}: exists already; choose another name or delete it")
    size = (options.image_size[0], options.image_size[-1]) if options.image_size else None
    read = read_weights(options.checkpoint, image_size=size)
    task, steps = task_of(read.config), preprocessing_of(read, size)
    if task is DETECTION:
        raise ValueError(
            f"{options.checkpoint} holds {task.holds}: classifiers and segmenters only"
        )
    # The scan step by step is the one whose loops jax2onnx converts.
    network = task.network(read.config, scan_implementation="sequential")
    variables = jax.tree.map(jnp.asarray, read.variables())
    channels = len(steps.mean)
    shape = (options.batch_size, *steps.size, channels)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)

    def logits(images: jax.Array) -> jax.Array:
        y: Any = network.apply(variables, images)
        return getattr(y, "decode", y)

    # Before the conversion, which leaves layers in JAX's caches that JAX can't run.
    expected = np.asarray(jax.jit(logits)(images))
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        convert(logits, shape, part, {
            "class_names": class_names_of(read),
            "preprocessing": {"image_size": steps.size, "crop": steps.crop,
                              "mean": steps.mean, "std": steps.std},
        })  # fmt: skip
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        session = onnxruntime.InferenceSession(part, settings, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": images})
        difference = float(np.abs(found - expected).max())
        print(f"largest difference {difference:.2g} of values up to {np.abs(expected).max():.2g}")
        if not difference <= options.tolerance:
            print(f"error: above {options.tolerance:g}; {target} is not written", file=sys.stderr)
            return 1
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    print(f"written: {target} ({target.stat().st_size / 1e6:.1f} MB), images {shape}")
    return 0


def convert(
    function: Callable[..., Any], shape: tuple[int, ...], path: Path, about: dict[str, Any]
) -> None:
    """Writes a function of float32 images as ONNX, with what is known of it as metadata."""
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    model = to_onnx(
        function,
        [jax.ShapeDtypeStruct(shape, jnp.float32)],
        model_name="vmamba",
        input_names=["images"],
        output_names=["logits"],
    )
    for key, value in about.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, path)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))

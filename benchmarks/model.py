"""Images a second of whole models: forward and training step, beside the machine's GEMM peak.

    python benchmarks/model.py --models vmamba_tiny_s1l8 --batches 1 8
    python benchmarks/model.py --peer path/to/vmamba.py --peer-python path/to/python

The peer is a PyTorch VMamba: a module with the class `VSSM` and the original's keyword arguments.
It runs in a process of its own, in turn with ours, and may have its own Python with torch.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _measure import compile_timed, interleaved, matmul_run, report

from vmamba_jax import create_model
from vmamba_jax.analysis.flops import summarize


@dataclass
class Options:
    """Which models to time, and how."""

    models: tuple[str, ...] = ("vmamba_tiny_s1l8",)
    """Registered models."""
    batches: tuple[int, ...] = (1, 8)
    """Images at a time."""
    image_size: int = 224
    """Side of the images, in pixels."""
    train: bool = False
    """Time the training step (forward and gradient) too."""
    accumulation_steps: tuple[int, ...] = (1,)
    """Parts that the step's batch is split into, one after another; each is timed."""
    bfloat16: bool = False
    """Compute in bfloat16 rather than float32."""
    use_checkpoint: bool = False
    """Recompute each block in the backward pass."""
    scan_blocks: bool = False
    """Compile the equal blocks of a stage once, as a loop."""
    rounds: int = 5
    """Times each case runs."""
    peer: Path | None = None
    """File of a PyTorch VMamba to run in turn."""
    peer_python: str = sys.executable
    """Python that has torch."""
    output: str = "model"
    """Name of the result file."""


class Peer:
    """A PyTorch model in a process of its own."""

    def __init__(self, path: Path, python: str):
        """Starts the process, which answers once it has loaded the model's file."""
        if not path.is_file():
            raise SystemExit(f"--peer: there is no file {path}")
        command = [python, str(Path(__file__).with_name("_torch_peer.py")), str(path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, **request: Any) -> float:
        """Runs one request; returns its seconds."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("the peer ended; its error is above")
        return answer


def accumulated(value_and_grad: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """The mean over the parts of a batch, each `parts`-th image as in training."""
    if parts == 1:
        return value_and_grad

    def whole(params: Any, rest: Any, images: jax.Array) -> Any:
        def add(total: Any, part: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(params, rest, part)), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        split = jnp.swapaxes(images.reshape(-1, parts, *images.shape[1:]), 0, 1)
        total, _ = jax.lax.scan(add, zeros, split)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    return whole


def main(options: Options) -> None:
    """Times every model and batch and reports."""
    for batch, parts in itertools.product(options.batches, options.accumulation_steps):
        if parts < 1 or batch % parts:
            raise SystemExit(f"accumulation_steps {parts} does not divide the batch {batch}")
    peer = Peer(options.peer, options.peer_python) if options.peer else None
    dtype = jnp.bfloat16 if options.bfloat16 else jnp.float32
    matmul, operations = matmul_run()
    runs: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for name in options.models:
        model, variables = create_model(
            name,
            dtype=dtype,
            image_size=options.image_size,
            use_checkpoint=options.use_checkpoint,
        )
        model = model.clone(scan_blocks=options.scan_blocks)
        shape = (1, options.image_size, options.image_size, 3)
        # Two operations a multiply-add.
        flops = 2 * sum(part.flops for part in summarize(model.config, options.image_size))
        for batch in options.batches:
            images = jnp.asarray(
                np.random.default_rng(0).normal(size=(batch, *shape[1:])), jnp.float32
            )

            def forward(variables, images, model=model):
                return model.apply(variables, images)

            def loss(params, rest, images, model=model):
                out = model.apply(
                    {**rest, "params": params},
                    images,
                    train=True,
                    rngs={"dropout": jax.random.key(0)},
                )
                return -jax.nn.log_softmax(out.astype(jnp.float32))[:, 0].mean()

            rest = {k: v for k, v in variables.items() if k != "params"}
            cases = {"forward": (forward, (variables, images))}
            if options.train:
                for parts in options.accumulation_steps:
                    step = accumulated(jax.value_and_grad(loss), parts)
                    mode = f"train in {parts}" if parts > 1 else "train"
                    cases[mode] = (step, (variables["params"], rest, images))
            for mode, (function, arguments) in cases.items():
                compiled, seconds = compile_timed(function, *arguments)
                key = f"{name}/{batch}/{mode}"
                runs[key + "/matmul"] = matmul
                runs[key] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
                memory = compiled.memory_analysis()
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "mode": mode,
                        "GFLOP/img": flops / 1e9,
                        "compile s": seconds,
                        "temporaries MB": memory.temp_size_in_bytes / 1e6,
                    }
                )
                if peer:
                    request = {
                        "config": dataclasses.asdict(model.config),
                        "batch": batch,
                        "image_size": options.image_size,
                        "train": mode != "forward",
                    }
                    runs[key + "/peer"] = lambda request=request: peer.ask(**request)
    times = interleaved(runs, options.rounds)
    for row in rows:
        key = f"{row['model']}/{row['batch']}/{row['mode']}"
        row["img/s"] = float(np.median(row["batch"] / times[key]))
        if row["mode"] == "forward":
            at_peak = times[key + "/matmul"] * row["batch"] * row["GFLOP/img"] * 1e9 / operations
            row["share of GEMM peak"] = float(np.median(at_peak / times[key]))
        else:
            forward = times[f"{row['model']}/{row['batch']}/forward"]
            row["times forward"] = float(np.median(times[key] / forward))
        if peer:
            row["peer img/s"] = float(np.median(row["batch"] / times[key + "/peer"]))
            row["times peer"] = float(np.median(times[key + "/peer"] / times[key]))
    peak = operations / np.median([times[key] for key in times if key.endswith("/matmul")])
    settings = {
        k: v for k, v in dataclasses.asdict(options).items() if not k.startswith(("peer", "output"))
    }
    report(options.output, rows, gemm_peak_gflops=peak / 1e9, options=settings)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

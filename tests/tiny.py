"""A model small enough to compile in seconds, and a few updates of it; also run as a process.

``python -m tiny pair HOST:PORT INDEX STEPS`` is one of two processes that train it together;
``python -m tiny train OPTIONS`` is train.py with the model registered as "tiny".
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh

from vmamba_jax.config import VMambaConfig
from vmamba_jax.data import mix
from vmamba_jax.models import VSSM
from vmamba_jax.registry import register_model
from vmamba_jax.training.cli import main
from vmamba_jax.training.optimizer import OptimizerConfig, make_optimizer
from vmamba_jax.training.sharding import MeshConfig, make_mesh, put_batch
from vmamba_jax.training.state import TrainState, create_state, make_state
from vmamba_jax.training.step import Batch, make_train_step

CONFIG = VMambaConfig(
    num_classes=10,
    patch_size=8,
    depths=(1,),
    dims=(32,),
    ssm_d_state=1,
    ssm_ratio=1.0,
    forward_type="v05_noz",
    mlp_ratio=4.0,
    drop_path_rate=0.0,
    downsample_version="v3",
    patchembed_version="v1",
)
SHAPE = (32, 32, 3)
_BATCH = 16


def batch(step: int) -> dict[str, np.ndarray]:
    """One global batch of noise with labels, a pure function of the step."""
    rng = np.random.default_rng(step)
    return {
        "image": rng.standard_normal((_BATCH, *SHAPE), np.float32),
        "label": rng.integers(0, 10, _BATCH, np.int32),
    }


def train_steps(
    mesh: Mesh, steps: int, *, accumulation_steps: int = 1, mixing: bool = True
) -> tuple[TrainState, list[float]]:
    """Trains from the seed with dropped paths and mixed images; returns every loss."""
    optimizer = make_optimizer(OptimizerConfig(), CONFIG)
    model = VSSM(CONFIG)

    def augment(key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        alpha = 1.0 if mixing else 0.0
        return mix(
            key,
            batch["image"],
            batch["label"],
            num_classes=10,
            mixup_alpha=alpha,
            cutmix_alpha=alpha,
        )

    init = make_state(model, optimizer, image_shape=SHAPE, seed=0, ema=True)
    train_step = make_train_step(
        model, optimizer, augment, mesh, ema_decay=0.9, accumulation_steps=accumulation_steps
    )
    state, losses = create_state(init, mesh), []
    index, count = jax.process_index(), jax.process_count()
    with jax.set_mesh(mesh):
        for step in range(steps):
            part = {name: np.split(array, count)[index] for name, array in batch(step).items()}
            state, metrics = train_step(state, put_batch(part, mesh), np.float32(1e-2))
            losses.append(float(metrics["loss"]))
    return state, losses


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "train":
        register_model("tiny", CONFIG)
        sys.argv[1:] = ["--model.name=tiny", *arguments]
        sys.exit(main())
    address, index, steps = arguments
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    print(*train_steps(make_mesh(MeshConfig(4, 2)), int(steps))[1])

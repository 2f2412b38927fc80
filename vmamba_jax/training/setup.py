"""From a configuration to the objects of a run: sources, batches, model, optimizer, step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vmamba_jax.convert.pretrained import load_pretrained
from vmamba_jax.data import (
    BatchIterator,
    DigitsTransform,
    EvalTransform,
    ImageSource,
    TrainTransform,
    eval_batches,
    mix,
    train_iterator,
)
from vmamba_jax.models.vssm import VSSM
from vmamba_jax.ops.selective_scan import default_implementation
from vmamba_jax.registry import model_config
from vmamba_jax.training.config import DataConfig, ModelConfig, RunConfig
from vmamba_jax.training.optimizer import make_optimizer
from vmamba_jax.training.segmentation_config import AnyRun, SegmentationConfig
from vmamba_jax.training.state import abstract_variables, make_state
from vmamba_jax.training.step import Augment, Batch, make_train_step
from vmamba_jax.training.task import Learner
from vmamba_jax.typing import Variables


def build_model(config: ModelConfig, *, num_classes: int, image_size: int, mesh: Mesh) -> VSSM:
    """The model that a run trains, scanning as suits the mesh's devices; no parameters are made."""
    architecture = model_config(config.name).replace(
        num_classes=num_classes,
        imgsize=image_size,
        drop_path_rate=config.drop_path_rate,
        use_checkpoint=config.use_checkpoint,
    )
    platform = mesh.devices.flat[0].platform
    return VSSM(
        architecture,
        scan_implementation=default_implementation(platform),
        dtype=jnp.dtype(config.dtype),
        scan_blocks=config.scan_blocks,
    )


def build_augment(config: DataConfig, num_classes: int, accumulation_steps: int = 1) -> Augment:
    """Mixup, CutMix and label smoothing as the released recipe mixes: per group of images."""
    part = config.batch_size // accumulation_steps
    groups = part // config.mix_group if part % config.mix_group == 0 else 1

    def augment(key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return mix(
            key,
            batch["image"],
            batch["label"],
            num_classes=num_classes,
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.label_smoothing,
            groups=max(groups, 1),
        )

    return augment


def train_batches(config: RunConfig, source: ImageSource) -> BatchIterator:
    """This process's part of the endless training batches."""
    data = config.data
    transform = {
        "released": TrainTransform(size=data.image_size),
        "light": TrainTransform(
            size=data.image_size, scale=(0.5, 1.0), rand_augment=None, erasing=0.0
        ),
        "digits": DigitsTransform(),
    }[data.augmentation]
    return train_iterator(
        source,
        transform,
        batch_size=data.batch_size // jax.process_count(),
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        worker_count=data.workers,
        damaged_is_fatal=data.damaged_is_fatal,
    )


def held_out_batches(config: DataConfig, source: ImageSource) -> BatchIterator:
    """This process's part of one pass over the held-out images."""
    return eval_batches(
        source,
        EvalTransform(size=config.image_size, crop=config.eval_crop),
        batch_size=config.eval_batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        worker_count=config.workers,
        damaged_is_fatal=config.damaged_is_fatal,
    )


def starting_weights(config: RunConfig, model: VSSM) -> Variables:
    """The weights that `config.init_from` names, with a new head where the classes differ.

    Raises:
        CheckpointError: if there are none, or they are of another model.
    """
    source = config.init_from
    assert source is not None
    return load_pretrained(
        True if source == "released" else source, model.config, config.model.name, config.seed
    )


def build_learner(config: RunConfig, *, num_classes: int, mesh: Mesh) -> Learner:
    """Builds model, optimizer and update; needs neither data nor the mesh's devices."""
    size = config.data.image_size
    image_shape = (size, size, 3)
    model = build_model(config.model, num_classes=num_classes, image_size=size, mesh=mesh)
    params = abstract_variables(model, image_shape)["params"]
    optimizer = make_optimizer(config.optimizer, model.config)
    steps, ema_decay = config.optimizer.accumulation_steps, config.optimizer.ema_decay
    return Learner(
        model=model,
        optimizer=optimizer,
        init=make_state(
            model, optimizer, image_shape=image_shape, seed=config.seed, ema=ema_decay > 0
        ),
        train_step=make_train_step(
            model,
            optimizer,
            build_augment(config.data, num_classes, steps),
            mesh,
            ema_decay=ema_decay,
            accumulation_steps=steps,
        ),
        params=params,
    )


def identity_of(config: AnyRun) -> AnyRun:
    """The part of a configuration that an interrupted run must be resumed with.

    Everything else (where the data lies, how many devices and workers there are, how long the run
    is, what is logged) may change.
    """
    blank = SegmentationConfig() if isinstance(config, SegmentationConfig) else RunConfig()
    free = ["root", "workers", "eval_batch_size", "damaged_is_fatal", "eval_mode", "eval_stride"]
    same_data: Any = dataclasses.replace(
        config.data,
        **{name: getattr(blank.data, name) for name in free if hasattr(blank.data, name)},
    )
    return dataclasses.replace(
        blank,
        seed=config.seed,
        model=config.model,  # pyright: ignore[reportArgumentType]
        optimizer=config.optimizer,  # pyright: ignore[reportArgumentType]
        data=same_data,
    )

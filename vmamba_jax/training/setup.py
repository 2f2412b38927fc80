"""From a configuration to the objects of a run: sources, batches, model, optimizer, step."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.config import VMambaConfig
from vmamba_jax.data import (
    BatchIterator,
    DataError,
    DigitsTransform,
    EvalTransform,
    ImageSource,
    TrainTransform,
    check_same_classes,
    eval_batches,
    mix,
    open_source,
    random_erasing,
    train_iterator,
)
from vmamba_jax.models.vssm import VSSM
from vmamba_jax.preprocessing import Preprocessing, for_channels, normalize_images
from vmamba_jax.training.config import DataConfig, ModelConfig, RunConfig
from vmamba_jax.training.optimizer import make_optimizer
from vmamba_jax.training.step import Augment, Batch
from vmamba_jax.training.task import Learner, make_learner


class Sources(NamedTuple):
    """The two splits of a run's data set."""

    train: ImageSource
    val: ImageSource


def open_sources(config: DataConfig) -> Sources:
    """Opens both splits and checks that they have the same classes.

    Raises:
        DataError: if the data can't be used.
    """
    train = open_source(config.kind, config.root, config.train_split, config.channels)
    val = open_val_source(config, train.class_names)
    if getattr(val, "is_whole_root", False) and config.train_split != config.val_split:
        raise DataError(
            f"{config.root} is one data set, and would be both splits: save each into its own "
            f"folder, {config.root}/{config.train_split} and {config.root}/{config.val_split}"
        )
    check_same_classes(train, val)
    return Sources(train, val)


def open_val_source(config: DataConfig, classes: Sequence[str] | None) -> ImageSource:
    """Opens the held-out split; `classes` as of `open_source`."""
    return open_source(config.kind, config.root, config.val_split, config.channels, classes)


def say_what_is_missing(source: ImageSource, console: Console) -> None:
    """Says which classes have no held-out image, where that is known."""
    missing = list(getattr(source, "empty_classes", []))
    if missing:
        few = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        console.print(
            f"{len(missing)} of {len(source.class_names)} classes have no held-out image: {few}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


def build_model(config: RunConfig, architecture: VMambaConfig, *, num_classes: int) -> VSSM:
    """The model that a run trains; no parameters are made."""
    architecture = architecture.replace(
        num_classes=num_classes,
        imgsize=config.data.image_size,
        in_chans=config.data.channels,
        drop_path_rate=config.model.drop_path_rate,
        use_checkpoint=config.model.use_checkpoint,
    )
    return as_in_run(config.model, architecture)


def as_in_run(config: ModelConfig, architecture: VMambaConfig) -> VSSM:
    """A module of an architecture, computing as a run does."""
    return VSSM(
        architecture,
        dtype=jnp.dtype(config.dtype),
        scan_blocks=config.scan_blocks,
        precision=None if config.precision == "default" else config.precision,
        recompute="activations" if config.recompute == "auto" else config.recompute,
    )


def build_augment(config: DataConfig, num_classes: int, accumulation_steps: int = 1) -> Augment:
    """What the device does to a batch: it normalises, erases and mixes.

    Mixup, CutMix and label smoothing are the released recipe's, which mixes per group of images.
    """
    statistics = preprocessing_of(config)
    part = config.batch_size // accumulation_steps
    groups = part // config.mix_group if part % config.mix_group == 0 else 1

    def augment(key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        erasing_key, mixing_key = jax.random.split(key)
        images = normalize_images(batch["image"], statistics.mean, statistics.std)
        if config.augmentation == "released":
            images = random_erasing(erasing_key, images)
        return mix(
            mixing_key,
            images,
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
        "light": TrainTransform(size=data.image_size, scale=(0.5, 1.0), rand_augment=None),
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


def preprocessing_of(config: DataConfig) -> Preprocessing:
    """What a held-out image goes through."""
    mean, std = (for_channels(values, config.channels) for values in (config.mean, config.std))
    return Preprocessing(config.image_size, config.eval_crop, mean, std)


def held_out_batches(config: DataConfig, source: ImageSource) -> BatchIterator:
    """This process's part of one pass over the held-out images, not normalised yet."""
    return eval_batches(
        source,
        EvalTransform.of(preprocessing_of(config)).values,
        batch_size=config.eval_batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        worker_count=config.workers,
        damaged_is_fatal=config.damaged_is_fatal,
    )


def build_learner(
    config: RunConfig, architecture: VMambaConfig, *, num_classes: int, mesh: Mesh
) -> Learner:
    """Builds model, optimizer and update; needs neither data nor the mesh's devices."""
    size = config.data.image_size
    model = build_model(config, architecture, num_classes=num_classes)
    return make_learner(
        config,
        model,
        make_optimizer(config.optimizer, model.config),
        build_augment(config.data, num_classes, config.optimizer.accumulation_steps),
        mesh,
        image_shape=(size, size, config.data.channels),
    )

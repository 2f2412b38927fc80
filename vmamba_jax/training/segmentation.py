"""Semantic segmentation as a task of the training loop, and the evaluation of a segmenter."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.convert.pretrained import load_network, open_pretrained
from vmamba_jax.data import (
    BatchIterator,
    LabelMapFolder,
    PhotometricDistortion,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    batches_per_epoch,
    eval_batches,
    train_iterator,
)
from vmamba_jax.errors import CheckpointError
from vmamba_jax.registry import model_config
from vmamba_jax.segmentation import Inference, UPerNet, UPerNetConfig
from vmamba_jax.segmentation.loss import segmentation_loss
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.mean_iou import SegmentationEvaluation
from vmamba_jax.training.metrics import read_rows
from vmamba_jax.training.segmentation_config import (
    SegmentationConfig,
    SegmentationData,
    SegmentationEvalConfig,
    SegmenterConfig,
)
from vmamba_jax.training.segmentation_evaluation import make_segmentation_step
from vmamba_jax.training.segmentation_optimizer import (
    make_linear_schedule,
    make_segmentation_optimizer,
)
from vmamba_jax.training.segmentation_picture import draw_segmentation
from vmamba_jax.training.sharding import check_batch_size, make_mesh, put_batch, replicated
from vmamba_jax.training.start import (
    about_model,
    check_same_labels,
    check_same_run,
    say_which,
    weights_to_evaluate,
)
from vmamba_jax.training.step import Batch
from vmamba_jax.training.task import Learner, Task, Training, make_learner
from vmamba_jax.typing import Variables

_DRAWN = 8
"""Held-out images in the picture of a run."""


def segmentation_task(config: SegmentationConfig, mesh: Mesh, console: Console) -> Task:
    """A segmenter on images with label maps.

    Args:
        config: the run.
        mesh: from `make_mesh`.
        console: where it is said which weights a new run starts from.

    Raises:
        DataError: if the images can't be used.
        ValueError: for an unknown model, or a schedule that can't be.
    """
    data = config.data
    source, images = _open(data, data.val_split), _open(data, data.train_split)
    learner = build_segmentation_learner(config, num_classes=len(source.class_names), mesh=mesh)
    predict = make_segmentation_step(learner.model, data, mesh)
    architecture = learner.model.config

    def start(initial: Variables) -> Variables:
        console.print(f"starting from {config.init_from}", soft_wrap=True, highlight=False)
        return starting_weights(config, learner.model, initial)

    def held_out(variables: Variables, stop: StopRequest) -> SegmentationEvaluation:
        with closing(_held_out_batches(data, source)) as batches:
            return _evaluate(predict, variables, stop.watch(batches), source.class_names, mesh)

    def draw(path: Path, variables: Variables, stop: StopRequest) -> None:
        shown: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        with closing(_held_out_batches(data, source)) as batches:
            for batch in stop.watch(batches):
                results = predict(variables, put_batch(batch, mesh))
                predictions = np.asarray(results["prediction"])
                rows = zip(batch["image"], batch["label"], predictions, strict=True)
                shown += [row for row, seen in zip(rows, batch["mask"], strict=True) if seen]
                if len(shown) >= _DRAWN:
                    break
        draw_segmentation(path, read_rows(path.parent), shown[:_DRAWN], source.class_names)

    return Task(
        learner=learner,
        class_names=source.class_names,
        held_out=len(source),
        training=Training(
            images=len(images),
            batches=_train_batches(config, images),
            steps_per_epoch=batches_per_epoch(images, data.batch_size),
            total=config.updates,
            eval_every=config.eval_every,
            learning_rate=make_linear_schedule(config.optimizer, config.updates),
        ),
        about=about_model(config, architecture, source.class_names, _inference(data)),
        check_same_run=lambda saved: check_same_run(
            config, saved, architecture, source.class_names
        ),
        starting_weights=None if config.init_from is None else start,
        evaluate=held_out,
        draw=draw,
    )


def evaluate_segmenter(config: SegmentationEvalConfig, console: Console) -> SegmentationEvaluation:
    """Evaluates weights: those that `config.init_from` names, else those of the run.

    Args:
        config: the run, and which of its checkpoints.
        console: where progress is shown.

    Raises:
        DataError: if the images can't be used.
        CheckpointError: if there are no such weights, they can't be read, or they are of other
            classes than the images.
    """
    mesh = make_mesh(config.mesh)
    data = config.data
    check_batch_size(data.eval_batch_size, mesh)
    source = _open(data, data.val_split)
    config, step = weights_to_evaluate(config)
    weights = open_pretrained(_init_from(config), config.model.name, step)
    what, where = str(config.init_from), f"{data.root} ({data.val_split})"
    if not isinstance(weights.config, UPerNetConfig):
        raise _no_heads(what)
    check_same_labels(weights, what, source.class_names, where)
    say_which(console, "weights:", config, weights)
    predict = make_segmentation_step(_module(config.model, weights.config), data, mesh)
    with jax.set_mesh(mesh):
        variables = jax.device_put(weights.variables(), replicated(mesh))
        with closing(_held_out_batches(data, source)) as batches:
            result = _evaluate(predict, variables, batches, source.class_names, mesh)
    console.print(result.details(), soft_wrap=True)
    return result


def _evaluate(
    predict: Callable[[Any, Batch], dict[str, jax.Array]],
    variables: Variables,
    batches: Iterable[dict[str, np.ndarray]],
    class_names: Sequence[str],
    mesh: Mesh,
) -> SegmentationEvaluation:
    """The results over all held-out images."""
    confusion = np.zeros((len(class_names),) * 2, np.int64)
    images = 0
    for batch in batches:
        results = predict(variables, put_batch(batch, mesh))
        confusion += np.asarray(results["confusion"])
        images += int(results["count"])
    return SegmentationEvaluation.of(confusion, images, class_names)


def build_segmentation_learner(
    config: SegmentationConfig, *, num_classes: int, mesh: Mesh
) -> Learner:
    """Builds model, optimizer and update; needs neither data nor the mesh's devices."""
    size = config.data.crop_size
    model = _build_model(config, num_classes)

    def images_and_labels(key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        del key  # nothing is mixed
        return batch["image"], batch["label"].astype(jnp.int32)

    return make_learner(
        config,
        model,
        make_segmentation_optimizer(config.optimizer, model.config),
        images_and_labels,
        mesh,
        image_shape=(size, size, 3),
        loss=segmentation_loss,
    )


def starting_weights(
    config: SegmentationConfig, model: UPerNet, fresh: Variables | None
) -> Variables:
    """The weights that `config.init_from` names; heads that they have not are the fresh ones.

    Raises:
        CheckpointError: if there are none, or they are of another model.
    """

    def heads() -> Variables:
        if fresh is None:
            raise _no_heads(str(config.init_from))
        return {collection: dict(tree) for collection, tree in fresh.items()}

    return load_network(_init_from(config), model.config, config.model.name, heads, config.seed)


def _init_from(config: SegmentationConfig) -> Literal[True] | str:
    assert config.init_from is not None
    return True if config.init_from == "released" else config.init_from


def _no_heads(source: str) -> CheckpointError:
    return CheckpointError(
        f"{source} has a backbone without a segmenter's heads: train it before evaluating"
    )


def _inference(data: SegmentationData) -> Inference:
    """How a run evaluates, which is how its weights are used."""
    side, stride = data.crop_size, data.stride
    return Inference(data.eval_mode, data.scale, (side, side), (stride, stride))


def _open(data: SegmentationData, split: str) -> LabelMapFolder:
    return LabelMapFolder(
        data.root,
        split,
        num_classes=data.num_classes,
        reduce_zero_label=data.reduce_zero_label,
    )


def _build_model(config: SegmentationConfig, num_classes: int) -> UPerNet:
    """The segmenter that a run trains; no parameters are made."""
    model = config.model
    backbone = model_config(model.name).replace(
        drop_path_rate=model.drop_path_rate, use_checkpoint=model.use_checkpoint
    )
    return _module(
        model,
        UPerNetConfig(
            backbone,
            num_classes=num_classes,
            channels=model.channels,
            auxiliary_channels=model.auxiliary_channels,
        ),
    )


def _module(config: SegmenterConfig, architecture: UPerNetConfig) -> UPerNet:
    """A module of an architecture, computing as a run does."""
    return UPerNet(architecture, dtype=jnp.dtype(config.dtype), scan_blocks=config.scan_blocks)


def _train_batches(config: SegmentationConfig, source: LabelMapFolder) -> BatchIterator:
    """This process's part of the endless training batches."""
    data = config.data
    transform = SegmentationTrainTransform(
        size=data.crop_size,
        scale=data.scale,
        ratio=data.ratio,
        max_share=data.max_share,
        distortion=PhotometricDistortion() if data.photometric else None,
    )
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


def _held_out_batches(data: SegmentationData, source: LabelMapFolder) -> BatchIterator:
    """This process's part of one pass over the held-out images, each batch of one size."""
    return eval_batches(
        source,
        SegmentationEvalTransform(scale=data.scale),
        batch_size=data.eval_batch_size // jax.process_count(),
        groups=source.groups(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        worker_count=data.workers,
        damaged_is_fatal=data.damaged_is_fatal,
    )

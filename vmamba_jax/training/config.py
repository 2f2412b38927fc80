"""Everything that can be set about a run: one dataclass tree, its presets, and its JSON form."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from vmamba_jax._closest import closest
from vmamba_jax.ops.residuals import Recompute
from vmamba_jax.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vmamba_jax.training.optimizer import OptimizerConfig
from vmamba_jax.training.sharding import MeshConfig

Node = TypeVar("Node")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is trained.

    Attributes:
        name: a registered model, see `vmamba_jax.list_models`; by default in fine-tuning the
            architecture of what it starts from.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        use_checkpoint: recompute each block in the backward pass to save memory.
        dtype: precision of the computation; parameters and optimizer stay float32.
        scan_blocks: run the blocks of a stage in a loop, which compiles much sooner.
        precision: of the float32 products outside of the blocks: ``highest`` is float32 on every
            device, ``default`` as fast as the device likes.
        recompute: what of a block the backward pass computes again to save memory: its
            ``activations``, its ``convolutions`` too, or whole ``blocks``, which is
            `use_checkpoint`; ``auto`` takes the first of them whose step fits the devices, found
            out by compiling (on a CPU, which does not say how much it has, ``activations``).
    """

    name: str | None = "vmamba_digits"
    drop_path_rate: float = 0.0
    use_checkpoint: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_blocks: bool = False
    precision: Literal["highest", "default"] = "highest"
    recompute: Recompute | Literal["auto"] = "auto"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and what is done to them.

    Attributes:
        kind: how the images are stored: ``image_folder``, ``array_record`` (also of TensorFlow
            Datasets), ``huggingface``, a name given to `register_source`, or ``digits``, which
            ship with scikit-learn.
        root: where they are stored; not used by ``digits``.
        train_split: name of the split to train on.
        val_split: name of the held-out split.
        channels: of the images: 3 for RGB, 1 for grey, others for ``.npy`` and TIFF files.
        mean: subtracted from each channel, whose values run from 0 to 1 (floating-point files: as
            they are); three values serve for any number of channels.
        std: what each channel is then divided by.
        image_size: height and width that images are brought to, in pixels.
        batch_size: images per update, over all devices and accumulation steps.
        eval_batch_size: images per evaluation batch, over all devices.
        augmentation: ``released`` (random crop, flip, RandAugment, erasing), ``light`` (a gentle
            random crop and flip) or ``digits`` (small shifts and turns).
        eval_crop: share of the resized image's shorter side that evaluation keeps.
        mixup: alpha of Mixup; 0 is off.
        cutmix: alpha of CutMix; 0 is off.
        mix_group: images that share one draw of Mixup or CutMix, where it divides the batch.
        label_smoothing: share of a label's weight that goes to all classes.
        workers: processes that decode images; 0 uses threads, which is best on few cores.
        damaged_is_fatal: stop at a damaged image instead of skipping and counting it.
    """

    kind: str = "digits"
    root: Path = Path("data")
    train_split: str = "train"
    val_split: str = "val"
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_size: int = 32
    batch_size: int = 48
    eval_batch_size: int = 120
    augmentation: Literal["released", "light", "digits"] = "digits"
    eval_crop: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_group: int = 128
    label_smoothing: float = 0.1
    workers: int = 0
    damaged_is_fatal: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """What every training run has, whatever it learns.

    Attributes:
        run: folder of the run: checkpoints, metrics, pictures. A run found there is resumed.
        seed: decides initial weights, order and augmentation.
        init_from: start from these weights: a PyTorch or safetensors file, a converted model's
            folder or address, another run's folder or one of its checkpoints, the name of a
            released model, or ``released`` for what was released of the model. A head for other
            classes starts anew.
        save_every: updates between checkpoints; 0 saves once an epoch.
        keep: how many of the latest checkpoints are kept, beside the best one.
        log_every: updates between lines of the metrics file.
        max_skipped: stop after this many updates in a row without a finite loss and gradient.
        profile: trace a few updates for the profiler, into the run folder.
        mesh: how devices share the work.
    """

    run: Path = Path("runs/digits")
    seed: int = 0
    init_from: str | None = None
    save_every: int = 0
    keep: int = 3
    log_every: int = 10
    max_skipped: int = 20
    profile: bool = False
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class RunConfig(Run):
    """One training run of a classifier.

    Attributes:
        epochs: passes over the training images.
        eval_every: epochs between evaluations.
        model: the model.
        data: the images.
        optimizer: the optimizer.
    """

    epochs: float = 15.0
    eval_every: int = 1
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    @property
    def model_name(self) -> str:
        """What the model is called in messages."""
        return self.model.name or f"the model of {self.init_from or self.run}"


@dataclasses.dataclass(frozen=True)
class EvalConfig(RunConfig):
    """A run to evaluate.

    Attributes:
        step: which checkpoint: ``latest``, ``best`` or the number of an update.
    """

    step: str = "latest"


def _imagenet(size: str, name: str, drop_path_rate: float) -> RunConfig:
    return RunConfig(
        run=Path(f"runs/imagenet-{size}"),
        epochs=300.0,
        log_every=50,
        model=ModelConfig(
            name, drop_path_rate=drop_path_rate, dtype="bfloat16", precision="default"
        ),
        data=DataConfig(
            kind="image_folder",
            root=Path("data/imagenet"),
            image_size=224,
            batch_size=1024,
            eval_batch_size=1024,
            augmentation="released",
            eval_crop=224 / 256,
            mixup=0.8,
            cutmix=1.0,
            workers=16,
        ),
    )


PRESETS: dict[str, RunConfig] = {
    "digits": RunConfig(
        optimizer=OptimizerConfig(
            learning_rate=2e-2, min_learning_rate=2e-4, warmup_epochs=1.0, ema_decay=0.98
        )
    ),
    "imagenet-tiny": _imagenet("tiny", "vmamba_tiny_s1l8", 0.2),
    "imagenet-small": _imagenet("small", "vmamba_small_s1l20", 0.3),
    "imagenet-base": _imagenet("base", "vmamba_base_s1l20", 0.5),
    "finetune": RunConfig(
        run=Path("runs/finetune"),
        epochs=30.0,
        init_from="vmamba_tiny_s1l8",
        model=ModelConfig(None, drop_path_rate=0.1),
        data=DataConfig(
            kind="image_folder",
            root=Path("data/photos"),
            image_size=224,
            batch_size=64,
            eval_batch_size=64,
            augmentation="light",
            eval_crop=224 / 256,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            min_learning_rate=1e-5,
            warmup_epochs=3.0,
            ema_decay=0.0,
            layer_decay=0.75,
        ),
    ),
}
"""The recipes that can be named on the command line; `digits` is the default."""


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON types."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {
                field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
            }
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def from_json(kind: type[Node], values: dict[str, Any], path: str = "") -> Node:
    """Rebuilds a configuration; what `values` lacks takes its default.

    Args:
        kind: the dataclass.
        values: as `to_json` made them.
        path: where in the tree `values` lies, for messages.

    Raises:
        ValueError: for a name that is no field.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in names:
            raise ValueError(f"unknown option {path}{name!r}." + closest(name, names))

    def rebuild(name: str, value: Any) -> Any:
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            return from_json(typing.cast(type, hint), value, f"{path}{name}.")
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if hint is Path else value

    return kind(**{name: rebuild(name, value) for name, value in values.items()})


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Lines such as ``data.batch_size: 48 -> 64`` for every value that two JSON forms differ in."""
    lines = []
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{path}{name}.")
        elif json.dumps(before) != json.dumps(after):
            lines.append(f"{path}{name}: {before} -> {after}")
    return lines

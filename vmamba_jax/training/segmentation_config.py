"""Everything that can be set about a run that learns to segment, and its presets."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

from vmamba_jax.training.config import Run, RunConfig


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """Which segmenter is trained: a UPerNet on a VMamba.

    Attributes:
        name: the backbone, a registered model, see `vmamba_jax.list_models`.
        channels: of every map inside the decode head.
        auxiliary_channels: of the map inside the auxiliary head; 0 leaves that head out.
        drop_path_rate: stochastic depth of the backbone's last block; rises linearly from 0.
        use_checkpoint: recompute each block in the backward pass to save memory.
        dtype: precision of the computation; parameters and optimizer stay float32.
        scan_blocks: run the blocks of a stage in a loop, which compiles much sooner.
    """

    name: str = "vmamba_tiny_s1l8"
    channels: int = 512
    auxiliary_channels: int = 256
    drop_path_rate: float = 0.2
    use_checkpoint: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_blocks: bool = False


@dataclasses.dataclass(frozen=True)
class SegmentationData:
    """Which images with label maps, and what is done to them.

    Attributes:
        root: a folder in ADE20K's layout: images/SPLIT/NAME.jpg, annotations/SPLIT/NAME.png, and
            the classes' names in classes.txt (or ADE20K's own list).
        train_split: name of the split to train on.
        val_split: name of the held-out split.
        num_classes: how many classes there are, where no file says it.
        reduce_zero_label: label 0 means no class, and class i is stored as i + 1; by default only
            where ADE20K's own list of classes lies in the root.
        crop_size: height and width of a training crop, in pixels.
        scale: longest and shortest side that images are resized to fit, in pixels.
        ratio: least and greatest random factor of the scale in training.
        max_share: crops in which one class has a greater share of the pixels are drawn again.
        photometric: distort brightness, contrast, saturation and hue in training.
        batch_size: crops per update, over all devices and accumulation steps.
        eval_batch_size: images of one size per evaluation batch, over all devices.
        eval_mode: evaluate an image as a whole, or by windows of the crop's size that slide over
            it (few compiled shapes, whatever the sizes of the images).
        eval_stride: pixels from one window to the next; by default two thirds of the crop.
        workers: processes that decode images; 0 uses threads, which is best on few cores.
        damaged_is_fatal: stop at a damaged image instead of skipping and counting it.
    """

    root: Path = Path("data/ade20k")
    train_split: str = "training"
    val_split: str = "validation"
    num_classes: int | None = None
    reduce_zero_label: bool | None = None
    crop_size: int = 512
    scale: tuple[int, int] = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    photometric: bool = True
    batch_size: int = 16
    eval_batch_size: int = 8
    eval_mode: Literal["whole", "slide"] = "whole"
    eval_stride: int | None = None
    workers: int = 0
    damaged_is_fatal: bool = False

    def __post_init__(self) -> None:
        """Refuses values that can't be."""
        problems = (
            (self.crop_size < 32, "crop_size must be at least 32"),
            (min(self.scale) < 1, "scale must be two positive sizes"),
            (not 0 < self.ratio[0] <= self.ratio[1], "ratio must be two positive factors, rising"),
            (not 0 < self.stride <= self.crop_size, "eval_stride must be 1 to crop_size"),
        )
        for failed, message in problems:
            if failed:
                raise ValueError(f"data: {message}")

    @property
    def stride(self) -> int:
        """Pixels from one window to the next."""
        return 2 * self.crop_size // 3 if self.eval_stride is None else self.eval_stride


@dataclasses.dataclass(frozen=True)
class SegmentationOptimizer:
    """AdamW with a linear warm-up and a linear decay to 0; the defaults are the published recipe.

    Attributes:
        learning_rate: peak learning rate, whatever the batch size.
        warmup_factor: the first update's share of the peak.
        warmup_updates: updates of linear warm-up.
        betas: decay of AdamW's first and second moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay of all parameters but normalisations'.
        clip_norm: largest global norm of the gradient; 0 leaves it alone.
        ema_decay: decay of the exponential moving average of the weights; 0 keeps none.
        accumulation_steps: parts that a batch is split into, one after another, to save memory;
            BatchNorm then normalises each part by itself.
    """

    learning_rate: float = 6e-5
    warmup_factor: float = 1e-6
    warmup_updates: int = 1500
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        """Refuses values that can't train."""
        problems = (
            (self.learning_rate <= 0, "learning_rate must be positive"),
            (not 0 < self.warmup_factor <= 1, "warmup_factor must lie in (0, 1]"),
            (self.warmup_updates < 0, "warmup_updates can't be negative"),
            (
                self.weight_decay < 0 or self.clip_norm < 0,
                "weight_decay and clip_norm can't be < 0",
            ),
            (not 0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1)"),
            (self.accumulation_steps < 1, "accumulation_steps must be at least 1"),
        )
        for failed, message in problems:
            if failed:
                raise ValueError(f"optimizer: {message}")


@dataclasses.dataclass(frozen=True)
class SegmentationConfig(Run):
    """One training run of a segmenter.

    Attributes:
        updates: length of the run.
        eval_every: updates between evaluations.
        model: the model.
        data: the images and label maps.
        optimizer: the optimizer.
    """

    run: Path = Path("runs/segment")
    updates: int = 160_000
    eval_every: int = 16_000
    model: SegmenterConfig = dataclasses.field(default_factory=SegmenterConfig)
    data: SegmentationData = dataclasses.field(default_factory=SegmentationData)
    optimizer: SegmentationOptimizer = dataclasses.field(default_factory=SegmentationOptimizer)

    @property
    def model_name(self) -> str:
        """What the model is called in messages."""
        return self.model.name


@dataclasses.dataclass(frozen=True)
class SegmentationEvalConfig(SegmentationConfig):
    """A run to evaluate.

    Attributes:
        step: which checkpoint: ``latest``, ``best`` or the number of an update.
    """

    step: str = "latest"


AnyRun: TypeAlias = RunConfig | SegmentationConfig
"""A training run of either task."""


def _published(size: str, name: str, drop_path_rate: float) -> SegmentationConfig:
    return SegmentationConfig(
        run=Path(f"runs/segment{size}"),
        init_from="released",
        save_every=2000,
        log_every=50,
        model=SegmenterConfig(name, drop_path_rate=drop_path_rate),
    )


SEGMENTATION_PRESETS: dict[str, SegmentationConfig] = {
    "segment": _published("", "vmamba_tiny_s1l8", 0.2),
    "segment-small": _published("-small", "vmamba_small_s2l15", 0.3),
    "segment-base": _published("-base", "vmamba_base_s2l15", 0.6),
    "segment-photos": SegmentationConfig(
        run=Path("runs/segment-photos"),
        updates=220,
        eval_every=55,
        log_every=5,
        model=SegmenterConfig(
            "vmamba_photos", channels=32, auxiliary_channels=16, drop_path_rate=0.0
        ),
        data=SegmentationData(
            root=Path("examples/photos"),
            crop_size=96,
            scale=(320, 96),
            ratio=(1.2, 2.4),
            photometric=False,  # so few photographs are told apart by their colours
            batch_size=8,
            eval_batch_size=10,
        ),
        optimizer=SegmentationOptimizer(
            learning_rate=5e-3,
            warmup_updates=20,
            weight_decay=0.05,
            clip_norm=5.0,
            ema_decay=0.95,
        ),
    ),
}
"""The recipes that can be named on the command line."""

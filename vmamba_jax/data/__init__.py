"""Images to batches: sources, augmentation on the host, mixing on the device, the pipeline."""

from vmamba_jax.data.augment import DigitsTransform, EvalTransform, TrainTransform
from vmamba_jax.data.decode import Sample, decode_image
from vmamba_jax.data.erasing import random_erasing
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.data.label_map_folder import LabelMapFolder
from vmamba_jax.data.mixup import mix
from vmamba_jax.data.pipeline import BatchIterator, batches_per_epoch, eval_batches, train_iterator
from vmamba_jax.data.randaugment import RandAugment
from vmamba_jax.data.segmentation import (
    PhotometricDistortion,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from vmamba_jax.data.sources import (
    DataError,
    ImageSource,
    check_same_classes,
    open_source,
    register_source,
)

__all__ = [
    "BatchIterator",
    "DamagedRecordError",
    "DataError",
    "DigitsTransform",
    "EvalTransform",
    "ImageSource",
    "LabelMapFolder",
    "PhotometricDistortion",
    "RandAugment",
    "Sample",
    "SegmentationEvalTransform",
    "SegmentationTrainTransform",
    "TrainTransform",
    "batches_per_epoch",
    "check_same_classes",
    "decode_image",
    "eval_batches",
    "mix",
    "open_source",
    "random_erasing",
    "register_source",
    "train_iterator",
]

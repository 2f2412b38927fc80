"""The tasks whose networks are read and written, each by the names in its files.

Whatever reads, writes or names a network looks here: a new task is a new line of `TASKS`.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import flax.linen as nn

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.mask_rcnn import infer_mask_rcnn, mask_rcnn_weights
from vmamba_jax.convert.upernet import infer_upernet, upernet_weights
from vmamba_jax.convert.vmamba import infer_config, vmamba_weights
from vmamba_jax.convert.weight import StateDict, Weight
from vmamba_jax.detection.config import MaskRCNNConfig
from vmamba_jax.detection.mask_rcnn import MaskRCNN
from vmamba_jax.models import VSSM
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.segmentation.config import Inference, UPerNetConfig
from vmamba_jax.segmentation.upernet import UPerNet

NetworkConfig: TypeAlias = VMambaConfig | UPerNetConfig | MaskRCNNConfig
ImageSteps: TypeAlias = Preprocessing | Inference
"""What images go through before a network sees them."""


class Task(NamedTuple):
    """What a network of one task is in a file and in this package.

    Attributes:
        name: of the task, as saved models and errors say it.
        holds: what a file of it holds, for errors.
        command: what runs such a network.
        marks: beginnings of names that are in every file of the task and in no other's, less the
            prefix that its backbone has too; empty for a bare VMamba.
        parts: first components of the names that belong to the network beside the backbone.
        last_layers: names of the layers whose outputs are the classes', and how many outputs they
            have for a number of classes; without a bare VMamba's.
        untraced: fields of the architecture that leave no trace in the weights.
        config: the type of the architecture.
        preprocessing: the type of what images go through, where models keep it.
        network: the module that an architecture describes.
        weights: every weight of an architecture under both names.
        infer_config: the architecture behind a state dict.
    """

    name: str
    holds: str
    command: str
    marks: tuple[str, ...]
    parts: tuple[str, ...]
    last_layers: Callable[[int], dict[str, int]]
    untraced: tuple[str, ...]
    config: type
    preprocessing: type | None
    network: Callable[..., nn.Module]
    weights: Callable[..., tuple[Weight, ...]]
    infer_config: Callable[[StateDict], NetworkConfig]


CLASSIFICATION = Task(
    name="classification",
    holds="a classifier or a bare backbone",
    command="vmamba-jax predict",
    marks=(),
    parts=(),
    last_layers=lambda _: {},
    untraced=(),
    config=VMambaConfig,
    preprocessing=Preprocessing,
    network=VSSM,
    weights=vmamba_weights,
    infer_config=infer_config,
)
SEGMENTATION = Task(
    name="segmentation",
    holds="a segmenter (UPerNet)",
    command="vmamba-jax segment",
    marks=("decode_head.psp_modules.", "decode_head.fpn_bottleneck."),
    parts=("decode_head", "auxiliary_head"),
    last_layers=lambda classes: {
        "decode_head.conv_seg": classes,
        "auxiliary_head.conv_seg": classes,
    },
    untraced=("dropout",),
    config=UPerNetConfig,
    preprocessing=Inference,
    network=UPerNet,
    weights=upernet_weights,
    infer_config=infer_upernet,
)
DETECTION = Task(
    name="detection",
    holds="a detector (Mask R-CNN)",
    command="vmamba-jax detect",
    marks=("rpn_head.", "roi_head.bbox_head.fc_cls.", "roi_head.mask_head."),
    parts=("neck", "rpn_head", "roi_head"),
    last_layers=lambda classes: {
        "roi_head.bbox_head.fc_cls": classes + 1,  # and the background
        "roi_head.bbox_head.fc_reg": 4 * classes,
        "roi_head.mask_head.conv_logits": classes,
    },
    untraced=("anchor_scale", "anchor_ratios"),
    config=MaskRCNNConfig,
    preprocessing=None,
    network=MaskRCNN,
    weights=mask_rcnn_weights,
    infer_config=infer_mask_rcnn,
)
TASKS = (CLASSIFICATION, SEGMENTATION, DETECTION)


def task_of(config: NetworkConfig) -> Task:
    """The task that an architecture is for."""
    return next(task for task in TASKS if isinstance(config, task.config))


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        KeyError: there is none.
    """
    return {task.name: task for task in TASKS}[name]


def recognise(names: Iterable[str]) -> Task:
    """The task of a network, from the names of its weights beside its backbone's."""
    names = list(names)
    for task in TASKS:
        if task.marks and all(any(name.startswith(m) for name in names) for m in task.marks):
            return task
    return CLASSIFICATION

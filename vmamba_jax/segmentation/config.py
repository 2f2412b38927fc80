"""The architecture of one UPerNet on a VMamba, and how photographs are shown to it, as values."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from vmamba_jax._closest import closest
from vmamba_jax.config import VMambaConfig


@dataclasses.dataclass(frozen=True)
class UPerNetConfig:
    """Hyper-parameters of a `UPerNet`; the defaults are the published segmenters' on ADE20K.

    Attributes:
        backbone: the VMamba; `num_classes`, `posembed` and `imgsize` play no part.
        num_classes: classes of a pixel.
        channels: of every map inside the decode head.
        auxiliary_channels: of the map inside the auxiliary head, which only the loss sees; 0
            leaves that head out.
        pool_scales: sides of the maps that the pyramid pooling module averages to.
        dropout: rate at which whole channels are dropped before the last layer of each head.

    Raises:
        ValueError: for a value outside its range.
    """

    backbone: VMambaConfig
    num_classes: int = 150
    channels: int = 512
    auxiliary_channels: int = 256
    pool_scales: Sequence[int] = (1, 2, 3, 6)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool_scales", tuple(int(s) for s in self.pool_scales))
        problems = (
            (self.num_classes < 1, f"num_classes must be positive, got {self.num_classes}"),
            (self.channels < 1, f"channels must be positive, got {self.channels}"),
            (
                self.auxiliary_channels < 0,
                "auxiliary_channels must be 0 (no such head) or positive",
            ),
            (
                not self.pool_scales or min(self.pool_scales) < 1,
                f"pool_scales must be positive sides, got {self.pool_scales}",
            ),
            (not 0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}"),
        )
        for failed, message in problems:
            if failed:
                raise ValueError(message)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage of the backbone."""
        return tuple(self.backbone.depths)

    @property
    def auxiliary_stage(self) -> int:
        """The stage whose map the auxiliary head reads: the last but one."""
        return max(len(self.depths) - 2, 0)

    def replace(self, **overrides: object) -> "UPerNetConfig":
        """A copy with some fields changed.

        Raises:
            ValueError: for a name that is no field.
        """
        fields = [f.name for f in dataclasses.fields(self)]
        for name in overrides:
            if name not in fields:
                raise ValueError(f"unknown config field {name!r}." + closest(name, fields))
        return dataclasses.replace(self, **overrides)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Inference:
    """How a photograph is shown to the network; the defaults are the published evaluation's.

    Attributes:
        mode: ``"whole"``, or ``"slide"``: by windows whose logits are averaged.
        scale: longest and shortest side that the image is resized to fit, in pixels.
        crop_size: height and width of a window, in pixels.
        stride: rows and columns from one window to the next.

    Raises:
        ValueError: for a size or stride that is not positive, or windows that leave gaps.
    """

    mode: Literal["whole", "slide"] = "whole"
    scale: tuple[int, int] = (2048, 512)
    crop_size: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (341, 341)

    def __post_init__(self) -> None:
        if min(*self.scale, *self.crop_size, *self.stride) < 1:
            raise ValueError("scale, crop size and stride must be positive")
        gaps = any(step > side for step, side in zip(self.stride, self.crop_size, strict=True))
        if self.mode == "slide" and gaps:
            raise ValueError(
                f"windows of {_by(self.crop_size)} every {_by(self.stride)} pixels leave gaps: the "
                "stride can't exceed the crop size"
            )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

"""The architecture of one VMamba as a frozen, hashable value, and the grammar of `forward_type`."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from vmamba_jax._closest import closest
from vmamba_jax.typing import Size

ScanOrder = Literal["cross2d", "unidi", "bidi", "rot90", "cascade2d"]
OutNorm = Literal["layernorm", "none", "dwconv3", "cnorm", "softmax", "sigmoid"]


class ForwardType(NamedTuple):
    """What a `forward_type` string such as ``"v05_noz"`` asks of the SS2D operator.

    Attributes:
        operator: ``"v0"`` (the first release), ``"v2"`` (all later ones) or ``"m0"`` (Mamba-2).
        scan_order: the 2-D traversal.
        gate: whether a second branch `z` multiplies the output.
        gate_act: whether `z` passes through the activation first.
        out_act: whether the output passes through GELU before the gate.
        out_norm: the normalisation after the scan.
        force_fp32: whether the inputs of the scan are cast to float32 in a low-precision model.
    """

    operator: Literal["v0", "v2", "m0"]
    scan_order: ScanOrder
    gate: bool
    gate_act: bool
    out_act: bool
    out_norm: OutNorm
    force_fp32: bool


# Head of the string -> (operator, scan order, force_fp32).
_HEADS: dict[str, tuple[Literal["v0", "v2", "m0"], ScanOrder, bool]] = {
    "v0": ("v0", "cross2d", True),
    "v0seq": ("v0", "cross2d", True),  # one direction after another: the same numbers as v0
    "v01": ("v2", "cross2d", True),
    "v02": ("v2", "cross2d", True),
    "v03": ("v2", "cross2d", True),
    "v04": ("v2", "cross2d", False),
    "v05": ("v2", "cross2d", False),
    "v2": ("v2", "cross2d", True),
    "v3": ("v2", "cross2d", False),
    "v051d": ("v2", "unidi", False),
    "v31d": ("v2", "unidi", False),
    "v052d": ("v2", "bidi", False),
    "v32d": ("v2", "bidi", False),
    "v052dc": ("v2", "cascade2d", False),
    "v32dc": ("v2", "cascade2d", False),
    "v052d3": ("v2", "rot90", False),
    "m0": ("m0", "cross2d", False),
}
_OUT_NORMS: dict[str, OutNorm] = {
    "onnone": "none",
    "ondwconv3": "dwconv3",
    "oncnorm": "cnorm",
    "onsoftmax": "softmax",
    "onsigmoid": "sigmoid",
}
_FLAGS = ("noz", "nozact", "oact", "no32")

ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid")
_CHOICES: dict[str, tuple[str, ...]] = {
    "ssm_act_layer": ACTIVATIONS,
    "mlp_act_layer": ACTIVATIONS,
    "ssm_init": ("v0", "v1", "v2"),
    "norm_layer": ("ln", "ln2d", "bn"),
    "downsample_version": ("v1", "v2", "v3", "none"),
    "patchembed_version": ("v1", "v2"),
}


def parse_forward_type(forward_type: str) -> ForwardType:
    """Reads a `forward_type`: one head, then postfixes joined by ``_`` in any order.

    Raises:
        ValueError: for an unknown head or postfix, or two output norms at once.
    """
    head, *postfixes = forward_type.split("_")
    if head not in _HEADS:
        raise ValueError(
            f"unknown forward_type {forward_type!r}: {head!r} is no scan operator."
            + closest(head, _HEADS)
        )
    known = (*_FLAGS, *_OUT_NORMS)
    for postfix in postfixes:
        if postfix not in known:
            raise ValueError(
                f"unknown postfix '_{postfix}' in forward_type {forward_type!r}."
                + closest(postfix, known)
            )
    norms = [p for p in postfixes if p in _OUT_NORMS]
    if len(norms) > 1:
        raise ValueError(f"forward_type {forward_type!r} names {len(norms)} output norms; keep one")
    operator, scan_order, force_fp32 = _HEADS[head]
    if operator == "v0" and postfixes:
        raise ValueError(f"forward_type {head!r} takes no postfix, got {forward_type!r}")
    return ForwardType(
        operator=operator,
        scan_order=scan_order,
        gate="noz" not in postfixes,
        gate_act="nozact" not in postfixes,
        out_act="oact" in postfixes,
        out_norm=_OUT_NORMS[norms[0]] if norms else "layernorm",
        force_fp32=force_fp32 and "no32" not in postfixes,
    )


@dataclasses.dataclass(frozen=True)
class VMambaConfig:
    """Hyper-parameters of a VMamba, under the PyTorch project's keyword names.

    Attributes:
        patch_size: side of a patch, in pixels.
        in_chans: image channels.
        num_classes: classes of the head; 0 leaves it out and the model returns pooled features.
        depths: blocks in each stage.
        dims: channels of each stage, or of the first one (each next stage doubles it); kept as a
            tuple.
        ssm_d_state: hidden state size N.
        ssm_ratio: channels inside SS2D over channels of the block; 0 removes the branch.
        ssm_dt_rank: rank R of the delta projection, or ``"auto"``: ``ceil(dim / 16)`` per stage.
        ssm_act_layer: activation inside SS2D.
        ssm_conv: kernel size of SS2D's depthwise convolution; below 2 leaves it out.
        ssm_conv_bias: whether that convolution has a bias.
        ssm_drop_rate: dropout after SS2D's output projection.
        ssm_init: initialisation of A, D and the delta projection.
        forward_type: variant of the operator, see `parse_forward_type`.
        mlp_ratio: hidden over block channels of the MLP; 0 removes the branch.
        mlp_act_layer: activation inside the MLP.
        mlp_drop_rate: dropout inside the MLP.
        gmlp: gated MLP.
        drop_path_rate: stochastic depth rate of the last block; rises linearly from 0.
        patch_norm: whether the patch embedding is normalised.
        norm_layer: ``"ln"`` or ``"ln2d"`` (LayerNorm; the same here, where every map is
            channels-last) or ``"bn"`` (BatchNorm).
        downsample_version: ``"v1"`` patch merging, ``"v2"`` 2x2 and ``"v3"`` 3x3 stride-2
            convolution, ``"none"``.
        patchembed_version: ``"v1"`` one convolution, ``"v2"`` two overlapping ones.
        post_norm: normalise each branch's output instead of its input.
        use_checkpoint: recompute each block in the backward pass to save memory.
        posembed: add a learned absolute position embedding.
        imgsize: side of the image that the position embedding is made for, in pixels, or its height
            and width.

    Raises:
        ValueError: for a value outside the lists and ranges above.
    """

    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    depths: Sequence[int] = (2, 2, 9, 2)
    dims: int | Sequence[int] = (96, 192, 384, 768)
    ssm_d_state: int = 16
    ssm_ratio: float = 2.0
    ssm_dt_rank: int | Literal["auto"] = "auto"
    ssm_act_layer: str = "silu"
    ssm_conv: int = 3
    ssm_conv_bias: bool = True
    ssm_drop_rate: float = 0.0
    ssm_init: str = "v0"
    forward_type: str = "v2"
    mlp_ratio: float = 4.0
    mlp_act_layer: str = "gelu"
    mlp_drop_rate: float = 0.0
    gmlp: bool = False
    drop_path_rate: float = 0.1
    patch_norm: bool = True
    norm_layer: str = "ln"
    downsample_version: str = "v2"
    patchembed_version: str = "v1"
    post_norm: bool = False
    use_checkpoint: bool = False
    posembed: bool = False
    imgsize: int | Sequence[int] = 224

    def __post_init__(self) -> None:
        # Lists (from JSON, YAML, or a ported config) become tuples so that the value is hashable.
        depths = tuple(int(d) for d in self.depths)
        dims = self.dims
        dims = (
            tuple(dims * 2**i for i in range(len(depths)))
            if isinstance(dims, int)
            else tuple(int(d) for d in dims)
        )
        object.__setattr__(self, "depths", depths)
        object.__setattr__(self, "dims", dims)
        if not isinstance(self.imgsize, int):
            sides = tuple(int(side) for side in self.imgsize)
            object.__setattr__(self, "imgsize", sides[0] if len(set(sides)) == 1 else sides)
        for field, accepted in _CHOICES.items():
            value = getattr(self, field)
            lowered = value.lower() if isinstance(value, str) else value
            if lowered not in accepted:
                raise ValueError(f"unknown {field} {value!r}." + closest(value, accepted))
            object.__setattr__(self, field, lowered)
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        dims, forward_type = self.stage_dims, parse_forward_type(self.forward_type)
        if not self.depths or min(self.depths) < 1:
            yield f"depths must be positive counts, one a stage, got {self.depths}"
        if len(dims) != len(self.depths):
            yield f"dims has {len(dims)} stages and depths has {len(self.depths)}"
        if min(dims) < 1:
            yield f"dims must be positive, got {dims}"
        if self.patch_size < 1 or self.in_chans < 1:
            yield "patch_size and in_chans must be positive"
        if self.patchembed_version == "v2" and (self.patch_size % 2 or min(dims) < 2):
            yield "patchembed_version 'v2' needs an even patch_size and at least 2 channels"
        if self.num_classes < 0:
            yield f"num_classes must be 0 (features only) or positive, got {self.num_classes}"
        if self.ssm_d_state < 1:
            yield f"ssm_d_state must be positive, got {self.ssm_d_state}"
        if self.ssm_ratio < 0 or self.mlp_ratio < 0:
            yield "ssm_ratio and mlp_ratio can't be negative"
        if self.ssm_dt_rank != "auto" and self.ssm_dt_rank < 1:
            yield f"ssm_dt_rank must be 'auto' or positive, got {self.ssm_dt_rank}"
        if self.ssm_conv > 1 and self.ssm_conv % 2 == 0:
            yield f"ssm_conv must be odd (or below 2: no convolution), got {self.ssm_conv}"
        for name in ("drop_path_rate", "ssm_drop_rate", "mlp_drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} must lie in [0, 1), got {getattr(self, name)}"
        if self.downsample_version == "none" and len(set(dims)) > 1:
            yield f"downsample_version 'none' needs the same dims in every stage, got {dims}"
        if not isinstance(self.imgsize, int) and len(self.imgsize) != 2:
            yield f"imgsize must be one side or a height and a width, got {self.imgsize}"
        elif self.posembed and min(self.input_size) < self.patch_size:
            yield f"imgsize {self.imgsize} holds no patch of {self.patch_size} pixels"
        if forward_type.operator == "m0" and self.ssm_ratio > 0:
            if self.ssm_init == "v0":
                yield "forward_type 'm0' needs ssm_init 'v1' or 'v2'"
            if any(self.inner_dim(i) % self.dt_rank(i) for i in range(len(dims))):
                yield "forward_type 'm0' needs ssm_ratio * dims to be a multiple of ssm_dt_rank"

    @property
    def stage_dims(self) -> tuple[int, ...]:
        """Channels of each stage (`dims`, for the type checker: always a tuple by now)."""
        assert isinstance(self.dims, tuple)
        return self.dims

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of `imgsize`, in pixels."""
        if isinstance(self.imgsize, int):
            return self.imgsize, self.imgsize
        height, width = self.imgsize
        return height, width

    def inner_dim(self, stage: int) -> int:
        """Channels inside SS2D in one stage."""
        return int(self.ssm_ratio * self.stage_dims[stage])

    def dt_rank(self, stage: int) -> int:
        """Rank R of the delta projection in one stage."""
        if self.ssm_dt_rank == "auto":
            return math.ceil(self.stage_dims[stage] / 16)
        return self.ssm_dt_rank

    def feature_size(self, height: Size, width: Size, stage: int = -1) -> tuple[Size, Size]:
        """Height and width of a stage's map, in positions, for an image of this size in pixels."""
        stage = range(len(self.depths))[stage]

        def side(pixels: Size) -> Size:
            if self.patchembed_version == "v1":
                pixels //= self.patch_size
            else:
                stride = self.patch_size // 2
                for _ in range(2):
                    pixels = (pixels + 1 - stride) // stride + 1
            for _ in range(stage if self.downsample_version != "none" else 0):
                pixels = pixels // 2 if self.downsample_version == "v2" else (pixels + 1) // 2
            return max(pixels, 0)

        return side(height), side(width)

    def replace(self, **overrides: object) -> "VMambaConfig":
        """A copy with some fields changed.

        Raises:
            ValueError: for a name that is no field.
        """
        fields = [f.name for f in dataclasses.fields(self)]
        for name in overrides:
            if name not in fields:
                raise ValueError(f"unknown config field {name!r}." + closest(name, fields))
        return dataclasses.replace(self, **overrides)  # pyright: ignore[reportArgumentType]

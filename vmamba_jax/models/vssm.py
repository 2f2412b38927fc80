"""VSSM, the VMamba network: patch embedding, stages of VSS blocks, classifier."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax._closest import closest
from vmamba_jax.config import VMambaConfig
from vmamba_jax.models.layers import (
    ConvDownsample,
    Dense,
    GatedMlp,
    Mlp,
    PatchEmbed,
    PatchMerging,
    dtypes_of,
    linear_init,
    norm,
)
from vmamba_jax.models.ss2d import SS2D
from vmamba_jax.ops.per_device import batch_axes, split_like
from vmamba_jax.ops.residuals import POLICIES, keep
from vmamba_jax.ops.wide import wide, widened
from vmamba_jax.typing import Array, Dtype, FeatureMap, Float, Num, Precision, ResampledMap


class VSSBlock(nn.Module):
    """A residual SS2D branch and a residual MLP branch, each normalised.

    Attributes:
        config: the architecture.
        stage: index of the stage, which sets channels and ranks.
        drop_path: rate at which a sample skips a branch in training (stochastic depth); a traced
            number when the blocks of a stage run in a loop.
        scan_implementation: see `vmamba_jax.ops.selective_scan`.
        dtype: compute dtype.
        param_dtype: dtype of the parameters.
    """

    config: VMambaConfig
    stage: int = 0
    drop_path: float | Array = 0.0
    scan_implementation: str | Sequence[str] | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: FeatureMap, train: bool = False) -> FeatureMap:
        """Refines a map; the shape stays."""
        config = self.config
        dtypes = dtypes_of(self)

        def residual(x: FeatureMap, branch: nn.Module, norm_name: str) -> FeatureMap:
            normalise = norm(config.norm_layer, train, self.param_dtype, norm_name, self.dtype)
            y = (
                normalise(branch(x, train))  # pyright: ignore[reportCallIssue]
                if config.post_norm
                else branch(normalise(x), train)  # pyright: ignore[reportCallIssue]
            )
            return keep(x + self._drop_path(y, train).astype(x.dtype))

        if config.ssm_ratio > 0:
            ss2d = SS2D(
                d_state=config.ssm_d_state,
                ssm_ratio=config.ssm_ratio,
                dt_rank=config.dt_rank(self.stage),
                act_layer=config.ssm_act_layer,
                d_conv=config.ssm_conv,
                conv_bias=config.ssm_conv_bias,
                dropout=config.ssm_drop_rate,
                initialize=config.ssm_init,
                forward_type=config.forward_type,
                scan_implementation=self.scan_implementation,
                name="op",
                **dtypes,
            )
            x = residual(x, ss2d, "norm")
        if config.mlp_ratio > 0:
            kind = GatedMlp if config.gmlp else Mlp
            hidden = int(config.stage_dims[self.stage] * config.mlp_ratio)
            mlp = kind(hidden, config.mlp_act_layer, config.mlp_drop_rate, name="mlp", **dtypes)
            x = residual(x, mlp, "norm2")
        return x

    def _drop_path(self, y: FeatureMap, train: bool) -> FeatureMap:
        rate = self.drop_path
        if not train or (isinstance(rate, float) and rate == 0):
            return y
        keep = jnp.asarray(1 - rate, y.dtype)
        drawn = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (y.shape[0], 1, 1, 1))
        return jnp.where(split_like(drawn, y), y / keep, jnp.zeros_like(y))


@cache  # the same class each time: of another one, calls outside of `jax.jit` compile again
def _block_type(kept: Callable[..., bool] | None) -> type[VSSBlock]:
    # What leaves an inner jit, jax.checkpoint keeps as it is; of other arrays it keeps a copy.
    return nn.remat(nn.jit(VSSBlock, static_argnums=(2,)), static_argnums=(2,), policy=kept)


class VSSM(nn.Module):
    """VMamba (Liu et al., "VMamba: Visual State Space Model", 2024).

    Attributes:
        config: the architecture.
        scan_implementation: see `vmamba_jax.ops.selective_scan`.
        dtype: dtype in which the blocks multiply matrices and keep what the scan reads. All else
            is float32, as under PyTorch's autocast: the residual stream and what writes it whole
            (patch embedding, downsampling), normalisations, activations, gates, the state of the
            scan, the classifier; with float64 all is that.
        param_dtype: dtype of the parameters.
        scan_blocks: run the blocks of a stage in a loop, so that they compile once. The parameters
            are the same ones and are stacked on the fly, a copy a call; random draws differ. Not
            with BatchNorm.
        precision: of the float32 products outside of the blocks (patch embedding, downsampling,
            classifier), see `jax.lax.Precision`: float32 on every device. None is what
            `jax.default_matmul_precision` says, by default as fast as the device likes.
        recompute: what of a block a gradient does not keep but compute again: its
            ``"activations"`` and normalisations; its ``"scan_inputs"`` (depthwise convolution and
            projections) and the patch embedding too; or whole ``"blocks"``, as with the config's
            `use_checkpoint`.
    """

    config: VMambaConfig
    scan_implementation: str | Sequence[str] | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_blocks: bool = False
    precision: Precision = "highest"
    recompute: str = "activations"

    @nn.compact
    def __call__(
        self,
        images: Num[Array, "..."],
        train: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> Float[Array, "B classes"] | list[Array]:
        """Classifies images.

        Args:
            images: normalised float images (B, H, W, in_chans), of any size that leaves a pixel
                in the last stage.
            train: stochastic depth, dropout (rng ``"dropout"``) and, with BatchNorm, batch
                statistics (collection ``"batch_stats"`` mutable).
            out_indices: return these stages' maps instead; `features` is the way to ask for them.

        Returns:
            float32 logits (float64, if `dtype` is), or pooled features if the config has no
            classes.

        Raises:
            ValueError: for integer images, a wrong rank, channel count or size, images that are
                split over devices, an out_indices out of range, or an unknown `recompute`.
        """
        config = self.config
        dtypes = dtypes_of(self)
        _check_images(images, config)
        stages = len(config.depths)
        if out_indices is not None:
            _check_indices(out_indices, stages)

        embed = PatchEmbed
        if self.recompute != "activations":
            embed = nn.remat(PatchEmbed, static_argnums=(2,), policy=POLICIES["blocks"])
        x = embed(
            config.stage_dims[0],
            config.patch_size,
            config.patchembed_version,
            config.patch_norm,
            config.norm_layer,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name="patch_embed",
        )(images.astype(wide(self.dtype)), train)
        if config.posembed:
            height, width = config.feature_size(*config.input_size, stage=0)
            shape = (1, height, width, x.shape[-1])
            if x.shape[1:3] != shape[1:3]:
                raise ValueError(
                    f"the position embedding is {height}x{width} patches and this image is "
                    f"{x.shape[1]}x{x.shape[2]}: create the model with this image's size"
                )
            pos_embed = self.param("pos_embed", linear_init, shape, self.param_dtype)
            x = x + jnp.broadcast_to(pos_embed.astype(x.dtype), x.shape)

        # Each block skips a little more often than the one before it.
        drop_path = np.linspace(0, config.drop_path_rate, sum(config.depths)).tolist()
        block_type = _block_type(self._kept())
        maps = []
        for i, depth in enumerate(config.depths):
            rates = drop_path[sum(config.depths[:i]) :][:depth]
            if self.scan_blocks and depth > 1 and not self.is_initializing():
                x = self._loop(x, i, rates, train)
            else:
                for j, rate in enumerate(rates):
                    name = f"layers_{i}_blocks_{j}"
                    x = block_type(config, i, rate, self.scan_implementation, name=name, **dtypes)(
                        x, train
                    )
            maps.append(x)
            if out_indices is not None and i == max(out_indices, default=-1):
                break
            if i + 1 < stages:
                x = self._downsample(x, i, train)
        if out_indices is not None:
            return [maps[i] for i in out_indices]

        x = norm(config.norm_layer, train, self.param_dtype, "classifier_norm")(x)
        pooled = widened(x).mean(axis=(1, 2))
        if config.num_classes == 0:
            return pooled
        head = Dense(
            config.num_classes,
            dtype=pooled.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name="head",
        )
        return head(pooled)

    def features(
        self,
        images: Num[Array, "..."],
        out_indices: Sequence[int] = (0, 1, 2, 3),
        train: bool = False,
    ) -> list[Array]:
        """The stages' maps, channels-last, each after its blocks and before its downsampling.

        Call as ``model.apply(variables, images, out_indices=(0, 3), method="features")``.
        """
        return self(images, train, out_indices)  # pyright: ignore[reportReturnType]

    def _kept(self) -> Callable[..., bool] | None:
        """What the gradient of a block does not compute again."""
        name = "blocks" if self.config.use_checkpoint else self.recompute
        if name not in POLICIES:
            raise ValueError(f"unknown recompute {name!r}." + closest(name, POLICIES))
        return POLICIES[name]

    def _loop(self, x: FeatureMap, stage: int, rates: list[float], train: bool) -> FeatureMap:
        """The blocks of a stage as one, with the parameters of each in turn."""
        if self.config.norm_layer == "bn":
            raise ValueError("scan_blocks needs norm_layer 'ln' or 'ln2d': statistics can't loop")
        params = self.variables["params"]
        each = [params[f"layers_{stage}_blocks_{j}"] for j in range(len(rates))]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        random = train and self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), len(rates)) if random else None

        def block(x: FeatureMap, now: tuple) -> tuple[FeatureMap, None]:
            params, rate, key = now
            module = VSSBlock(
                self.config,
                stage,
                rate if any(rates) else 0.0,
                self.scan_implementation,
                parent=None,
                **dtypes_of(self),
            )
            rngs = None if key is None else {"dropout": key}
            y = module.apply({"params": params}, x, train, rngs=rngs)
            return y, None  # pyright: ignore[reportReturnType]

        block = jax.checkpoint(jax.jit(block), policy=self._kept())
        with jax.named_scope(f"layers_{stage}_blocks"):
            x, _ = jax.lax.scan(block, x, (stacked, jnp.asarray(rates, jnp.float32), keys))
        return x

    def _downsample(self, x: FeatureMap, stage: int, train: bool) -> ResampledMap:
        config = self.config
        make = {
            "v1": PatchMerging,
            "v2": partial(ConvDownsample, kernel=2),
            "v3": partial(ConvDownsample, kernel=3),
        }.get(config.downsample_version)
        if make is None:
            return x
        return make(
            features=config.stage_dims[stage + 1],
            norm_layer=config.norm_layer,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name=f"layers_{stage}_downsample",
        )(x, train)


def _check_images(images: Array, config: VMambaConfig) -> None:
    if images.ndim != 4 or images.shape[-1] != config.in_chans:
        raise ValueError(
            f"images must be (B, H, W, {config.in_chans}), channels last, got {images.shape}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be normalised floats, got {images.dtype}")
    batch_axes(images)
    if any(side < 1 for side in config.feature_size(*images.shape[1:3])):
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} are too small for {len(config.depths)} "
            "stages: nothing is left in the last one"
        )


def _check_indices(out_indices: Sequence[int], stages: int) -> None:
    wrong = [i for i in out_indices if not 0 <= i < stages]
    if wrong or not out_indices:
        raise ValueError(
            f"out_indices must name stages between 0 and {stages - 1}, got {tuple(out_indices)}"
        )

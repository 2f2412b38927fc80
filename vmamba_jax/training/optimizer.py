"""The released recipe's optimizer: AdamW, clipping, warm-up + cosine, weight decay, layer decay.

Everything follows the PyTorch run of the released weights to the last digit, including which
parameters decay and that its scheduler runs one update behind.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from vmamba_jax.config import VMambaConfig, parse_forward_type
from vmamba_jax.models.parameters import Path, layer_index, variable_shapes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Hyper-parameters of the optimizer; the defaults are the released ImageNet recipe.

    Attributes:
        learning_rate: peak learning rate for a batch of 512 images; scales with the batch size.
        warmup_learning_rate: learning rate of the first update, for a batch of 512.
        min_learning_rate: learning rate at the end, for a batch of 512.
        warmup_epochs: epochs of linear warm-up before the cosine.
        betas: decay of AdamW's first and second moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay of matrices and kernels.
        decay_ssm: also decay `A_logs` and the biases of delta, as the released models did;
            switching it off follows the Mamba papers.
        clip_norm: largest global norm of the gradient; 0 leaves it alone.
        ema_decay: decay of the exponential moving average of the weights; 0 keeps none.
        accumulation_steps: parts that a batch is split into, one after another, to save memory.
        layer_decay: each earlier block learns this much slower than the next; 1 is off.
        head_only: train the classifier's last layer alone.
        frozen_stages: keep the patch embedding and so many first stages as they are, each with
            the downsampling after it; 0 trains all. Norms of a backbone's maps are trained.
    """

    learning_rate: float = 5e-4
    warmup_learning_rate: float = 5e-7
    min_learning_rate: float = 5e-6
    warmup_epochs: float = 20.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_ssm: bool = True
    clip_norm: float = 5.0
    ema_decay: float = 0.9999
    accumulation_steps: int = 1
    layer_decay: float = 1.0
    head_only: bool = False
    frozen_stages: int = 0

    def __post_init__(self) -> None:
        """Refuses values that can't train."""
        problems = (
            (self.learning_rate <= 0, "learning_rate must be positive"),
            (self.warmup_epochs < 0, "warmup_epochs can't be negative"),
            (
                self.weight_decay < 0 or self.clip_norm < 0,
                "weight_decay and clip_norm can't be < 0",
            ),
            (not 0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1)"),
            (self.accumulation_steps < 1, "accumulation_steps must be at least 1"),
            (not 0 < self.layer_decay <= 1, "layer_decay must lie in (0, 1]"),
            (self.frozen_stages < 0, "frozen_stages can't be negative"),
        )
        for failed, message in problems:
            if failed:
                raise ValueError(f"optimizer: {message}")


class Schedule(NamedTuple):
    """Linear warm-up, then one half-cosine; a plain function of the update, in float64.

    It runs on the host, because float32 arithmetic would move the small learning rates at the end.

    Attributes:
        peak: learning rate after the warm-up.
        warmup: learning rate that the warm-up starts from.
        minimum: learning rate at `total_steps` and after.
        warmup_steps: updates of warm-up.
        total_steps: updates of the whole run.
    """

    peak: float
    warmup: float
    minimum: float
    warmup_steps: int
    total_steps: int

    def at(self, position: int) -> float:
        """The learning rate `position` updates into the schedule."""
        if position < self.warmup_steps:
            return self.warmup + position * (self.peak - self.warmup) / self.warmup_steps
        position -= self.warmup_steps
        length = self.total_steps - self.warmup_steps
        if position >= length:
            return self.minimum
        cosine = math.cos(math.pi * position / length)
        return self.minimum + 0.5 * (self.peak - self.minimum) * (1 + cosine)

    def __call__(self, update: int) -> float:
        """The learning rate that update number `update` (from 0) uses.

        The released runs stepped the schedule after each update with that update's own number, so
        the first position serves the first two updates.
        """
        return self.at(max(update - 1, 0))


def make_schedule(
    config: OptimizerConfig, batch_size: int, steps_per_epoch: int, epochs: float
) -> Schedule:
    """The schedule of a run, its learning rates scaled linearly by ``batch_size / 512``.

    Args:
        config: learning rates for a batch of 512.
        batch_size: images per update over all devices and accumulation steps.
        steps_per_epoch: updates per epoch.
        epochs: length of the run.

    Raises:
        ValueError: if the warm-up fills the whole run.
    """
    scale = batch_size / 512
    total = int(epochs * steps_per_epoch)
    warmup = int(config.warmup_epochs * steps_per_epoch)
    if total < 1 or warmup >= total:
        raise ValueError(
            f"the run has {total} updates and {warmup} of them are warm-up: "
            "raise epochs or lower optimizer.warmup-epochs"
        )
    return Schedule(
        peak=config.learning_rate * scale,
        warmup=config.warmup_learning_rate * scale,
        minimum=config.min_learning_rate * scale,
        warmup_steps=warmup,
        total_steps=total,
    )


def is_decayed(path: Path, model: VMambaConfig, *, decay_ssm: bool = True) -> bool:
    """Whether weight decay applies: to what is no vector in PyTorch, and no position embedding.

    Args:
        path: of the parameter in its collection.
        model: the architecture.
        decay_ssm: False also exempts `A_logs` and the biases of the delta projection.
    """
    match path[-1]:
        case "bias" | "scale" | "pos_embed":
            return False
        case "Ds":  # routes and channels in one axis there, but for the Mamba-2 form
            return parse_forward_type(model.forward_type).operator == "m0"
        case "A_logs" | "dt_projs_bias":
            return decay_ssm
        case _:
            return True


def learning_rate_scale(
    path: Sequence[str], config: OptimizerConfig, depths: Sequence[int]
) -> float:
    """How much slower than the head a parameter learns; 0 keeps it as it is.

    Args:
        path: names from the root of the parameters to the leaf; see `layer_index`.
        config: `layer_decay`, `frozen_stages` and `head_only`.
        depths: blocks in each stage.
    """
    layer = layer_index(path, depths)
    if config.head_only:
        return float("head" in path)
    if layer <= sum(depths[: config.frozen_stages]) and config.frozen_stages:
        return 0.0
    return config.layer_decay ** (sum(depths) + 1 - layer)


def learning_rate_scales(
    params: Mapping[str, Any], config: OptimizerConfig, depths: Sequence[int]
) -> PyTree:
    """`learning_rate_scale` of every leaf, for any network with a VMamba somewhere in it.

    Args:
        params: the network's parameters, as arrays or `jax.ShapeDtypeStruct`.
        config: `layer_decay`, `frozen_stages` and `head_only`.
        depths: blocks in each stage of the VMamba.

    Returns:
        The tree of `params` with a float at each leaf.
    """
    return flax.traverse_util.path_aware_map(
        lambda path, _: learning_rate_scale([str(name) for name in path], config, depths), params
    )


class ClipState(NamedTuple):
    """What `clip_by_global_norm` remembers.

    Attributes:
        grad_norm: global norm of the last gradient, before clipping.
    """

    grad_norm: jax.Array


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """PyTorch's `clip_grad_norm_`: scales by ``max_norm / (norm + 1e-6)`` where that is below 1.

    `optax.clip_by_global_norm` has no 1e-6, which is visible in float32, and keeps no norm.

    Args:
        max_norm: largest norm; 0 only measures.
    """

    def init(params: PyTree) -> ClipState:
        del params
        return ClipState(jnp.zeros((), jnp.float32))

    def update(updates: PyTree, state: PyTree, params: PyTree = None):
        del state, params
        norm = optax.tree.norm(updates)
        if max_norm:
            scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
            updates = jax.tree.map(lambda g: g * scale, updates)
        return updates, ClipState(norm)

    return optax.GradientTransformation(init, update)


def _freeze(scales: PyTree) -> optax.GradientTransformation:
    """Drops the gradients of leaves whose scale is 0, so that their backward pass is never run."""

    def update(updates: PyTree, params: PyTree = None) -> PyTree:
        del params
        return jax.tree.map(lambda g, s: g if s else jnp.zeros_like(g), updates, scales)

    return optax.stateless(update)


def _scale_by_learning_rate(scales: PyTree) -> optax.GradientTransformationExtraArgs:
    """Multiplies by ``-learning_rate`` (an argument of `update`) and each leaf's own scale."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **arguments: Any):
        del params
        rate = arguments["learning_rate"]
        return jax.tree.map(lambda u, s: -rate * s * u, updates, scales), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: OptimizerConfig, model_config: VMambaConfig
) -> optax.GradientTransformationExtraArgs:
    """PyTorch's AdamW with the released recipe's parameter groups.

    The learning rate is an argument of `update`, because the schedule runs on the host.

    Args:
        config: hyper-parameters.
        model_config: the model whose parameters are optimised.

    Returns:
        An optax transformation; call ``update(grads, state, params, learning_rate=...)``.
    """
    params = [path[1:] for path in variable_shapes(model_config) if path[0] == "params"]

    def each(function: Callable[[Path], Any]) -> PyTree:
        return flax.traverse_util.unflatten_dict({path: function(path) for path in params})

    decayed = each(lambda path: is_decayed(path, model_config, decay_ssm=config.decay_ssm))
    scales = each(lambda path: learning_rate_scale(path, config, model_config.depths))
    return adamw(
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        decayed=decayed,
        scales=scales,
    )


def adamw(
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float,
    decayed: PyTree,
    scales: PyTree,
) -> optax.GradientTransformationExtraArgs:
    """PyTorch's AdamW behind PyTorch's clipping.

    Args:
        betas: decay of the first and second moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay.
        clip_norm: largest global norm of the gradient; 0 leaves it alone.
        decayed: for every parameter, whether weight decay applies.
        scales: for every parameter, the factor of its learning rate; 0 keeps it as it is.

    Returns:
        An optax transformation; call ``update(grads, state, params, learning_rate=...)``.
    """
    return optax.chain(
        _freeze(scales),
        clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        _scale_by_learning_rate(scales),
    )


def ema_update(ema: Mapping[str, Any], variables: Mapping[str, Any], decay: float) -> PyTree:
    """One update of the moving average, of parameters and batch statistics alike."""
    return jax.tree.map(lambda e, v: e * decay + v * (1.0 - decay), ema, variables)

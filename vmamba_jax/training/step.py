"""One update and one evaluation batch, as pure functions to be jitted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vmamba_jax.preprocessing import Preprocessing, normalize_images
from vmamba_jax.training.optimizer import ema_update
from vmamba_jax.training.sharding import replicated, state_sharding
from vmamba_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Augment = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]
"""(key, batch) -> images (B, H, W, C) float and targets, as the loss takes them."""
Loss = Callable[[Any, jax.Array], jax.Array]
"""(what the model returns, targets) -> float32 scalar."""
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]
"""(state, batch, learning rate) -> (state, metrics)."""
EvalStep = Callable[[Any, Batch], Metrics]
"""(variables, batch) -> results."""


def soft_cross_entropy(
    logits: Float[Array, "B classes"], targets: Float[Array, "B classes"]
) -> Float[Array, ""]:
    """Mean cross-entropy against soft targets, in float32."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.sum(targets * log_probabilities, axis=-1))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    augment: Augment,
    mesh: Mesh,
    *,
    loss: Loss = soft_cross_entropy,
    ema_decay: float = 0.0,
    accumulation_steps: int = 1,
) -> TrainStep:
    """The update of a training run, jitted; the state's buffers are donated.

    Args:
        model: the model; its `dtype` is the compute precision.
        optimizer: from `make_optimizer`.
        augment: turns a batch into images and targets on the device.
        mesh: from `make_mesh`.
        loss: compares what the model returns in training with the targets.
        ema_decay: decay of the moving average, used if the state keeps one.
        accumulation_steps: parts that the batch is split into.

    Returns:
        ``(state, batch, learning_rate) -> (state, metrics)``. `metrics` are scalars: `loss`,
        `grad_norm` before clipping, `skipped` and `skipped_in_a_row`. A loss or gradient that is
        not finite leaves everything but the counters as it was.
    """

    def loss_fn(params: Any, model_state: Any, key: jax.Array, batch: Batch):
        augment_key, dropout_key = jax.random.split(key)
        images, targets = augment(augment_key, batch)
        outputs, new_model_state = model.apply(
            {"params": params, **model_state},
            images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=list(model_state),
        )
        return loss(outputs, targets), new_model_state

    def gradients(params: Any, model_state: Any, key: jax.Array, batch: Batch):
        """Loss, gradient and new batch statistics, over the accumulation steps."""
        # Gathered once for forward and backward; their gradients leave as shards again.
        shardings = state_sharding(params, mesh)
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

        def shard(grads: Any) -> Any:
            return jax.lax.with_sharding_constraint(grads, shardings)

        if accumulation_steps == 1:
            (loss, model_state), grads = value_and_grad(params, model_state, key, batch)
            return loss, shard(grads), model_state

        def accumulate(carry: Any, part: tuple[jax.Array, Batch]):
            loss_sum, grad_sum, model_state = carry
            index, batch = part
            (loss, model_state), grads = value_and_grad(
                params, model_state, jax.random.fold_in(key, index), batch
            )
            return (
                loss_sum + loss,
                shard(jax.tree.map(jnp.add, grad_sum, grads)),
                model_state,
            ), None

        # Part i takes every accumulation_steps-th image, so no image changes its device.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, accumulation_steps, *x.shape[1:]), 0, 1), batch
        )
        zeros = shard(jax.tree.map(jnp.zeros_like, params))
        (loss, grads, model_state), _ = jax.lax.scan(
            accumulate,
            (jnp.zeros((), jnp.float32), zeros, model_state),
            (jnp.arange(accumulation_steps), parts),
        )
        mean = 1.0 / accumulation_steps
        return loss * mean, jax.tree.map(lambda g: g * mean, grads), model_state

    def train_step(
        state: TrainState, batch: Batch, learning_rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
        params = state.variables["params"]
        model_state = {k: v for k, v in state.variables.items() if k != "params"}
        key = jax.random.fold_in(state.rng, state.step)
        loss, grads, model_state = gradients(params, model_state, key, batch)
        # optax raises a float to an integer count, which strict promotion (in our tests) refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, params, learning_rate=learning_rate
            )
        variables = {"params": optax.apply_updates(params, updates), **model_state}
        new = dataclasses.replace(
            state,
            variables=variables,
            ema=None if state.ema is None else ema_update(state.ema, variables, ema_decay),
            opt_state=opt_state,
            skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
        )
        grad_norm = optax.tree.get(opt_state, "grad_norm")
        old = dataclasses.replace(
            state, skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        new = dataclasses.replace(new, step=state.step + 1)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }
        return new, metrics

    def sharded_step(state: TrainState, batch: Batch, learning_rate: jax.Array):
        new, metrics = train_step(state, batch, learning_rate)
        new = jax.lax.with_sharding_constraint(new, state_sharding(new, mesh))
        return new, jax.lax.with_sharding_constraint(metrics, replicated(mesh))

    return jax.jit(sharded_step, donate_argnums=0)


def make_eval_step(
    model: nn.Module, mesh: Mesh, preprocessing: Preprocessing | None = None
) -> EvalStep:
    """The evaluation of one batch, jitted.

    Args:
        model: the model.
        mesh: from `make_mesh`.
        preprocessing: has the images normalised first; None takes them as they are.

    Returns:
        ``(variables, batch) -> results``: `prediction` (B,) int32, and sums over the images whose
        `mask` is set: `count`, `loss`, `top1`, `top5`, float32 scalars. Of equal logits the first
        class is the likelier one; a row with a logit that is not finite is wrong.
    """

    def eval_step(variables: Any, batch: Batch) -> Metrics:
        variables = jax.lax.with_sharding_constraint(variables, replicated(mesh))
        images = batch["image"]
        if preprocessing is not None:
            images = normalize_images(images, preprocessing.mean, preprocessing.std)
        logits: Any = model.apply(variables, images, train=False)
        logits = logits.astype(jnp.float32)
        labels = batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, likeliest = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = likeliest == labels[:, None]
        seen = batch["mask"].astype(bool)
        # A row that is not finite throughout orders its classes by accident.
        valid = seen & jnp.all(jnp.isfinite(logits), axis=-1)
        sums = {
            "count": jnp.sum(seen, dtype=jnp.float32),
            "loss": jnp.sum(jnp.where(seen, loss, 0.0)),
            "top1": jnp.sum(valid & hits[:, 0], dtype=jnp.float32),
            "top5": jnp.sum(valid & jnp.any(hits, axis=-1), dtype=jnp.float32),
        }
        sums["prediction"] = likeliest[:, 0].astype(jnp.int32)
        return jax.lax.with_sharding_constraint(sums, replicated(mesh))

    return jax.jit(eval_step)

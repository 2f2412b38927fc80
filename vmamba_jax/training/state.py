"""Everything that training changes, as one tree that is born sharded."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vmamba_jax.training.sharding import state_sharding
from vmamba_jax.typing import Variables

PyTree = Any
Leaf = Any
"""An array, or what stands for it: its shape and dtype, or its sharding."""

_NEITHER_WEIGHTS_NOR_AVERAGE = ("step", "opt_state", "rng", "skipped", "skipped_in_a_row")


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: batches seen; int32 scalar.
        variables: ``{"params": ...}`` and, with BatchNorm, ``"batch_stats"``; float32.
        ema: moving average of `variables`, or None.
        opt_state: the optimizer's own state.
        rng: key that every step folds its number into.
        skipped: updates left out because loss or gradient was not finite; int32 scalar.
        skipped_in_a_row: how many of them were the last ones; int32 scalar.
    """

    step: Leaf
    variables: PyTree
    ema: PyTree  # jax puts a placeholder of its own where None is, as it shapes a state
    opt_state: PyTree
    rng: Leaf
    skipped: Leaf
    skipped_in_a_row: Leaf

    @property
    def weights(self) -> Variables:
        """The weights to use: the moving average where there is one."""
        return self.variables if self.ema is None else self.ema

    def items(self) -> dict[str, PyTree]:
        """The state by the items of a checkpoint."""
        average = {} if self.ema is None else {"ema": self.ema}
        training = {name: getattr(self, name) for name in _NEITHER_WEIGHTS_NOR_AVERAGE}
        return {"variables": self.variables, **average, "training": training}

    @classmethod
    def from_items(cls, items: Mapping[str, PyTree]) -> "TrainState":
        """The state that `items` returned."""
        return cls(variables=items["variables"], ema=items.get("ema"), **items["training"])


def abstract_variables(model: nn.Module, image_shape: tuple[int, int, int]) -> Variables:
    """Shapes and dtypes of a model's variables; nothing is computed.

    Args:
        model: a VSSM, or another Linen module of one image batch.
        image_shape: (H, W, C) of the images that it is built for.
    """
    initialise = _initialise(model, image_shape)
    return jax.eval_shape(lambda: initialise(jax.random.key(0)))


def make_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    image_shape: tuple[int, int, int],
    seed: int,
    ema: bool,
) -> Callable[[], TrainState]:
    """The function that builds a state from scratch, to be jitted, or only shaped.

    Args:
        model: the model.
        optimizer: from `make_optimizer`.
        image_shape: (H, W, C).
        seed: seed of the initial parameters and of all that is random in training.
        ema: whether to keep a moving average.
    """
    initialise = _initialise(model, image_shape)

    def init() -> TrainState:
        init_rng, train_rng = jax.random.split(jax.random.key(seed))
        variables = initialise(init_rng)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            variables=variables,
            # A copy: the buffers of donated arguments must differ.
            ema=jax.tree.map(jnp.copy, variables) if ema else None,
            opt_state=optimizer.init(variables["params"]),
            rng=train_rng,
            skipped=zero,
            skipped_in_a_row=zero,
        )

    return init


def abstract_state(init: Callable[[], TrainState], mesh: Mesh) -> TrainState:
    """The state as `jax.ShapeDtypeStruct` leaves with their shardings: what a restore needs."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh),
    )


def create_state(init: Callable[[], TrainState], mesh: Mesh) -> TrainState:
    """Runs `init` so that every leaf is born on the devices that it belongs to."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, mesh))
    return jax.jit(init, out_shardings=shardings)()


def with_weights(state: TrainState, variables: Variables) -> TrainState:
    """Starts from other weights: `variables` and the moving average take the given values.

    Args:
        state: a fresh state.
        variables: host or device arrays of the same tree and shapes.
    """

    def place(tree: Variables) -> Variables:
        return jax.tree.map(
            lambda new, old: jax.device_put(jnp.asarray(new, old.dtype), old.sharding),
            variables,
            tree,
        )

    return dataclasses.replace(
        state, variables=place(state.variables), ema=None if state.ema is None else place(state.ema)
    )


def _initialise(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> Callable[[jax.Array], Variables]:
    def initialise(rng: jax.Array) -> Variables:
        images = jnp.zeros((1, *image_shape), jnp.float32)
        return cast(Variables, model.init(rng, images))

    return initialise

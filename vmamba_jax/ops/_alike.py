"""Arrays of one kind for a function whose gradient is written out."""

from functools import reduce
from operator import add
from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def alike(arrays: T) -> T:
    """The same arrays; inside `jax.shard_map` each differs between devices if any of them does.

    Loops and written-out gradients are typed by that. And the gradient of what was the same on all
    devices is a sum over them, which JAX adds where it differentiates this sum with zero. XLA
    drops the zero.
    """
    leaves = jax.tree.leaves(arrays)
    zero = reduce(add, (jnp.zeros_like(a, jnp.float32, shape=()) for a in leaves))
    return jax.tree.map(lambda a: a + zero.astype(a.dtype), arrays)

"""The selective scan, one function over several implementations."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp

from vmamba_jax._closest import closest
from vmamba_jax.ops import _associative, _pallas_tpu, _reference, _sequential
from vmamba_jax.ops.per_device import per_device
from vmamba_jax.typing import Array, Float

IMPLEMENTATIONS: Mapping[str, Callable[..., Array]] = MappingProxyType(
    {
        "reference": _reference.selective_scan,
        "sequential": _sequential.selective_scan,
        "associative": _associative.selective_scan,
        "pallas_tpu": _pallas_tpu.selective_scan,
    }
)
"""Name -> implementation; one that can't serve an input raises NotImplementedError."""

DEFAULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("sequential",), "tpu": ("pallas_tpu", "associative"), "default": ("associative",)}
)
"""Platform -> names of implementations, of which the first that can serve does."""

_ONLY_ON = {"pallas_tpu": "tpu"}


def names_of(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names that a caller gives; none for the default.

    Raises:
        ValueError: for an unknown name.
    """
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation or ())
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"unknown implementation {name!r}." + closest(name, IMPLEMENTATIONS))
    return names


def platform() -> str:
    """Of the mesh in context, which may be one to compile for and not here; else the default's."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = jax.sharding.get_abstract_mesh().abstract_device or default
    return device if isinstance(device, str) else getattr(device, "platform", jax.default_backend())


def selective_scan(
    u: Float[Array, "B L K C"],
    delta: Float[Array, "B L K C_or_R"],
    A: Float[Array, "K C N"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K C"] | None = None,
    delta_bias: Float[Array, "K C"] | None = None,
    delta_softplus: bool = True,
    *,
    delta_proj: Float[Array, "K C R"] | None = None,
    reverse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B L K C"]:
    """Runs K independent selective state space models over a sequence (Mamba, algorithm 2).

    With ``s = softplus(delta + delta_bias)``, for every batch element, route and channel::

        h[l] = exp(s[l] * A) * h[l - 1] + s[l] * B[l] * u[l]        h in R^N, h[-1] = 0
        y[l] = <C[l], h[l]> + D * u[l]

    The step size, the decay and the state are float32 whatever the inputs are, float64 if `u` is.
    Differentiable in every array.

    Args:
        u: input, any float dtype.
        delta: step sizes before bias and softplus; with `delta_proj`, what it lifts to them.
        A: decay rates, negative.
        B: input weights, shared by the channels of a route.
        C: output weights, shared by the channels of a route.
        D: skip weights; None leaves the skip out.
        delta_bias: added to `delta`; None adds nothing.
        delta_softplus: whether softplus makes the step sizes positive.
        delta_proj: lifts `delta` (B, L, K, R) to the channels. An implementation that works in
            chunks does so chunk by chunk: neither the lifted `delta` nor its gradient exists whole.
        reverse: run from the last element to the first (the output stays in input order).
        implementation: a name in `IMPLEMENTATIONS`, or several to try in turn until one can serve
            these inputs, or None for the default of the platform that the program is lowered for.
            `reference` is plain JAX, and the only one that forward mode (`jax.jvp`, `jax.jacfwd`)
            can differentiate. A program exported for TPU and others in one needs a name: JAX can't
            lower the TPU's kernel beside them.

    Returns:
        y, in the dtype of `u`.

    Raises:
        ValueError: for shapes that do not fit together, or an unknown implementation.
        NotImplementedError: if no implementation asked for can serve these inputs.
    """
    _check_shapes(u, delta, A, B, C, D, delta_bias, delta_proj)
    names = names_of(implementation)
    arrays = (u, delta, A, B, C, D, delta_bias, delta_proj)
    return _scan(arrays, delta_softplus, reverse, names, platform() if names else None)


# Under `jax.jit`, scans of the same shapes are traced once; outside of it they compile once.
@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _scan(
    arrays: tuple[Array | None, ...],
    delta_softplus: bool,
    reverse: bool,
    names: tuple[str, ...],
    on: str | None,
) -> Array:
    """By the first of `names` that can serve on that platform, or by the default of each."""

    def by(names: Sequence[str]) -> Callable[..., Array]:
        def scan(*arrays: Array | None) -> Array:
            refusals = []
            for name in names:
                if on and _ONLY_ON.get(name, on) != on:
                    refusals.append(f"{name}: runs on {_ONLY_ON[name]}, this is {on}")
                    continue
                try:
                    return IMPLEMENTATIONS[name](*arrays, delta_softplus, reverse)
                except NotImplementedError as refusal:
                    refusals.append(f"{name}: {refusal}")
            others = [name for name in IMPLEMENTATIONS if name not in (*names, *_ONLY_ON)]
            raise NotImplementedError(
                f"no implementation can serve this scan. {'; '.join(refusals)}. Here run: {others}"
            )

        return scan

    def scan(batched: tuple[Array, ...], weights: tuple[Array | None, ...]) -> Array:
        u, delta, B, C = batched
        A, *others = weights
        arrays = (u, delta, A, B, C, *others)
        if names:
            return by(names)(*arrays)
        by_platform = {name: by(names) for name, names in DEFAULTS.items()}
        return jax.lax.platform_dependent(*arrays, **by_platform)

    u, delta, A, B, C, *others = arrays
    return per_device(scan, (u, delta, B, C), (A, *others))


def _check_shapes(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    delta_bias: Array | None,
    delta_proj: Array | None,
) -> None:
    if u.ndim != 4 or u.shape[1] == 0:
        raise ValueError(f"u must be (B, L, K, C) with L > 0, got {u.shape}")
    batch, length, routes, channels = u.shape
    states = A.shape[-1]
    rank = channels if delta_proj is None else delta_proj.shape[-1]
    expected = {
        "delta": (delta, (batch, length, routes, rank)),
        "A": (A, (routes, channels, states)),
        "B": (B, (batch, length, routes, states)),
        "C": (C, (batch, length, routes, states)),
        "D": (D, (routes, channels)),
        "delta_bias": (delta_bias, (routes, channels)),
        "delta_proj": (delta_proj, (routes, channels, rank)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit u {u.shape}, got {array.shape}")
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be a float array, got {array.dtype}")

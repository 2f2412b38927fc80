"""The selective scan for TPU: a Mosaic kernel for all routes of a map, and one for its gradient.

A map stays in VMEM while its four routes go over it, each by a list of positions. So the input,
what it projects to and the routes' sum cross HBM once each; delta is lifted to the channels inside.
The gradient keeps the inputs only. A sequence is a map with one route; one too long for VMEM goes
through it in blocks, and its gradient keeps the state entering each block.

Arrays: u (B, L, C); z (B, L, K E), of each position and route delta (R), B (N) and C (N), and
maybe zeros behind them; weights (K, N + 2, C), which are A, D and the bias; lift (K, R, C), from
delta to the channels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.sharding import AxisType, PartitionSpec

from vmamba_jax.ops import _pallas_tpu_kernels as kernels
from vmamba_jax.ops import _reference
from vmamba_jax.ops._alike import alike
from vmamba_jax.ops._pallas_tpu_blocks import LANES, Plan, Scan, Sizes, plan
from vmamba_jax.ops.residuals import keep
from vmamba_jax.typing import Array, FeatureMap, Float

BATCH_AXES = ("replica", "data", "fsdp", "batch")
"""Names of a mesh's axes that split the batch; of a mesh that has none of them, every axis does."""


def selective_scan(
    u: Float[Array, "B L K C"],
    delta: Float[Array, "B L K C_or_R"],
    A: Float[Array, "K C N"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K C"] | None,
    delta_bias: Float[Array, "K C"] | None,
    delta_proj: Float[Array, "K C R"] | None,
    delta_softplus: bool,
    reverse: bool,
    interpret: bool = False,
) -> Float[Array, "B L K C"]:
    """See `vmamba_jax.ops.selective_scan`; `interpret` runs the kernels without a TPU, slowly.

    Under `jax.set_mesh`, each device scans its part of the batch: see `BATCH_AXES`.

    Raises:
        NotImplementedError: for float64, which a TPU has not; for sizes that are symbols, as a
            kernel is built for one size; and for sizes of which no block fits VMEM.
    """
    routes, channels = u.shape[2:]
    scan = Scan("reverse" if reverse else "ahead", 1, u.shape[1], delta_softplus, interpret)
    if delta_proj is None:  # what is lifted already is lifted by the identity
        same = jnp.zeros_like(A, jnp.float32, shape=(routes, channels, channels))
        delta_proj = same + jnp.eye(channels, dtype=jnp.float32)[None]
    weights = _weights(A, D, delta_bias)
    dtype = reduce(jnp.promote_types, (a.dtype for a in (delta, B, C)))
    z = jnp.concatenate([a.astype(dtype) for a in (delta, B, C)], axis=-1)
    scanned = (
        _scan_routes(u[:, :, k], z[:, :, k], weights[k : k + 1], delta_proj[k : k + 1], scan)
        for k in range(routes)
    )
    return jnp.stack([y.astype(u.dtype) for y in scanned], axis=2)


def selective_scan_2d(
    x: FeatureMap,
    projected: Float[Array, "B H W KE"],
    A: Float[Array, "K C N"],
    D: Float[Array, "K C"],
    delta_bias: Float[Array, "K C"],
    delta_proj: Float[Array, "K C R"],
    order: str,
    interpret: bool = False,
) -> FeatureMap:
    """All routes over a map, added up, in float32: see `vmamba_jax.ops.selective_scan_2d`.

    Args:
        x: feature map.
        projected: delta (R), B (N) and C (N) of each position, for each route, side by side: what
            the rows that `projection` gives make of the map.
        A: decay rates, negative.
        D: skip weights.
        delta_bias: bias of the step size.
        delta_proj: lifts delta from R to C channels.
        order: see `vmamba_jax.ops.scan_order`.
        interpret: run without a TPU, slowly.

    Raises:
        NotImplementedError: for float64, sizes that are symbols, and maps that VMEM does not hold
            whole.
    """
    batch, height, width, channels = x.shape
    scan = Scan(order, height, width, True, interpret)
    u = x.reshape(batch, height * width, channels)
    z = projected.reshape(batch, height * width, -1)
    return _scan_routes(u, z, _weights(A, D, delta_bias), delta_proj, scan).reshape(x.shape)


def projection(x_proj: Float[Array, "K E C"]) -> Float[Array, "KE C"]:
    """The rows that project a position for all routes.

    Where those of one position fill more than half a register's lanes, rows of zeros fill the rest,
    so that the product lies in memory as the kernel reads it.
    """
    rows = x_proj.reshape(-1, x_proj.shape[-1])
    more = -rows.shape[0] % LANES if 2 * rows.shape[0] > LANES else 0
    return jnp.pad(rows, ((0, more), (0, 0)))


def _weights(
    A: Float[Array, "K C N"], D: Float[Array, "K C"] | None, bias: Float[Array, "K C"] | None
) -> Float[Array, "K N2 C"]:
    rows = [A.mT, *(None if w is None else w[:, None] for w in (D, bias))]
    zeros = jnp.zeros_like(A.mT[:, :1], jnp.float32)
    return jnp.concatenate([zeros if w is None else w.astype(jnp.float32) for w in rows], axis=1)


def _scan_routes(
    u: Float[Array, "B L C"],
    z: Float[Array, "B L KE"],
    weights: Float[Array, "K N2 C"],
    delta_proj: Float[Array, "K C R"],
    scan: Scan,
) -> Float[Array, "B L C"]:
    if u.dtype == jnp.float64:
        raise NotImplementedError("a TPU has no float64")
    if any(map(is_symbolic_dim, (*u.shape, *z.shape))):
        raise NotImplementedError(f"a kernel is built for one size, and u is {u.shape}")
    if u.shape[0] == 0:
        return u.astype(jnp.float32)
    arrays = (u, z, weights, delta_proj.mT.astype(z.dtype))
    try:
        _plan(arrays)
    except NotImplementedError:  # there are chips whose blocks of float32 have fewer rows
        arrays = (
            *(a.astype(jnp.float32) for a in (u, z)),
            weights,
            delta_proj.mT.astype(jnp.float32),
        )
        _plan(arrays)
    return _scan(*alike(arrays), scan)


def _plan(arrays: tuple[Array, ...]) -> Plan:
    """For what one device scans."""
    u, z, *_ = arrays
    sizes = Sizes.of(*arrays)
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in _batch_axes(sizes.batch))
    sizes = sizes._replace(batch=sizes.batch // devices)
    return plan(sizes, u.dtype.itemsize, z.dtype.itemsize)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scan(u, z, weights, lift, scan: Scan) -> Float[Array, "B L C"]:
    return _forward_kernel((u, z, weights, lift), scan, states=False)[0]


def _forward(u, z, weights, lift, scan: Scan):
    arguments = (u, z, weights, lift)
    y, *entering = _with_states(arguments, scan)
    return y, (arguments, tuple(map(keep, entering)))


def _backward(scan: Scan, residuals, dy):
    return _gradient(*residuals, dy, scan)


_scan.defvjp(_forward, _backward)


# A kernel has no derivative. Those of the two that make a gradient are the reference's: second
# derivatives are right, if dear; and on every platform JAX asks for them, whichever runs.
@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _with_states(arguments, scan: Scan):
    return _forward_kernel(arguments, scan, states=True)


@_with_states.defjvp
def _with_states_jvp(scan: Scan, primals, tangents):
    _, dy = jax.jvp(partial(_by_reference, scan=scan), primals, tangents)
    y, *entering = _with_states(*primals, scan)
    # A gradient depends on the states by way of the arguments, and says so itself.
    return (y, *entering), (dy, *map(jnp.zeros_like, entering))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _gradient(arguments, entering, dy, scan: Scan):
    run = partial(kernels.backward, plan=_plan(arguments), scan=scan)
    by_batch = (0, 0, None, None, 0, *[2] * len(entering))
    run = _over_batch(run, dy.shape[0], by_batch, (0, 0, 0, 0))
    du, dz, *parts = run(*arguments, dy, *entering)
    dweights, dlift = (d.sum(axis=0) for d in parts)
    return du, dz, dweights, dlift.astype(arguments[3].dtype)


@_gradient.defjvp
def _gradient_jvp(scan: Scan, primals, tangents):
    def gradient(arguments, dy):
        return jax.vjp(partial(_by_reference, scan=scan), arguments)[1](dy)[0]

    (arguments, entering, dy), (darguments, _, ddy) = primals, tangents
    _, change = jax.jvp(gradient, (arguments, dy), (darguments, ddy))
    return _gradient(arguments, entering, dy, scan), change


def _by_reference(arguments, scan: Scan) -> Float[Array, "B L C"]:
    u, z, weights, lift = arguments
    states = weights.shape[1] - 2
    total = jnp.zeros_like(u, jnp.float32)
    for k, at in enumerate(scan.positions(u.shape[1])):
        first, (_, rank, _) = k * (lift.shape[1] + 2 * states), lift.shape
        of_route = z[:, at, None, first : first + rank + 2 * states]
        delta, b, c = jnp.split(of_route, (rank, rank + states), -1)
        a, skip, bias = jnp.split(weights[k : k + 1], (states, states + 1), 1)
        y = _reference.selective_scan(
            u[:, at, None].astype(jnp.float32), delta, a.mT, b, c, skip[:, 0], bias[:, 0],
            lift[k : k + 1].mT.astype(jnp.float32), scan.delta_softplus, False,
        )  # fmt: skip
        total += y[:, np.argsort(at), 0]
    return total


def _forward_kernel(arguments, scan: Scan, states: bool) -> tuple[Array, ...]:
    u, *_ = arguments
    fitting = _plan(arguments)
    states = states and fitting.block < u.shape[1]
    run = partial(kernels.forward, plan=fitting, scan=scan, states=states)
    return _over_batch(run, u.shape[0], (0, 0, None, None), (0, *[2] * states))(*arguments)


def _over_batch(
    function: Callable[..., Any],
    batch: int,
    arguments: Sequence[int | None],
    results: Sequence[int],
) -> Callable[..., Any]:
    """Splits the batch over the mesh in context: XLA can't look into a kernel to do it.

    Args:
        function: of arrays, to a tuple of arrays.
        batch: size of the batch.
        arguments: which axis of each argument is the batch.
        results: likewise.
    """
    if AxisType.Auto not in jax.sharding.get_abstract_mesh().axis_types:
        return function
    axes = _batch_axes(batch)

    def specs(of: Sequence[int | None]) -> tuple[PartitionSpec, ...]:
        return tuple(PartitionSpec(*[None] * (a or 0), axes if a is not None else None) for a in of)

    return jax.shard_map(
        function, in_specs=specs(arguments), out_specs=specs(results), check_vma=False
    )


def _batch_axes(batch: int) -> tuple[str, ...]:
    """The Auto axes of the mesh in context that split a batch: none, if they do not divide it.

    So a batch such as the one image of an initialisation is scanned whole by each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = tuple(name for name, kind in kinds if kind == AxisType.Auto)
    axes = tuple(name for name in auto if name in BATCH_AXES) or auto
    return axes if batch % math.prod(mesh.shape[name] for name in axes) == 0 else ()

"""How a map is cut into the blocks that the TPU's kernels work on, and what VMEM holds of it.

A register holds 8 x 128 numbers: rows are batch elements, lanes are channels. The kernels' grid is
(batch, positions, channels, routes). A block of the input moves with the first three, so it is
fetched once for all routes; what the routes add up to stays in VMEM until the block moves on.
"""

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vmamba_jax.ops._parts import chunk_length
from vmamba_jax.ops.scan_order import ROUTES, positions
from vmamba_jax.typing import Array

LANES = 128  # of a register
SMALLEST_VMEM = 2**24
"""Bytes, of a TPU v4's core: what a chip that isn't known when a program is traced has at least."""


class Scan(NamedTuple):
    """What is known of a scan when it is traced (hashable)."""

    order: str  # of a map's routes, or "ahead" or "reverse" along a sequence
    height: int
    width: int
    delta_softplus: bool
    interpret: bool

    def positions(self, block: int) -> np.ndarray:
        """Where each route of a block goes, (K, L) int32."""
        if self.order in ROUTES:
            return positions(self.order, self.height, self.width)
        ahead = np.arange(block, dtype=np.int32)[None]
        return ahead[:, ::-1] if self.order == "reverse" else ahead


class Sizes(NamedTuple):
    """Of one scan: batch, positions, channels, routes, rank of delta, states."""

    batch: int
    length: int
    channels: int
    routes: int
    rank: int
    states: int

    @classmethod
    def of(cls, u: Array, z: Array, weights: Array, lift: Array) -> "Sizes":
        """Of a scan's arrays: see `_pallas_tpu`."""
        batch, length, channels = u.shape
        routes, rank, _ = lift.shape
        return cls(batch, length, channels, routes, rank, weights.shape[1] - 2)

    @property
    def projected(self) -> int:
        """Numbers that a position projects to for one route."""
        return self.rank + 2 * self.states

    @property
    def together(self) -> int:
        """Positions whose numbers, of all routes, lie side by side in a register: a power of 2."""
        return 2 ** max(0, (LANES // (self.routes * self.projected)).bit_length() - 1)

    @property
    def packed(self) -> int:
        """Lanes that they take."""
        return _whole(self.routes * self.projected, LANES)


class Plan(NamedTuple):
    """The sizes of the blocks."""

    rows: int  # batch elements
    lanes: int  # channels
    block: int  # positions
    chunk: int  # steps whose step sizes, and in the gradient states, exist at once
    buffers: int  # of each block: 2 fetch the next one while this one is worked on
    vmem: int  # bytes that the kernel may use


def plan(sizes: Sizes, u_bytes: int, z_bytes: int) -> Plan:
    """Blocks that fit the chip's VMEM with the gradient's kernel.

    Several routes need the whole map there, as each of them starts at another end. One route can
    go through it block by block.

    Raises:
        NotImplementedError: if none do.
    """
    vmem, generation = _chip()
    # From the seventh generation on, blocks of 16 bits have 16 rows.
    tall = generation >= 7 and min(u_bytes, z_bytes) < 4
    rows = [r for r in (16, 8) if sizes.batch % r == 0 or r == (16 if tall else 8)]
    lanes = [c for c in (512, 384, 256, 128) if sizes.channels % c == 0] or [sizes.channels]
    parts, buffers = (1,), (2, 1)
    if sizes.routes == 1:
        parts, buffers = [2**n for n in range(sizes.length.bit_length())], (2,)
    rows = rows[:1] if tall else rows
    for part, buffer, lane, row, most in product(parts, buffers, lanes, rows, (64, 16, 8)):
        block = -(-sizes.length // part)
        chunk = chunk_length(block, min(most, max(8, 2**19 // (row * lane))))
        if part > 1:
            chunk = _whole(chunk, sizes.together)
            block = _whole(block, chunk)
        candidate = Plan(row, lane, block, chunk, buffer, vmem)
        if _bytes(candidate, sizes, u_bytes, z_bytes) <= vmem * 15 // 16:
            return candidate
    raise NotImplementedError(
        f"{sizes.length} positions of {sizes.channels} channels, {sizes.states} states each, on "
        f"{sizes.routes} routes do not fit the {vmem >> 20} MiB of a TPU's VMEM"
    )


def _chip() -> tuple[int, int]:
    """Bytes of VMEM, and the generation, of the TPU of the mesh in context or the default one."""
    try:
        chip = pltpu.get_tpu_info()
    except ValueError:  # not a TPU
        return SMALLEST_VMEM, 0
    return chip.vmem_capacity_bytes, chip.generation


def _bytes(plan: Plan, sizes: Sizes, u_bytes: int, z_bytes: int) -> int:
    """Of VMEM that the gradient's kernel takes."""
    lanes, states = _whole(plan.lanes, LANES), sizes.states
    wide = plan.block * plan.rows * lanes
    narrow = -(-plan.block // sizes.together) * plan.rows * sizes.packed
    weights = (_whole(states + 2, 8) + _whole(sizes.rank, 8)) * lanes
    parts = -(-sizes.channels // plan.lanes)
    dz_bytes = z_bytes if parts == 1 else 4
    blocks = wide * (2 * u_bytes + 4) + narrow * (z_bytes + dz_bytes)
    blocks += 4 * weights * (1 + sizes.routes * parts)
    chunks = -(-plan.block // plan.chunk)
    # Of the products over a chunk, factors and results are there too while they are computed.
    per_step = lanes * (states + 2 + 4) + 4 * _whole(sizes.projected, LANES)
    scratch = plan.chunk * per_step + lanes * (states * (chunks + parts) + states + 2)
    total = 4 * wide if _summed(sizes, u_bytes) else 0
    return plan.buffers * blocks + 4 * plan.rows * scratch + total


def _summed(sizes: Sizes, u_bytes: int) -> bool:
    """Whether the gradient of u is added up beside its result, which has not float32's bits."""
    return sizes.routes > 1 and u_bytes < 4


def _whole(number: int, unit: int) -> int:
    return -(-number // unit) * unit


class Blocks:
    """Arrays, block shapes and index maps of a kernel's call."""

    def __init__(self, sizes: Sizes, plan: Plan, scan: Scan, like: Array, backwards: bool):
        self.sizes, self.plan = sizes, plan
        self.batch = _whole(sizes.batch, plan.rows)
        self.length = _whole(sizes.length, plan.block)
        self.last_first = scan.order == "reverse"
        self.width = _whole(sizes.projected, LANES)
        self.rows_of_z = -(-plan.block // sizes.together)
        # Inside `jax.shard_map` a kernel must say that results differ between devices as `u` does.
        self._varying = jax.typeof(like).manual_axis_type
        blocks, parts = self.length // plan.block, sizes.channels // plan.lanes
        self.grid = (self.batch // plan.rows, blocks, parts, sizes.routes)
        self.positions = jnp.asarray(scan.positions(plan.block)[:, None])

        def now(z: Any) -> Any:
            return blocks - 1 - z if backwards != self.last_first else z

        spec = partial(pl.BlockSpec, pipeline_mode=pl.Buffered(plan.buffers))
        rows, lanes, weights = plan.rows, plan.lanes, (sizes.states + 2, plan.lanes)
        self.at_spec = pl.BlockSpec(
            (None, 1, plan.block), lambda b, z, c, k: (k, 0, 0), memory_space=pltpu.SMEM
        )
        self.wide_spec = spec((plan.block, rows, lanes), lambda b, z, c, k: (now(z), b, c))
        self.narrow_spec = spec(
            (self.rows_of_z, rows, sizes.packed), lambda b, z, c, k: (now(z), b, 0)
        )
        self.weights_spec = pl.BlockSpec((None, *weights), lambda b, z, c, k: (k, 0, c))
        self.lift_spec = pl.BlockSpec((None, sizes.rank, lanes), lambda b, z, c, k: (k, 0, c))
        self.entering_spec = pl.BlockSpec(
            (None, sizes.states, rows, lanes), lambda b, z, c, k: (now(z), 0, b, c)
        )

        def sum_spec(*shape: int) -> pl.BlockSpec:
            whole = (None, sizes.routes, parts, *shape)
            return pl.BlockSpec(whole, lambda b, z, c, k: (b, 0, 0, 0, 0))

        self.sum_specs = [sum_spec(*weights), sum_spec(sizes.rank, lanes)]
        over = (self.grid[0], sizes.routes, parts)
        self.sums = [self._array(*over, *weights), self._array(*over, sizes.rank, lanes)]
        self.state = pltpu.VMEM((parts, sizes.states, rows, lanes), jnp.float32)

    def of_chunk(self, *shape: int) -> Any:
        """Scratch for each step of a chunk."""
        return pltpu.VMEM((self.plan.chunk, *shape[:-1], self.plan.rows, shape[-1]), jnp.float32)

    def wide(self, dtype: Any) -> jax.ShapeDtypeStruct:
        return self._array(self.length, self.batch, self.sizes.channels, dtype=dtype)

    def narrow(self, dtype: Any) -> jax.ShapeDtypeStruct:
        length = self.grid[1] * self.rows_of_z
        return self._array(length, self.batch, self.sizes.packed, dtype=dtype)

    def dz_dtype(self, z: Array) -> Any:
        """Sums over several parts of the channels are float32."""
        return z.dtype if self.grid[2] == 1 else jnp.float32

    def total(self, dtype: Any) -> Any:
        """Scratch for a float32 sum over the routes where the result is not float32."""
        positions = self.plan.block if _summed(self.sizes, jnp.dtype(dtype).itemsize) else 1
        return pltpu.VMEM((positions, self.plan.rows, self.plan.lanes), jnp.float32)

    def entering(self) -> jax.ShapeDtypeStruct:
        return self._array(self.grid[1], self.sizes.states, self.batch, self.sizes.channels)

    def _array(self, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self._varying)

    def lay(self, a: Array) -> Array:
        """``(B, L, X) -> (L, B, X)``, filled up with zeros."""
        # What a sequence is filled up with is scanned last.
        after = (0, self.length - a.shape[1])
        after = after[::-1] if self.last_first else after
        return jnp.pad(a, ((0, self.batch - a.shape[0]), after, (0, 0))).swapaxes(0, 1)

    def unlay(self, a: Array) -> Array:
        """Undoes `lay`."""
        a = a[-self.sizes.length :] if self.last_first else a[: self.sizes.length]
        return a.swapaxes(0, 1)[: self.sizes.batch]

    def pack(self, z: Array) -> Array:
        """``(B, L, K E) -> (L / together, B, packed)``, filled up with zeros."""
        together, packed = self.sizes.together, self.sizes.packed
        z = self.lay(z)
        more, slot = self.grid[1] * self.rows_of_z * together - z.shape[0], packed // together
        z = jnp.pad(z, ((0, more), (0, 0), (0, slot - z.shape[2])))
        z = z.reshape(-1, together, self.batch, slot).swapaxes(1, 2)
        return z.reshape(-1, self.batch, packed)

    def unpack(self, z: Array, numbers: int) -> Array:
        """Undoes `pack`."""
        z = z.reshape(z.shape[0], self.batch, self.sizes.together, -1).swapaxes(1, 2)
        return self.unlay(z.reshape(-1, self.batch, z.shape[3])[: self.length, :, :numbers])

"""Into what parts work is split so that each fits a cache.

A program exported for any batch or any image has sizes that are symbols (`jax.export`): their
divisors are unknown.
"""

from jax.export import is_symbolic_dim

from vmamba_jax.typing import Size

UNKNOWN = 64
"""Steps of a chunk of a sequence of unknown length, of which up to one chunk is filled up."""


def largest_divisor(number: Size, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most`, and 1 at least; of a symbol 1."""
    if is_symbolic_dim(number):
        return 1
    return next((d for d in range(min(number, at_most), 1, -1) if number % d == 0), 1)


def chunk_length(length: Size, longest: int) -> int:
    """A chunk of at most `longest` steps: it divides the length if it needn't be much shorter."""
    if is_symbolic_dim(length):
        return max(1, min(UNKNOWN, longest))
    longest = max(1, min(length, longest))
    divisor = largest_divisor(length, longest)
    return divisor if divisor > longest // 2 else -(-length // -(-length // longest))

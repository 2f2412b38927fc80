"""Into what parts work is split so that each fits a cache."""


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is at most `at_most`, and 1 at least."""
    return next((d for d in range(min(number, at_most), 1, -1) if number % d == 0), 1)


def chunk_length(length: int, longest: int) -> int:
    """A chunk of at most `longest` steps: it divides the length if it needn't be much shorter."""
    longest = max(1, min(length, longest))
    divisor = largest_divisor(length, longest)
    return divisor if divisor > longest // 2 else -(-length // -(-length // longest))

"""Parts of an error line: what a size must divide, and nearby sizes that fit."""

from collections.abc import Iterator


def divisors_near(value: int, of: int) -> str:
    """The divisors of ``of`` around ``value``, at most 4 times it. Example: ``divisors_near(6, of=64)`` is ``"4 or 8"``."""
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    below = [d for d in divisors if d < value][-1:]
    above = [d for d in divisors if value < d <= 4 * value][:1]
    return " or ".join(str(d) for d in below + above)


def multiples_near(value: int, of: int) -> str:
    """The multiples of ``of`` around ``value``. Example: ``multiples_near(6, of=4)`` is ``"4 or 8"``."""
    below = value // of * of
    return " or ".join(str(m) for m in (below, below + of) if m > 0)


def must_divide(name: str, value: int, of_name: str, of: int) -> Iterator[str]:
    """Problem when setting ``name`` does not divide ``of``."""
    if of % value != 0:
        yield f"{name}={value} must divide {of_name}={of}; try {divisors_near(value, of)}"

"""A blend of sources as a setting's value: one source, or weight, source, weight, source ..."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from megatron_ring.errors import ConfigError


def parse_blend(name: str, words: Sequence[str], what: str) -> list[tuple[Fraction, str]]:
    """(weight, source) of each source, in order; weights are read as decimal fractions, exactly.

    Args:
        name: the setting.
        words: its value.
        what: what a source is called in the error, such as prefix.

    Raises:
        ConfigError: there are no words, or they are not weight, source, weight, source with positive weights.

    Example: ``parse_blend("data_path", ("0.3", "a", "0.7", "b"), "prefix")`` is ``[(3/10, "a"), (7/10, "b")]``;
    ``("a",)`` gives ``[(1, "a")]``.
    """
    if not words:
        raise ConfigError(f"{name} is empty; name a {what}, or weight {what} weight {what}")
    for problem in blend_problems(name, words, what):
        raise ConfigError(problem)
    if len(words) == 1:
        return [(Fraction(1), words[0])]
    return [(Fraction(weight), source) for weight, source in zip(words[::2], words[1::2], strict=True)]


def blend_problems(name: str, words: Sequence[str], what: str) -> Iterator[str]:
    """Why ``words`` are no blend, in one line each; nothing if there are no words."""
    form = f"write weight {what} weight {what}"
    if len(words) < 2:
        return
    if len(words) % 2 != 0:
        yield f"{name} has {len(words)} words, but a blend is pairs; {form}"
    for weight in words[::2]:
        if not _is_weight(weight):
            yield f"{name} weight {weight} must be a positive number; {form}"


def _is_weight(word: str) -> bool:
    # float first: Fraction("1e999999999") is an integer of as many digits
    try:
        return 0 < float(word) < math.inf and Fraction(word) > 0
    except ValueError:
        return False

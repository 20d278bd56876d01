"""Correspondences: boxes of Megatron tensors and the boxes of Hugging Face tensors that hold the same numbers.

A *key* names a Megatron tensor, a *name* a Hugging Face tensor. A map is a list of correspondences, each of which
says that a box of a key equals a box of a name, element by element. Where the key has more dimensions (experts are
stacked), the box is 1 thick in the leading ones. Since a correspondence has no direction, neither has a map: both
conversions, any shard of either side and the comparison are intersections of boxes. Rows of a key that none covers
are vocabulary padding, and zero.

Invariants (one test each): what corresponds to a name covers it exactly once; what corresponds to a key covers it
exactly once, except padding rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a tensor. Example: rows 4 to 7 of a [10, 3] tensor are ``Box((4, 0), (4, 3))``."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Box:
        shape = tuple(shape)
        return cls((0,) * len(shape), shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """What both hold; ``None`` when that is nothing."""
        start = tuple(map(max, self.offset, other.offset))
        stop = (
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        shape = tuple(e - s for s, e in zip(start, stop, strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def relative_to(self, origin: Box) -> Box:
        """This box as seen from ``origin``'s corner."""
        return Box(tuple(a - b for a, b in zip(self.offset, origin.offset, strict=True)), self.shape)

    def is_run_of(self, whole: Box) -> bool:
        """True if this box is one uninterrupted run of ``whole``'s elements in row-major order."""
        pairs = list(zip(self.shape, whole.shape, strict=True))
        while pairs and pairs[0][0] == 1:
            pairs.pop(0)
        return all(n == m for n, m in pairs[1:])

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def rows(self, max_elements: int) -> Iterator[Box]:
        """This box cut along its first dimension into parts of at most ``max_elements`` (at least one row
        each).
        """
        if not self.shape:
            yield self
            return
        step = max(1, max_elements // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            count = min(step, self.shape[0] - start)
            yield Box((self.offset[0] + start, *self.offset[1:]), (count, *self.shape[1:]))


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """``target[target_box] = source[source_box]``; the boxes differ in leading dimensions of size 1 at
    most.
    """

    target: str
    target_box: Box
    source: str
    source_box: Box

    def within(self, box: Box) -> TensorCopy | None:
        """The part of this copy that lands in ``box`` of the target."""
        part = self.target_box.intersect(box)
        if part is None:
            return None
        inner = part.relative_to(self.target_box)
        rank = len(self.source_box.shape)
        pad = (0,) * max(0, rank - len(inner.offset))
        ones = (1,) * len(pad)
        offset = (*pad, *inner.offset)[-rank:] if rank else ()
        shape = (*ones, *inner.shape)[-rank:] if rank else ()
        start = tuple(a + b for a, b in zip(self.source_box.offset, offset, strict=True))
        return TensorCopy(self.target, part, self.source, Box(start, shape))


@dataclass(frozen=True, slots=True)
class Correspondence:
    """A box of a key and the box of a name with the same numbers.

    Example: ``Correspondence("output_layer.weight", Box((0, 0), (250, 64)), "lm_head.weight",
    Box((0, 0), (250, 64)))``.
    """

    key: str
    key_box: Box
    name: str
    name_box: Box


@dataclass(frozen=True)
class TensorMap:
    """A model's correspondences and the shapes of its tensors on both sides."""

    pairs: tuple[Correspondence, ...]
    keys: dict[str, Shape]
    names: dict[str, Shape]

    @cached_property
    def into_keys(self) -> dict[str, list[TensorCopy]]:
        """Per key, where its numbers come from."""
        copies = defaultdict(list)
        for p in self.pairs:
            copies[p.key].append(TensorCopy(p.key, p.key_box, p.name, p.name_box))
        return dict(copies)

    @cached_property
    def into_names(self) -> dict[str, list[TensorCopy]]:
        """Per name, where its numbers come from."""
        copies = defaultdict(list)
        for p in self.pairs:
            copies[p.name].append(TensorCopy(p.name, p.name_box, p.key, p.key_box))
        return dict(copies)


class MapBuilder:
    """The operations that maps are written with; each states a correspondence once, for both directions."""

    def __init__(self) -> None:
        self._pairs: list[Correspondence] = []
        self._keys: dict[str, Shape] = {}
        self._names: dict[str, Shape] = {}

    def build(self) -> TensorMap:
        return TensorMap(tuple(self._pairs), self._keys, self._names)

    def _pair(self, key: str, key_box: Box, name: str, name_box: Box) -> None:
        self._pairs.append(Correspondence(key, key_box, name, name_box))

    def rename(self, key: str, name: str, *shape: int) -> None:
        """The same tensor under another name."""
        self._keys[key] = self._names[name] = shape
        self._pair(key, Box.whole(shape), name, Box.whole(shape))

    def pad_rows(self, key: str, name: str, num_padded: int, *shape: int) -> None:
        """The key has rows after the name's last one, up to ``num_padded``; they are zero and never
        exported.
        """
        self._keys[key], self._names[name] = (num_padded, *shape[1:]), shape
        self._pair(key, Box.whole(shape), name, Box.whole(shape))

    def concatenate(self, key: str, names: dict[str, int], *columns: int) -> None:
        """The key's rows are the names' rows one after the other. ``names`` gives each name's number of
        rows.
        """
        self._keys[key] = (sum(names.values()), *columns)
        start = 0
        for name, rows in names.items():
            box = Box((start, *(0 for _ in columns)), (rows, *columns))
            self._names[name] = box.shape
            self._pair(key, box, name, Box.whole(box.shape))
            start += rows

    def stack(self, key: str, names: dict[tuple[int, ...], str], lead: Shape, *shape: int) -> None:
        """The key's leading dimensions ``lead`` number tensors: ``names[index]`` is ``key[index]``."""
        self._keys[key] = (*lead, *shape)
        for index, name in names.items():
            self._names[name] = shape
            offset = (*index, *(0 for _ in shape))
            self._pair(key, Box(offset, (*(1 for _ in lead), *shape)), name, Box.whole(shape))

    def interleave_qkv(
        self,
        key: str,
        names: tuple[str, ...],
        heads: int,
        groups: int,
        channels: int,
        *columns: int,
    ) -> None:
        """The key holds, per key/value group, its query heads, then its key, then its value head.

        ``names`` are three tensors, or one with all queries, all keys, all values in this order.
        """
        per_group = heads // groups
        counts = (per_group * channels, channels, channels)
        starts = [0, 0, 0]
        if len(names) == 1:
            starts = [0, heads * channels, (heads + groups) * channels]
            self._names[names[0]] = ((heads + 2 * groups) * channels, *columns)
            names = names * 3
        else:
            for name, rows in zip(
                names, (heads * channels, groups * channels, groups * channels), strict=True
            ):
                self._names[name] = (rows, *columns)
        self._keys[key] = ((heads + 2 * groups) * channels, *columns)
        zeros = tuple(0 for _ in columns)
        row = 0
        for group in range(groups):
            for name, start, count in zip(names, starts, counts, strict=True):
                shape = (count, *columns)
                self._pair(key, Box((row, *zeros), shape), name, Box((start + group * count, *zeros), shape))
                row += count

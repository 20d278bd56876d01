"""Time our work beside its peers on one device, as a share of that device's measured peak and of its maker's
figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tools.gpu.peaks import Peak, peak_of
from tools.gpu.results import Results

BF16 = torch.bfloat16
WARM_UP_MS, BUDGET_MS = 25, 100
Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Example: ``PAPER`` is a microbatch of Ring-lite."""

    T: int
    D: int
    F: int
    E: int
    K: int
    V: int
    S: int
    context: int
    roof: int
    copied: int


PAPER = Sizes(T=8192, D=2048, F=1408, E=64, K=6, V=126_464, S=256, context=1024, roof=8192, copied=1 << 30)
TINY = Sizes(T=64, D=64, F=32, E=4, K=2, V=512, S=4, context=32, roof=64, copied=1 << 10)


def tensors(found: Any) -> list[Tensor]:
    """The tensors of a result, to be compared."""
    return [found] if isinstance(found, Tensor) else [each for each in found if each is not None]


@dataclass(frozen=True)
class Side:
    """One implementation of the work that is compared.

    ``make`` prepares and returns the function that is timed; it may fail. ``seen`` turns its first result into
    the tensors that are compared with ours; None: they cannot be compared.
    """

    who: str
    make: Callable[[], Work]
    seen: Callable[[Any], Sequence[Tensor]] | None = tensors


def side(who: str, work: Work, seen: Callable[[Any], Sequence[Tensor]] | None = tensors) -> Side:
    return Side(who, lambda: work, seen)


def peer(package: str, who: str, make: Callable[[], Work], seen: Any = tensors) -> list[Side]:
    """A side that needs ``package``; none if it is not installed."""
    return [Side(who, make, seen)] if find_spec(package) is not None else []


class Differs(Exception):
    """A peer's result differs from ours, so its time does not count."""


class Bench:
    """Times work on one device and writes a row for each; ``flops`` or ``bytes_moved`` is the amount of
    work."""

    def __init__(self, device: str, sizes: Sizes, results: Results):
        self.device, self.sizes, self.results = device, sizes, results
        self.roof: Peak | None = None
        self.peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
        self._named: set[str] = set()

    def new(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16, leaf: bool = False) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype).requires_grad_(leaf)

    def milliseconds(self, work: Work, budget: float) -> float:
        """Median of the runs that fit into ``budget`` milliseconds, with a cold L2 cache; one run on a CPU."""
        if self.device == "cuda":
            from triton.testing import do_bench

            return do_bench(work, warmup=WARM_UP_MS, rep=budget, return_mode="median")
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e3

    def compare(
        self,
        what: str,
        sides: Iterable[Side],
        *,
        flops: float = 0,
        bytes_moved: float = 0,
        tolerance: float = 3e-2,
        budget: float = BUDGET_MS,
    ) -> None:
        """A row for each side, ours first. If a side fails or gives another result, its row has the error.

        ``flops`` and ``bytes_moved`` are the least that the work needs. A row's rate is of the first one given;
        its share is the time of the slower of the two at the device's peak, divided by the measured time.
        """
        assert what not in self._named, f"{what} is timed already"
        self._named.add(what)
        expected: list[Tensor] | None = None
        for each in sides:
            try:
                taken, error, found = self._timed(each, expected, tolerance, budget)
                expected = found or expected
                self._row(what, each.who, taken, flops, bytes_moved, error)
            except Exception as failure:
                self._failed(what, each.who, failure)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _timed(
        self, each: Side, expected: list[Tensor] | None, tolerance: float, budget: float
    ) -> tuple[float, float | None, list[Tensor] | None]:
        """(milliseconds, error against ours, our result if this is ours); the first run is the one that is
        checked."""
        work = each.make()
        found = None if each.seen is None else list(each.seen(work()))
        error = None
        if expected is not None and found is not None:
            error = relative_error(found, expected)
            if not error <= tolerance:
                raise Differs(f"differs from ours by {error:.1e} of its norm, at most {tolerance:.0e}")
        if each.who != "ours":
            found = None
        return self.milliseconds(work, budget), error, found

    def _row(
        self, what: str, who: str, taken: float, flops: float, bytes_moved: float, error: float | None
    ) -> None:
        unit, count, scale = ("TFLOP/s", flops, 1e12) if flops else ("GB/s", bytes_moved, 1e9)
        values = {
            "what": what,
            "who": who,
            "ms": round(taken, 4),
            unit: round(count / taken * 1e3 / scale, 1),
        }
        for name, top in (("share", self.roof), ("peak_share", self.peak)):
            if top is not None:
                least = max(flops / top.flops, bytes_moved / top.bytes) * 1e3
                values[name] = round(least / taken, 3)
        if error is not None:
            values["error"] = float(f"{error:.2g}")
        self.results.row(**values)

    def _failed(self, what: str, who: str, failure: Exception) -> None:
        said = " ".join(str(failure).split())
        line = said if isinstance(failure, Differs) else f"{type(failure).__name__}: {said}"
        if who.startswith("ours"):
            self.results.wrong(f"{what}, {who}: {line[:300]}")
        else:
            self.results.row(what=what, who=who, failed=line[:160])

    def measure_roof(self) -> None:
        """One large cuBLAS product and one large copy: this card's measured peaks."""
        n = self.sizes.roof
        a, b = self.new(n, n), self.new(n, n)
        x = torch.zeros(self.sizes.copied, dtype=BF16, device=self.device)
        y = torch.empty_like(x)
        product = self.milliseconds(lambda: a @ b, 2 * BUDGET_MS)
        copy = self.milliseconds(lambda: y.copy_(x), 2 * BUDGET_MS)
        flops, moved = 2.0 * n**3, 4.0 * x.numel()
        self._row(f"product {n}^3", "cuBLAS", product, flops, 0, None)
        self._row(f"copy of {x.numel()}", "torch", copy, 0, moved, None)
        self.roof = Peak(flops / product * 1e3, moved / copy * 1e3)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm, of the pair where it is largest; infinite where shapes or counts differ."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    worst = 0.0
    for one, true in zip(found, expected, strict=True):
        difference = norm = 0.0
        # in parts: a gradient of all logits in fp32 is 4 GB
        for a, b in zip(
            one.detach().flatten().split(1 << 26), true.detach().flatten().split(1 << 26), strict=True
        ):
            difference += float((a.float() - b.float()).square().sum(dtype=torch.float64))
            norm += float(b.float().square().sum(dtype=torch.float64))
        gap = (difference / max(norm, 1e-60)) ** 0.5
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst

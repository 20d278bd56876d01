"""Timing work on one device, as a share of what that device gave just before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.gpu.results import Results

BF16 = torch.bfloat16
Work = Callable[[], object]


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


class Bench:
    """Times work on one device and writes a row for each: ``flops`` or ``bytes_moved`` say what it did."""

    def __init__(self, device: str, sizes: Sizes, results: Results):
        self.device, self.sizes, self.results = device, sizes, results
        self.roofs: dict[str, float] = {}

    def new(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16, leaf: bool = False) -> Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(dtype).requires_grad_(leaf)

    def milliseconds(self, work: Work, budget: float) -> float:
        """Median of as many runs as fit into ``budget`` milliseconds, with a cold L2 cache; of one run on a CPU."""
        if self.device == "cuda":
            from triton.testing import do_bench

            return do_bench(work, warmup=40, rep=budget, return_mode="median")
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e3

    def row(
        self,
        what: str,
        who: str,
        work: Work,
        *,
        flops: float = 0,
        bytes_moved: float = 0,
        budget: float = 120,
    ) -> float:
        """Time ``work`` and keep the row; a peer that fails is a row with its error. Returns its rate per second."""
        try:
            taken = self.milliseconds(work, budget)
        except Exception as error:
            if who == "ours":
                self.results.wrong(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            else:
                self.results.row(
                    what=what, who=who, error=f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                )
            return 0.0
        rate = (flops or bytes_moved) / taken * 1e3
        unit, scale = ("TFLOP/s", 1e12) if flops else ("GB/s", 1e9)
        values = {"what": what, "who": who, "ms": round(taken, 4), unit: round(rate / scale, 1)}
        if roof := self.roofs.get(unit):
            values["share"] = round(rate / roof, 3)
        self.results.row(**values)
        return rate

    def measure_roofs(self) -> None:
        n = self.sizes.roof
        a, b = self.new(n, n), self.new(n, n)
        self.roofs["TFLOP/s"] = self.row(f"product {n}^3", "cuBLAS", lambda: a @ b, flops=2.0 * n**3)
        x = torch.zeros(self.sizes.copied, dtype=BF16, device=self.device)
        y = torch.empty_like(x)
        self.roofs["GB/s"] = self.row(
            f"copy of {x.numel()}", "torch", lambda: y.copy_(x), bytes_moved=4.0 * x.numel()
        )

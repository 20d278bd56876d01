#!/usr/bin/env python3
"""How fast the kernels are beside other installed packages: TFLOP/s or GB/s, and the share of this card's
measured peak.

    python tools/gpu/fast.py OUT            the paper's sizes; writes OUT/fast.json
    python tools/gpu/fast.py OUT --tiny     the same code in seconds, on a CPU too; its times mean nothing

The card's peaks are measured first: one large cuBLAS product, one large copy; ``peak_share`` is of the maker's
figure. A peer's result is compared with ours before it is timed; one that fails or differs is listed with the
reason. The name of a peer that does less or more work says so.

Legend: T tokens, N rows, D model width, F expert width, E experts, K experts per token, S sequences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ring.kernels import (
    combine,
    expert_mlp,
    grouped_gemm,
    permute,
    route,
    route_index,
)
from megatron_ring.kernels.grouped_gemm import op
from tools.gpu import fast_decode, fast_rows, peers
from tools.gpu.bench import PAPER, TINY, Bench, Side, Work, side
from tools.gpu.results import Results
from tools.gpu.shapes import expert_ends


def products(bench: Bench, skewed: bool) -> None:
    """The experts' first product, forward and both gradients, and the weight gradient that accumulates in fp32."""
    s = bench.sizes
    N, offsets_E = s.T * s.K, expert_ends(s.T * s.K, s.E, bench.device, skewed=skewed)
    x_ND, w_EFD = bench.new(N, s.D, leaf=True), bench.new(s.E, 2 * s.F, s.D, scale=0.02, leaf=True)
    dy_NF, kernels = bench.new(N, 2 * s.F), op.kernels_for(x_ND, w_EFD)
    ends = [0, *offsets_E.tolist()]
    spans = [(expert, slice(a, b)) for expert, (a, b) in enumerate(pairwise(ends))]
    sizes, w_EDF, x, w = (
        [b - a for a, b in pairwise(ends)],
        w_EFD.transpose(1, 2),
        x_ND.detach(),
        w_EFD.detach(),
    )
    size = f"{N}x{s.D}x{2 * s.F}, {s.E} experts{', skewed' if skewed else ''}"
    flops = 2.0 * N * s.D * 2 * s.F
    # bytes read and written, if each is moved once
    rows, weights = 2.0 * N * (s.D + 2 * s.F), w_EFD.numel()
    once = {"flops": flops, "bytes_moved": rows + 2 * weights}

    def joined(found: list[Tensor]) -> list[Tensor]:
        return [torch.cat(found)]

    bench.compare(f"grouped GEMM forward, {size}", [
        side("ours", lambda: kernels.grouped_nt(x, w, offsets_E)),
        side("cuBLAS, one by one", lambda: [x[rows] @ w[expert].t() for expert, rows in spans], joined),
        side("torch.grouped_mm", lambda: F.grouped_mm(x, w.transpose(1, 2), offs=offsets_E)),
        *peers.grouped_linear(x, w, sizes),
    ], **once)  # fmt: skip
    bench.compare(f"grouped GEMM dgrad, {size}", [
        side("ours", lambda: kernels.grouped_nn(dy_NF, w, offsets_E)),
        side("cuBLAS, one by one", lambda: [dy_NF[rows] @ w[expert] for expert, rows in spans], joined),
        side("torch.grouped_mm", lambda: F.grouped_mm(dy_NF, w, offs=offsets_E)),
    ], **once)  # fmt: skip
    bench.compare(f"grouped GEMM wgrad, {size}", [
        side("ours", lambda: kernels.grouped_tn(dy_NF, x, offsets_E)),
        side("cuBLAS, one by one", lambda: [dy_NF[rows].t() @ x[rows] for _, rows in spans],
             lambda found: [torch.stack(found)]),
        side("torch.grouped_mm", lambda: F.grouped_mm(dy_NF.t(), x, offs=offsets_E)),
    ], **once)  # fmt: skip
    bench.compare(f"grouped GEMM wgrad into fp32, {size}", [
        accumulating("ours", w, lambda main: kernels.grouped_tn(dy_NF, x, offsets_E, main)),
        accumulating("cuBLAS, one by one, then add", w,
                     lambda main: [main[expert].add_(dy_NF[rows].t() @ x[rows]) for expert, rows in spans]),
        accumulating("torch.grouped_mm, then add", w,
                     lambda main: main.add_(F.grouped_mm(dy_NF.t(), x, offs=offsets_E))),
    ], flops=flops, bytes_moved=rows + 8 * weights)  # fmt: skip
    leaves = (x_ND, w_EFD)
    bench.compare(f"grouped GEMM forward+backward, {size}", [
        side("ours", lambda: torch.autograd.grad(grouped_gemm(x_ND, w_EFD, offsets_E), leaves, dy_NF)),
        side("torch.grouped_mm",
             lambda: torch.autograd.grad(F.grouped_mm(x_ND, w_EDF, offs=offsets_E), leaves, dy_NF)),
        *peers.grouped_linear(x_ND, w, sizes, dy_NF),
    ], flops=3 * flops, bytes_moved=3 * (rows + 2 * weights))  # fmt: skip


def accumulating(who: str, w_EFD: Tensor, add: Callable[[Tensor], object]) -> Side:
    """A side that adds into its own buffer, which is compared after the first run."""
    kept: list[Tensor] = []

    def make() -> Work:
        main_EFD = torch.zeros_like(w_EFD, dtype=torch.float32)
        kept[:] = [main_EFD]
        return lambda: add(main_EFD)

    return Side(who, make, lambda _found: [kept.pop().clone()])


def experts(bench: Bench) -> None:
    """The whole layer, router included, forward and backward."""
    s = bench.sizes
    N = s.T * s.K
    x_TD, into_TD = bench.new(s.T, s.D, leaf=True), bench.new(s.T, s.D)
    up_E2FD = bench.new(s.E, 2, s.F, s.D, scale=0.02, leaf=True)
    down_EDF = bench.new(s.E, s.D, s.F, scale=0.02, leaf=True)
    router_ED = bench.new(s.E, s.D, scale=0.02, dtype=torch.float32, leaf=True)
    leaves = (x_TD, up_E2FD, down_EDF, router_ED)

    def ours() -> Tensor:
        routing = route(F.linear(x_TD.float(), router_ED), topk=s.K)
        index = route_index(routing.experts_TK, s.E)
        probs_N = torch.zeros(N, device=bench.device).scatter(
            0, index.position_TK.reshape(-1), routing.probs_TK.reshape(-1)
        )
        return combine(expert_mlp(permute(x_TD, index), up_E2FD, down_EDF, index.offsets_E, probs_N), index)

    def chosen() -> tuple[Tensor, Tensor]:
        probs_TK, experts_TK = F.linear(x_TD.float(), router_ED).softmax(-1).topk(s.K)
        return probs_TK / probs_TK.sum(-1, keepdim=True), experts_TK

    def grouped() -> Tensor:
        probs_TK, experts_TK = chosen()
        order = experts_TK.flatten().argsort(stable=True)
        ends = torch.bincount(experts_TK.flatten(), minlength=s.E).cumsum(0).int()
        rows = x_TD.index_select(0, order // s.K)
        gate, up = F.grouped_mm(rows, up_E2FD.flatten(1, 2).transpose(1, 2), offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, down_EDF.transpose(1, 2), offs=ends)
        y = y * probs_TK.flatten().index_select(0, order)[:, None].to(y.dtype)
        return torch.zeros_like(x_TD).index_add(0, order // s.K, y)

    def liger(fused: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def layer() -> Tensor:
            probs_TK, experts_TK = chosen()
            return fused(x_TD, up_E2FD, down_EDF, experts_TK, probs_TK)

        return layer

    def both(layer: Callable[[], Tensor]) -> Work:
        def work() -> tuple[Tensor, ...]:
            y_TD = layer()
            return y_TD, *torch.autograd.grad(y_TD, leaves, into_TD)

        return work

    size, flops = f"{s.T} tokens, {s.D}, {s.E} experts, top-{s.K}, {s.F}", 2.0 * N * s.D * 3 * s.F
    for what, of, times in (("forward", torch.no_grad(), 1), ("forward+backward", both, 3)):
        bench.compare(f"MoE layer {what}, {size}", [
            side("ours", of(ours)),
            side("torch.grouped_mm", of(grouped)),
            *peers.moe_experts(lambda fused, of=of: of(liger(fused))),
        ], flops=times * flops, budget=250, tolerance=5e-2)  # fmt: skip


PARTS = (
    lambda bench: products(bench, False),
    experts,
    fast_rows.heads,
    fast_rows.routing,
    fast_rows.permutation,
    fast_rows.norms,
    fast_rows.attention,
    fast_decode.decoding,
    lambda bench: products(bench, True),
    fast_decode.whole_step,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for fast.json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    bench = Bench(device, TINY if args.tiny else PAPER, Results(args.out, "fast"))
    bench.results.facts["tiny"] = args.tiny
    bench.measure_roof()
    for part in PARTS:
        part(bench)
        if device == "cuda":
            torch.cuda.empty_cache()
    failed = sum("failed" in row for row in bench.results.rows)
    print(
        f"{len(bench.results.rows)} rows, {failed} of peers that failed, {len(bench.results.bad)} wrong",
        flush=True,
    )
    return 1 if bench.results.bad else 0


if __name__ == "__main__":
    sys.exit(main())

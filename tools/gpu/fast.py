#!/usr/bin/env python3
"""How fast the kernels are beside what else is installed: TFLOP/s or GB/s, and the share of what this card gave before.

    python tools/gpu/fast.py OUT            the paper's sizes; writes OUT/fast.json
    python tools/gpu/fast.py OUT --tiny     the same code in seconds, on a CPU too; its times mean nothing

The roofs are measured first: one large cuBLAS product, one large copy. A peer that fails is named with its error.

Legend: T tokens, N rows, D model width, F expert width, E experts, K experts per token, V vocabulary, S sequences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ring.kernels import (
    combine,
    decode_attention,
    dispatch,
    expert_mlp,
    permute,
    qk_norm_rope,
    rms_norm,
    route,
    route_index,
    sample_token,
    token_logprob,
)
from megatron_ring.model.attention import segment_attention, varlen_attention
from megatron_ring.model.packed import PackedInputs
from tools.gpu.bench import BF16, PAPER, TINY, Bench, Work
from tools.gpu.results import Results
from tools.gpu.shapes import expert_ends


def products(bench: Bench, skewed: bool) -> None:
    """The experts' first product, forward and both gradients, and the weight gradient that accumulates in fp32."""
    s = bench.sizes
    N, offsets_E = s.T * s.K, expert_ends(s.T * s.K, s.E, bench.device, skewed=skewed)
    x_ND, w_EFD = bench.new(N, s.D), bench.new(s.E, 2 * s.F, s.D, scale=0.02)
    dy_NF, main_EFD = bench.new(N, 2 * s.F), torch.zeros(s.E, 2 * s.F, s.D, device=bench.device)
    flops = 2.0 * N * s.D * 2 * s.F
    size = f"{N}x{s.D}x{2 * s.F}, {s.E} experts{', skewed' if skewed else ''}"
    kernels = grouped_kernels(x_ND)
    ends = [0, *offsets_E.tolist()]
    spans = [(expert, slice(a, b)) for expert, (a, b) in enumerate(pairwise(ends))]
    w_EDF = w_EFD.transpose(1, 2)
    works: dict[str, dict[str, Work]] = {
        "forward": {
            "ours": lambda: kernels.grouped_nt(x_ND, w_EFD, offsets_E),
            "cuBLAS, one by one": lambda: [x_ND[rows] @ w_EFD[expert].t() for expert, rows in spans],
            "torch.grouped_mm": lambda: F.grouped_mm(x_ND, w_EDF, offs=offsets_E),
        },
        "dgrad": {
            "ours": lambda: kernels.grouped_nn(dy_NF, w_EFD, offsets_E),
            "cuBLAS, one by one": lambda: [dy_NF[rows] @ w_EFD[expert] for expert, rows in spans],
            "torch.grouped_mm": lambda: F.grouped_mm(dy_NF, w_EFD, offs=offsets_E),
        },
        "wgrad": {
            "ours": lambda: kernels.grouped_tn(dy_NF, x_ND, offsets_E),
            "cuBLAS, one by one": lambda: [dy_NF[rows].t() @ x_ND[rows] for _, rows in spans],
            "torch.grouped_mm": lambda: F.grouped_mm(dy_NF.t(), x_ND, offs=offsets_E),
        },
        "wgrad into fp32": {"ours": lambda: kernels.grouped_tn(dy_NF, x_ND, offsets_E, main_EFD)},
    }
    for what, sides in works.items():
        for who, work in sides.items():
            bench.row(f"grouped GEMM {what}, {size}", who, work, flops=flops)
    for who, work in transformer_engine_products(x_ND, w_EFD, ends):
        bench.row(f"grouped GEMM forward, {size}", who, work, flops=flops)


def grouped_kernels(x: Tensor):
    """What holds the three grouped products for ``x``."""
    if dispatch.backend(x) == "triton":
        from megatron_ring.kernels.grouped_gemm import kernel

        return kernel
    from megatron_ring.kernels.grouped_gemm import host

    return host


def transformer_engine_products(x_ND: Tensor, w_EFD: Tensor, ends: list[int]) -> Iterator[tuple[str, Work]]:
    try:
        from transformer_engine.pytorch import GroupedLinear
    except ImportError:
        return
    E, width, D = w_EFD.shape
    layer = GroupedLinear(E, D, width, bias=False, params_dtype=BF16, device="cuda")
    sizes = [b - a for a, b in pairwise(ends)]
    yield "Transformer Engine", lambda: layer(x_ND, sizes)


def experts(bench: Bench) -> None:
    """The fused network of the experts, and the whole layer forward and backward."""
    s = bench.sizes
    N = s.T * s.K
    x_TD = bench.new(s.T, s.D, leaf=True)
    up_E2FD, down_EDF = (
        bench.new(s.E, 2, s.F, s.D, scale=0.02, leaf=True),
        bench.new(s.E, s.D, s.F, scale=0.02, leaf=True),
    )
    router_ED = bench.new(s.E, s.D, scale=0.02, dtype=torch.float32, leaf=True)
    into_TD, leaves = bench.new(s.T, s.D), (x_TD, up_E2FD, down_EDF, router_ED)
    flops = 2.0 * N * s.D * 3 * s.F

    def ours() -> Tensor:
        routing = route(F.linear(x_TD.float(), router_ED), topk=s.K)
        index = route_index(routing.experts_TK, s.E)
        probs_N = torch.zeros(N, device=bench.device).scatter(
            0, index.position_TK.reshape(-1), routing.probs_TK.reshape(-1)
        )
        return combine(expert_mlp(permute(x_TD, index), up_E2FD, down_EDF, index.offsets_E, probs_N), index)

    def grouped() -> Tensor:
        probs_TK, experts_TK = F.linear(x_TD.float(), router_ED).softmax(-1).topk(s.K)
        probs_TK = probs_TK / probs_TK.sum(-1, keepdim=True)
        order = experts_TK.flatten().argsort(stable=True)
        ends = torch.bincount(experts_TK.flatten(), minlength=s.E).cumsum(0).int()
        rows = x_TD.index_select(0, order // s.K)
        gate, up = F.grouped_mm(rows, up_E2FD.flatten(1, 2).transpose(1, 2), offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, down_EDF.transpose(1, 2), offs=ends)
        y = y * probs_TK.flatten().index_select(0, order)[:, None].to(y.dtype)
        return torch.zeros_like(x_TD).index_add(0, order // s.K, y)

    size = f"{s.T} tokens, {s.D}, {s.E} experts, top-{s.K}, {s.F}"
    for who, layer in (("ours", ours), ("torch.grouped_mm", grouped)):
        bench.row(
            f"MoE layer forward+backward, {size}",
            who,
            lambda layer=layer: torch.autograd.grad(layer(), leaves, into_TD),
            flops=3 * flops,
            budget=300,
        )
        with torch.no_grad():
            bench.row(f"MoE layer forward, {size}", who, torch.no_grad()(layer), flops=flops)


def memory_bound(bench: Bench) -> None:
    """Routing, rows, norms and rotations."""
    s = bench.sizes
    logits_TE, x_TD, weight_D = bench.new(s.T, s.E, dtype=torch.float32), bench.new(s.T, s.D), bench.new(s.D)
    x_bytes = 2.0 * x_TD.numel()
    routing = route(logits_TE, topk=s.K)
    index = route_index(routing.experts_TK, s.E)
    rows_ND = permute(x_TD, index)
    ids = 8.0 * s.T * s.K
    bench.row("route", "ours", lambda: route(logits_TE, topk=s.K), bytes_moved=4.0 * logits_TE.numel())
    bench.row(
        "route", "eager torch", lambda: logits_TE.softmax(-1).topk(s.K), bytes_moved=4.0 * logits_TE.numel()
    )
    bench.row("route_index", "ours", lambda: route_index(routing.experts_TK, s.E), bytes_moved=3 * ids)
    bench.row(
        "route_index",
        "argsort",
        lambda: routing.experts_TK.flatten().argsort(stable=True),
        bytes_moved=3 * ids,
    )
    bench.row("permute", "ours", lambda: permute(x_TD, index), bytes_moved=(s.K + 1) * x_bytes)
    bench.row(
        "permute",
        "index_select",
        lambda: x_TD.index_select(0, index.gather_N),
        bytes_moved=(s.K + 1) * x_bytes,
    )
    bench.row("combine", "ours", lambda: combine(rows_ND, index), bytes_moved=(s.K + 1) * x_bytes)
    bench.row(
        "combine", "index_add", lambda: torch.zeros_like(x_TD).index_add_(0, index.gather_N, rows_ND),
        bytes_moved=(s.K + 1) * x_bytes,
    )  # fmt: skip
    bench.row("rms_norm", "ours", lambda: rms_norm(x_TD, weight_D, 1e-6), bytes_moved=2 * x_bytes)
    bench.row(
        "rms_norm", "F.rms_norm", lambda: F.rms_norm(x_TD, (s.D,), weight_D, 1e-6), bytes_moved=2 * x_bytes
    )
    mixed_TGMC, rotary_2TH = bench.new(s.T, 4, 6, 128), torch.rand(2, s.T, 64, device=bench.device)
    bench.row(
        "qk_norm_rope",
        "ours",
        lambda: qk_norm_rope(mixed_TGMC, rotary_2TH),
        bytes_moved=4.0 * mixed_TGMC.numel(),
    )


def heads(bench: Bench) -> None:
    """Log p and entropy of the whole vocabulary."""
    s = bench.sizes
    logits_TV, targets_T = bench.new(s.T, s.V, leaf=True), torch.randint(s.V, (s.T,), device=bench.device)
    read = 2.0 * logits_TV.numel()
    size = f"{s.T}x{s.V}"

    def forward() -> Tensor:
        return token_logprob(logits_TV, targets_T)[0]

    def both() -> object:
        logp_T, entropy_T = token_logprob(logits_TV, targets_T)
        return torch.autograd.grad(logp_T.sum() + entropy_T.sum(), logits_TV)

    def cross_entropy() -> object:
        return torch.autograd.grad(F.cross_entropy(logits_TV, targets_T, reduction="sum"), logits_TV)

    bench.row(f"log p + entropy forward, {size}", "ours", torch.no_grad()(forward), bytes_moved=read)
    bench.row(f"log p + entropy forward+backward, {size}", "ours", both, bytes_moved=3 * read)
    bench.row(
        f"log p + entropy forward+backward, {size}",
        "F.cross_entropy (no entropy)",
        cross_entropy,
        bytes_moved=3 * read,
    )
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return

    def liger() -> object:
        return torch.autograd.grad(liger_cross_entropy(logits_TV * 1, targets_T, reduction="sum"), logits_TV)

    bench.row(f"log p + entropy forward+backward, {size}", "Liger (no entropy)", liger, bytes_moved=3 * read)


def attention(bench: Bench) -> None:
    """Two segments of half a microbatch."""
    s, H, G, C = bench.sizes, 16, 4, 128
    half = s.T // 2
    q, k, v = (bench.new(s.T, heads, C, leaf=True) for heads in (H, G, G))
    ends = torch.tensor([0, half, s.T], dtype=torch.int32, device=bench.device)
    packed = PackedInputs(
        qkv_format="thd", cu_seqlens_q=ends, max_seqlen_q=half, segment_lengths=(half, half)
    )
    into = torch.randn_like(q)
    flops = 2 * 2 * 2.0 * H * C * half**2 / 2
    sides = (
        {"ours (flash-attn or torch)": lambda: varlen_attention(q, k, v, packed, C**-0.5)}
        if bench.device == "cuda"
        else {}
    )
    sides["SDPA per segment"] = lambda: segment_attention(q, k, v, (half, half), C**-0.5)
    for who, attend in sides.items():
        bench.row(f"attention forward, 2x{half}", who, torch.no_grad()(attend), flops=flops)
        bench.row(
            f"attention forward+backward, 2x{half}",
            who,
            lambda attend=attend: torch.autograd.grad(attend(), (q, k, v), into),
            flops=3.5 * flops,
        )


@torch.no_grad()
def decoding(bench: Bench) -> None:
    """One token of each of S sequences."""
    s, G, R, C = bench.sizes, 4, 4, 128
    mixed, rotary = bench.new(s.S, G, R + 2, C), torch.rand(2, s.S, C // 2, device=bench.device)
    keys, values = (bench.new(s.S + 1, s.context, G, C) for _ in range(2))
    slots, positions = (
        torch.arange(s.S, device=bench.device),
        torch.full((s.S,), s.context - 1, device=bench.device),
    )
    bench.row(
        f"decode attention, {s.S} over {s.context}", "ours",
        lambda: decode_attention(mixed, rotary, keys, values, slots, positions, C**-0.5),
        bytes_moved=4.0 * s.S * s.context * G * C,
    )  # fmt: skip
    logits_SV, uniforms_S = bench.new(s.S, s.V), torch.rand(s.S, dtype=torch.float64, device=bench.device)
    bench.row(
        f"sample a token, {s.S}x{s.V}",
        "ours",
        lambda: sample_token(logits_SV, uniforms_S),
        bytes_moved=4.0 * logits_SV.numel(),
    )
    bench.row(
        f"sample a token, {s.S}x{s.V}", "torch.multinomial",
        lambda: torch.multinomial(logits_SV.float().softmax(-1), 1), bytes_moved=4.0 * logits_SV.numel(),
    )  # fmt: skip
    N = s.S * s.K
    ends = expert_ends(N, s.E, bench.device, skewed=False)
    x_ND, up, down = (
        bench.new(N, s.D),
        bench.new(s.E, 2, s.F, s.D, scale=0.02),
        bench.new(s.E, s.D, s.F, scale=0.02),
    )
    weights = 2.0 * (up.numel() + down.numel())
    bench.row(
        f"experts of a decoding step, {N} rows",
        "ours",
        lambda: expert_mlp(x_ND, up, down, ends),
        bytes_moved=weights,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for fast.json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(device, TINY if args.tiny else PAPER, Results(args.out, "fast"))
    bench.results.facts["tiny"] = args.tiny
    bench.measure_roofs()
    parts = (
        lambda b: products(b, False),
        experts,
        heads,
        memory_bound,
        attention,
        decoding,
        lambda b: products(b, True),
    )
    for part in parts:
        part(bench)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"{len(bench.results.rows)} rows, {len(bench.results.bad)} wrong", flush=True)
    return 1 if bench.results.bad else 0


if __name__ == "__main__":
    sys.exit(main())

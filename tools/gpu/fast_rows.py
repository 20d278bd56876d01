"""The ops that stream rows, and attention, beside eager torch and other installed packages: forward, and both
ways.

Legend: T tokens, N rows, D model width, E experts, K experts per token, V vocabulary, G key heads, R query heads of each,
M = R + 2, C channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ring.kernels import (
    HeadNorms,
    combine,
    permute,
    qk_norm_rope,
    rms_norm,
    route,
    route_index,
    token_logprob,
)
from megatron_ring.model.attention import segment_attention, torch_varlen, varlen_attention
from megatron_ring.model.packed import PackedInputs
from tools.gpu import peers
from tools.gpu.bench import Bench, Side, Work, peer, side

EPS = 1e-6


def both_ways(apply: Callable[[], Any], leaves: Sequence[Tensor], into: Any) -> Work:
    return lambda: torch.autograd.grad(apply(), leaves, into)


def routing(bench: Bench) -> None:
    """The choice of experts with its statistics, and the sort."""
    s = bench.sizes
    logits_TE, into_TK = (
        bench.new(s.T, s.E, dtype=torch.float32, leaf=True),
        torch.rand(s.T, s.K).to(bench.device),
    )
    ids_TK = route(logits_TE, topk=s.K).experts_TK

    def eager() -> tuple[Tensor, ...]:
        scores_TE = logits_TE.softmax(-1)
        best_TK, experts_TK = scores_TE.topk(s.K)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=s.E)
        z_sum = logits_TE.logsumexp(-1).square().sum()
        return best_TK / best_TK.sum(-1, keepdim=True), experts_TK, counts_E, scores_TE.sum(0), z_sum

    logits, slots = 4.0 * logits_TE.numel(), float(s.T * s.K)
    size = f"{s.T}x{s.E}, top-{s.K}"
    bench.compare(f"route, {size}", [
        side("ours", torch.no_grad()(lambda: route(logits_TE, topk=s.K)), lambda found: [found[0]]),
        side("eager torch", torch.no_grad()(eager), lambda found: [found[0]]),
        *peers.router(logits_TE, ids_TK),
    ], bytes_moved=logits + 12 * slots)  # fmt: skip
    bench.compare(f"route forward+backward, {size}", [
        side("ours", both_ways(lambda: route(logits_TE, topk=s.K)[0], [logits_TE], into_TK)),
        side("eager torch", both_ways(lambda: eager()[0], [logits_TE], into_TK)),
        *peers.router(logits_TE, ids_TK, into_TK),
    ], bytes_moved=3 * logits + 24 * slots)  # fmt: skip

    def sort() -> tuple[Tensor, ...]:
        order_N = ids_TK.flatten().argsort(stable=True)
        position_N = torch.empty_like(order_N).scatter_(
            0, order_N, torch.arange(len(order_N), device=bench.device)
        )
        counts_E = torch.bincount(ids_TK.flatten(), minlength=s.E)
        return counts_E.cumsum(0).int(), order_N // s.K, position_N.view_as(ids_TK)

    bench.compare(f"route_index, {size}", [
        side("ours", lambda: tuple(route_index(ids_TK, s.E))), side("eager torch", sort),
    ], bytes_moved=24 * slots, tolerance=0)  # fmt: skip


def permutation(bench: Bench) -> None:
    """Rows into the experts' order, and their sum back."""
    s = bench.sizes
    x_TD, into_TD = bench.new(s.T, s.D, leaf=True), bench.new(s.T, s.D)
    ids_TK = torch.rand(s.T, s.E, device=bench.device).topk(s.K).indices
    index = route_index(ids_TK, s.E)
    y_ND, into_ND = bench.new(s.T * s.K, s.D, leaf=True), bench.new(s.T * s.K, s.D)
    # every row read once and written once, and its index
    moved = 2.0 * (s.K + 1) * x_TD.numel() + 8 * s.T * s.K
    size = f"{s.T}x{s.D}, top-{s.K}"
    works: dict[str, dict[str, Callable[[], Tensor]]] = {
        "permute": {
            "ours": lambda: permute(x_TD, index),
            "index_select": lambda: x_TD.index_select(0, index.gather_N),
        },
        "combine": {
            "ours": lambda: combine(y_ND, index),
            "index_add": lambda: torch.zeros_like(x_TD).index_add(0, index.gather_N, y_ND),
            "gather, then sum": lambda: y_ND[index.position_TK].sum(1),
        },
    }
    others = {
        "permute": (lambda: peers.permuted(x_TD, ids_TK), lambda: peers.permuted(x_TD, ids_TK, into_ND)),
        "combine": (
            lambda: peers.combined(y_ND, x_TD, ids_TK),
            lambda: peers.combined(y_ND, x_TD, ids_TK, into_TD),
        ),
    }
    for name, sides in works.items():
        leaf, into = (x_TD, into_ND) if name == "permute" else (y_ND, into_TD)
        forward, both = others[name]
        bench.compare(
            f"{name}, {size}",
            [*(side(who, torch.no_grad()(work)) for who, work in sides.items()), *forward()],
            bytes_moved=moved,
        )
        bench.compare(
            f"{name} forward+backward, {size}",
            [*(side(who, both_ways(work, [leaf], into)) for who, work in sides.items()), *both()],
            bytes_moved=2 * moved,
        )


def norms(bench: Bench) -> None:
    """RMSNorm of the model's width; norm and rotation of the heads."""
    s = bench.sizes
    x_TD, weight_D, into_TD = bench.new(s.T, s.D, leaf=True), bench.new(s.D, leaf=True), bench.new(s.T, s.D)
    works = {
        "ours": lambda: rms_norm(x_TD, weight_D, EPS),
        "F.rms_norm": lambda: F.rms_norm(x_TD, (s.D,), weight_D, EPS),
    }
    leaves, size = (x_TD, weight_D), f"{s.T}x{s.D}"
    bench.compare(f"rms_norm, {size}", [
        *(side(who, torch.no_grad()(work)) for who, work in works.items()),
        *peers.norm(x_TD, weight_D, EPS),
    ], bytes_moved=4.0 * x_TD.numel())  # fmt: skip
    bench.compare(f"rms_norm forward+backward, {size}", [
        *(side(who, both_ways(work, leaves, into_TD)) for who, work in works.items()),
        *peers.norm(x_TD, weight_D, EPS, into_TD),
    ], bytes_moved=10.0 * x_TD.numel())  # fmt: skip
    head_norms(bench)


def head_norms(bench: Bench) -> None:
    G, R, C, T = 4, 4, 128, bench.sizes.T
    mixed_TGMC, turns_TH = (
        bench.new(T, G, R + 2, C, leaf=True),
        torch.rand(T, C // 2, device=bench.device) * 6,
    )
    rotary_2TH = torch.stack((turns_TH.cos(), turns_TH.sin()))
    norms = HeadNorms(bench.new(C, leaf=True), bench.new(C, leaf=True), EPS)
    into = bench.new(T, G * R, C), bench.new(T, G, C), bench.new(T, G, C)
    leaves = (mixed_TGMC, norms.q_weight_C, norms.k_weight_C)

    def eager() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = mixed_TGMC.split((R, 1, 1), dim=2)
        cos, sin = rotary_2TH.repeat(1, 1, 2)[:, :, None, None]
        rotated = []
        for heads, weight_C in ((q, norms.q_weight_C), (k, norms.k_weight_C)):
            normed = F.rms_norm(heads, (C,), weight_C, EPS)
            turned = torch.cat((-normed[..., C // 2 :], normed[..., : C // 2]), -1)
            rotated.append((normed * cos + turned * sin).to(heads.dtype))
        return rotated[0].flatten(1, 2), rotated[1].squeeze(2), v.squeeze(2).contiguous()

    works = {"ours": lambda: qk_norm_rope(mixed_TGMC, rotary_2TH, norms), "eager torch": eager}
    size, once = f"{T}x{G}x{R + 2}x{C}", 2.0 * mixed_TGMC.numel()
    angles = 4.0 * rotary_2TH.numel()
    bench.compare(f"qk_norm_rope, {size}", [
        *(side(who, torch.no_grad()(work)) for who, work in works.items()),
        *peers.qk_norm_rope(mixed_TGMC, rotary_2TH, norms),
    ], bytes_moved=2 * once + angles)  # fmt: skip
    bench.compare(f"qk_norm_rope forward+backward, {size}", [
        *(side(who, both_ways(work, leaves, into)) for who, work in works.items()),
        *peers.qk_norm_rope(mixed_TGMC, rotary_2TH, norms, into),
    ], bytes_moved=5 * once + 2 * angles)  # fmt: skip


def heads(bench: Bench) -> None:
    """Log p and entropy of the whole vocabulary."""
    s = bench.sizes
    logits_TV, targets_T = bench.new(s.T, s.V, leaf=True), torch.randint(s.V, (s.T,), device=bench.device)
    read, size = 2.0 * logits_TV.numel(), f"{s.T}x{s.V}"

    def eager() -> tuple[Tensor, Tensor]:
        logp_TV = logits_TV.float().log_softmax(-1)
        return logp_TV.gather(1, targets_T[:, None]).squeeze(1), -(logp_TV.exp() * logp_TV).sum(-1)

    def of(values: Callable[[], Sequence[Tensor]], logits: Tensor = logits_TV) -> Work:
        """Loss and gradient of -log p, and of the entropy if it is asked for."""

        def work() -> tuple[Tensor, Tensor]:
            logp_T, entropy_T = values()
            loss = -logp_T.sum() if entropy_T is None else entropy_T.sum() - logp_T.sum()
            return loss, torch.autograd.grad(loss, logits)[0]

        return work

    def ours() -> Sequence[Tensor]:
        return token_logprob(logits_TV, targets_T)

    def in_place(with_entropy: bool) -> Side:
        def make() -> Work:
            own_TV = logits_TV.detach().clone().requires_grad_()
            options = {"with_entropy": with_entropy, "inplace_backward": True}
            return of(lambda: token_logprob(own_TV, targets_T, **options), own_TV)

        return Side("ours, in place", make)

    name = "log p + entropy"
    bench.compare(f"{name} forward, {size}", [
        side("ours", torch.no_grad()(ours)), side("eager torch", torch.no_grad()(eager)),
    ], bytes_moved=read)  # fmt: skip
    made = ours()
    into = [torch.ones_like(each) for each in made]
    bench.compare(f"{name} backward, {size}", [
        side("ours", lambda: torch.autograd.grad(made, logits_TV, into, retain_graph=True)),
    ], bytes_moved=2 * read)  # fmt: skip
    bench.compare(f"{name} forward+backward, {size}", [
        side("ours", of(ours)), in_place(True), side("eager torch", of(eager)),
    ], bytes_moved=3 * read)  # fmt: skip
    bench.compare(f"log p forward+backward, {size}", [
        side("ours", of(lambda: token_logprob(logits_TV, targets_T, with_entropy=False))),
        in_place(False),
        side("F.cross_entropy", of(lambda: (-F.cross_entropy(logits_TV, targets_T, reduction="none"), None))),
        *peers.cross_entropy(logits_TV, targets_T),
    ], bytes_moved=3 * read)  # fmt: skip


def attention(bench: Bench) -> None:
    """Two segments of half a microbatch. The model runs torch's kernel, or flash-attn if it is installed."""
    s, H, G, C = bench.sizes, 16, 4, 128
    half, scale = s.T // 2, C**-0.5
    q, k, v = (bench.new(s.T, heads, C, leaf=True) for heads in (H, G, G))
    ends = torch.tensor([0, half, s.T], dtype=torch.int32, device=bench.device)
    packed = PackedInputs(
        qkv_format="thd", cu_seqlens_q=ends, max_seqlen_q=half, segment_lengths=(half, half)
    )

    def per_segment() -> Tensor:
        return segment_attention(q, k, v, (half, half), scale)

    def eager() -> Tensor:
        later = torch.ones(half, half, dtype=torch.bool, device=bench.device).triu(1)
        q_BHLC, k_BHLC, v_BHLC = (
            x.repeat_interleave(H // x.shape[1], 1).unflatten(0, (2, half)).transpose(1, 2) for x in (q, k, v)
        )
        scores = (q_BHLC @ k_BHLC.transpose(2, 3) * scale).masked_fill(later, float("-inf"))
        return (scores.softmax(-1) @ v_BHLC).transpose(1, 2).flatten(0, 1)

    on_gpu = bench.device == "cuda"
    kernel = "SDPA's" if not on_gpu else "torch's" if find_spec("flash_attn") is None else "flash-attn's"
    attends: list[tuple[str, str | None, Callable[[], Work]]] = [
        ("ours", None, lambda: (lambda: varlen_attention(q, k, v, packed, scale)) if on_gpu else per_segment)
    ]
    if on_gpu and find_spec("flash_attn") is not None:
        # then the model uses that one
        by_name = torch_varlen()
        attends.append(
            (
                "torch's varlen_attn",
                None,
                lambda: lambda: by_name(q, k, v, ends, ends, half, half, scale=scale),
            )
        )
    if on_gpu:
        attends.append(("SDPA per segment (copies keys)", None, lambda: per_segment))
    attends += peers.flash_attention(q, k, v, ends, half, scale)
    attends.append(("eager torch", None, lambda: eager))
    # half of each square, two products
    flops, moved = 2 * 2 * 2.0 * H * C * half**2 / 2, 2.0 * (2 * q.numel() + k.numel() + v.numel())
    into = torch.randn_like(q)
    modes: dict[str, tuple[Callable[[Work], Work], float]] = {
        "forward": (torch.no_grad(), 1.0),
        "forward+backward": (lambda attend: both_ways(attend, (q, k, v), into), 3.5),
    }
    for mode, (of, times) in modes.items():
        sides = []
        for who, package, make in attends:
            made = lambda make=make, of=of: of(make())  # noqa: E731
            sides += [Side(who, made)] if package is None else peer(package, who, made)
        bench.compare(
            f"attention {mode}, by {kernel} kernel, 2x{half}, {H} heads",
            sides,
            flops=times * flops,
            bytes_moved=times * moved,
        )

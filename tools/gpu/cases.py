"""The comparisons with a reference: every op of megatron_ring/kernels, its options, the paper's sizes and odd
ones.

Legend: T tokens, N rows, D model width, F expert width, E experts, K experts per token, G key heads, R query heads of each,
C channels per head, V vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ring.kernels import (
    HeadNorms,
    combine,
    decode_attention,
    dispatch,
    expert_mlp,
    grouped_gemm,
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
from tools.gpu.firm import firm_logits, firm_uniforms
from tools.gpu.shapes import expert_ends

BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. ``op(*leaves, *fixed)`` returns tensors; those at ``differentiated`` are differentiated.

    It names the ops of megatron_ring where it is called: for the reference they are plain.py's.
    """

    name: str
    op: Callable[..., Any]
    leaves: Sequence[Tensor]
    fixed: Sequence[Tensor] = ()
    differentiated: Sequence[int] = ()
    tolerance: float = 8e-3
    """Bound of the norm of the difference over the norm; bf16 rounds to 2^-8."""
    repeatable: bool = True
    reference: Callable[..., Any] | None = field(default=None)
    """The reference, in fp64; by default ``op`` on plain.py's ops."""
    starts_kernels: bool = True
    """Kernels of ours; greedy sampling and flash attention are torch's."""


class Maker:
    """Random inputs on one device, the same for one seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 11):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self.device)

    def firm_logits(self, logits_TE: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        return firm_logits(logits_TE, choose)

    def firm_uniforms(self, logits_SV: Tensor, words: dict[str, Any]) -> Tensor:
        draw = partial(self.uniform, len(logits_SV), dtype=torch.float64)
        return firm_uniforms(logits_SV, draw, words)

    def angles(self, tokens: int, half: int) -> Tensor:
        turns = self.uniform(tokens, half) * 6
        return torch.stack((turns.cos(), turns.sin()))


def products(make: Maker, rows: int, D: int, F: int, experts: int, skewed: bool) -> list[Case]:
    """The experts' products and the whole network of them."""
    offsets_e = expert_ends(rows, experts, make.device, skewed=skewed, left_over=5 * skewed)
    x_ND = make.normal(rows, D)
    up_e2FD = make.normal(experts, 2, F, D, scale=D**-0.5)
    down_eDF = make.normal(experts, D, F, scale=F**-0.5)
    size = f"{rows}x{D}x{F}, {experts} experts{', skewed' if skewed else ''}"
    loose = 1.5 if make.dtype == BF16 else 1.0
    tolerance = 8e-3 if make.dtype == BF16 else 1e-5
    return [
        Case(name=f"grouped_gemm {size}", op=lambda x, w, ends: grouped_gemm(x, w, ends),
             leaves=[x_ND, up_e2FD.flatten(1, 2)], fixed=[offsets_e], differentiated=[0], tolerance=tolerance),
        # values are rounded between the products, but not in the reference
        Case(name=f"expert_mlp {size}", op=lambda x, up, down, p, ends: expert_mlp(x, up, down, ends, p),
             leaves=[x_ND, up_e2FD, down_eDF, make.uniform(rows)], fixed=[offsets_e], differentiated=[0],
             tolerance=loose * tolerance),
        Case(name=f"expert_mlp {size}, no weights of rows",
             op=lambda x, up, down, ends: expert_mlp(x, up, down, ends), leaves=[x_ND, up_e2FD, down_eDF],
             fixed=[offsets_e], differentiated=[0], tolerance=loose * tolerance),
    ]  # fmt: skip


def accumulated(make: Maker, rows: int, D: int, F: int, experts: int) -> list[Case]:
    """Weight gradients that are added in fp32 to an existing buffer; the outputs are the sums and the other
    gradients."""
    offsets_e = expert_ends(rows, experts, make.device, skewed=True)
    fp32 = torch.float32
    x_ND, p_N = make.normal(rows, D), make.uniform(rows)
    up_e2FD, down_eDF = (
        make.normal(experts, 2, F, D, scale=D**-0.5),
        make.normal(experts, D, F, scale=F**-0.5),
    )
    mains = [make.normal(*w.shape, dtype=fp32) for w in (up_e2FD, down_eDF)]
    dy_ND, dy_NF = (make.normal(rows, width, dtype=BF16).to(make.dtype) for width in (D, 2 * F))

    def network(x, up, down, p, ends, dy, main_up, main_down) -> tuple[Tensor, ...]:
        kept = main_up.clone(), main_down.clone()
        expert_mlp(x, up, down, ends, p, main_grads=kept).backward(dy)
        assert up.grad is None and down.grad is None
        return *kept, x.grad, p.grad

    def product(x, w, ends, dy, main) -> tuple[Tensor, ...]:
        kept = main.clone()
        grouped_gemm(x, w, ends, main_grad_eFD=kept).backward(dy)
        return kept, x.grad

    size = f"{rows}x{D}x{F}, {experts} experts"
    fine = 8e-3 if make.dtype == BF16 else 1e-5
    return [
        Case(name=f"expert_mlp {size}, into main_grad", op=network, leaves=[x_ND, up_e2FD, down_eDF, p_N],
             fixed=[offsets_e, dy_ND, *mains], tolerance=1.5 * fine),
        Case(name=f"grouped_gemm {size}, into main_grad", op=product, leaves=[x_ND, up_e2FD.flatten(1, 2)],
             fixed=[offsets_e, dy_NF, mains[0].flatten(1, 2)], tolerance=fine),
    ]  # fmt: skip


def routing(make: Maker, T: int, D: int, E: int, K: int) -> list[Case]:
    """From logits to rows and back."""
    drawn_TE = make.normal(T, E, scale=2.0, dtype=torch.float32)
    bias_E = make.normal(E, scale=0.1, dtype=torch.float32)
    logits_TE = make.firm_logits(drawn_TE, lambda x: route(x, topk=K).experts_TK)
    experts_TK = route(logits_TE, topk=K).experts_TK
    index = route_index(experts_TK, E)

    def sigmoid(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        words = {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2, "scaling_factor": 2.5}
        return tuple(route(logits, topk=K, expert_bias_E=bias, **words))

    grouped_TE = make.firm_logits(drawn_TE, lambda x: sigmoid(x, bias_E.double())[1])
    fine = 8e-3 if make.dtype == BF16 else 1e-5
    x_TD, y_ND, weights_TK = make.normal(T, D), make.normal(T * K, D), make.uniform(T, K)
    return [
        Case(name=f"route {T}x{E} top-{K}", op=lambda x: tuple(route(x, topk=K)), leaves=[logits_TE],
             differentiated=[0, 3, 4], tolerance=1e-4),
        Case(name=f"route {T}x{E} sigmoid, groups, bias", op=sigmoid, leaves=[grouped_TE], fixed=[bias_E],
             differentiated=[0, 3, 4], tolerance=1e-4),
        Case(name=f"route_index {T}x{K}", op=lambda ids: tuple(route_index(ids, E)), leaves=[experts_TK]),
        Case(name=f"permute {T}x{D} x{K}", op=lambda x: permute(x, index), leaves=[x_TD], differentiated=[0],
             tolerance=fine),
        Case(name=f"combine {T}x{D} x{K}", op=lambda y, w: combine(y, index, w), leaves=[y_ND, weights_TK],
             differentiated=[0], tolerance=fine),
    ]  # fmt: skip


def dropping(make: Maker, T: int, D: int, E: int, K: int) -> list[Case]:
    """Padding, recorded experts, one expert per token, dropped slots."""
    drawn_TE = make.normal(T, E, scale=2.0, dtype=torch.float32)
    logits_TE = make.firm_logits(drawn_TE, lambda x: route(x, topk=K).experts_TK)
    single_TE = make.firm_logits(drawn_TE, lambda x: route(x, topk=1).experts_TK)
    x_TD, y_ND, weights_TK = make.normal(T, D), make.normal(T * K, D), make.uniform(T, K)
    valid_T = make.integers(3, T) > 0
    # expert E does not exist: the slot is dropped
    replay_TK = torch.stack([make.integers(E + 1, T) for _ in range(K)], 1)
    index = route_index(replay_TK, E)
    fine = 8e-3 if make.dtype == BF16 else 1e-5

    def padded(logits: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        return tuple(route(logits, topk=K, valid_T=valid))

    def replayed(logits: Tensor, valid: Tensor, replay: Tensor) -> tuple[Tensor, ...]:
        words = {"score_function": "sigmoid", "valid_T": valid, "replay_TK": replay}
        return tuple(route(logits, topk=K, **words))

    def one(logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(route(logits, topk=1, scaling_factor=2.5))

    return [
        Case(name=f"route {T}x{E} top-{K}, padding", op=padded, leaves=[logits_TE], fixed=[valid_T],
             differentiated=[0, 3, 4], tolerance=1e-4),
        Case(name=f"route {T}x{E} top-{K}, replayed", op=replayed, leaves=[logits_TE], fixed=[valid_T, replay_TK],
             differentiated=[0, 3, 4], tolerance=1e-4),
        Case(name=f"route {T}x{E} top-1", op=one, leaves=[single_TE], differentiated=[0, 3, 4], tolerance=1e-4),
        Case(name=f"route_index {T}x{K}, slots dropped", op=lambda ids: tuple(route_index(ids, E)), leaves=[replay_TK]),
        Case(name=f"permute {T}x{D} x{K}, slots dropped", op=lambda x: permute(x, index), leaves=[x_TD],
             differentiated=[0], tolerance=fine),
        Case(name=f"combine {T}x{D} x{K}, slots dropped", op=lambda y, w: combine(y, index, w),
             leaves=[y_ND, weights_TK], differentiated=[0], tolerance=fine),
        Case(name=f"combine {T}x{D} x{K}, no weights", op=lambda y: combine(y, index), leaves=[y_ND],
             differentiated=[0], tolerance=fine),
    ]  # fmt: skip


def rows(make: Maker, T: int, D: int, G: int, R: int, C: int) -> list[Case]:
    """Norms and rotations."""
    fine = 8e-3 if make.dtype == BF16 else 1e-5
    mixed_TGMC, rotary_2TH = make.normal(T, G, R + 2, C), make.angles(T, C // 2)
    weights = [make.normal(C), make.normal(C)]
    return [
        Case(name=f"rms_norm {T}x{D}", op=lambda x, w: rms_norm(x, w, 1e-6), leaves=[make.normal(T, D), make.normal(D)],
             differentiated=[0], tolerance=fine),
        Case(name=f"qk_norm_rope {T}x{G}x{R + 2}x{C}", op=lambda mixed, rotary: qk_norm_rope(mixed, rotary),
             leaves=[mixed_TGMC], fixed=[rotary_2TH], differentiated=[0, 1], tolerance=fine),
        Case(name=f"qk_norm_rope {T}x{G}x{R + 2}x{C}, norms",
             op=lambda mixed, q, k, rotary: qk_norm_rope(mixed, rotary, HeadNorms(q, k, 1e-6)),
             leaves=[mixed_TGMC, *weights], fixed=[rotary_2TH], differentiated=[0, 1], tolerance=2 * fine),
        Case(name=f"qk_norm_rope {T}x{G}x{R + 2}x{C}, half rotated, norms",
             op=lambda mixed, q, k, rotary: qk_norm_rope(mixed, rotary, HeadNorms(q, k, 1e-6)),
             leaves=[mixed_TGMC, *weights], fixed=[make.angles(T, C // 4)], differentiated=[0, 1, 2],
             tolerance=2 * fine),
    ]  # fmt: skip


def logprobs(make: Maker, T: int, V: int, temperature: float) -> list[Case]:
    """The head's log p and entropy; the last column is padding."""

    def op(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return tuple(token_logprob(logits, targets, temperature=temperature, vocab_size=V - 1))

    def shard(logits: Tensor, targets: Tensor) -> Tensor:
        # one of several shards of a vocabulary; some targets are in another shard, some are ignored
        words = {"vocab_start": V, "with_entropy": False, "inplace_backward": True}
        return token_logprob(logits, targets, temperature=temperature, **words)[0]

    elsewhere_T = make.integers(2 * V, T)
    elsewhere_T[::3] = -100
    return [
        Case(name=f"token_logprob {T}x{V} at {temperature}", op=op, leaves=[make.normal(T, V, scale=3.0)],
             fixed=[make.integers(V - 1, T)], differentiated=[0, 1], tolerance=1e-2 if make.dtype == BF16 else 1e-5),
        Case(name=f"token_logprob {T}x{V} at {temperature}, a shard, in place", op=shard,
             leaves=[make.normal(T, V, scale=3.0)], fixed=[elsewhere_T], differentiated=[0],
             tolerance=1e-2 if make.dtype == BF16 else 1e-5),
    ]  # fmt: skip


def decoding(make: Maker, S: int, context: int, V: int) -> list[Case]:
    """One token of each sequence: attention over the cache, and sampling."""
    G, R, C = 4, 4, 128
    keys, values = make.normal(S + 1, context, G, C), make.normal(S + 1, context, G, C)

    fixed = [make.angles(S, C // 2), torch.arange(S, device=make.device), make.integers(context, S)]
    halved = [make.angles(S, C // 4), *fixed[1:]]

    def attend(mixed, keys, values, rotary, slots, positions, *weights) -> tuple[Tensor, ...]:
        # the cache is written to
        caches = keys.detach().clone(), values.detach().clone()
        norms = HeadNorms(*weights, 1e-6) if weights else None
        out = decode_attention(mixed.detach(), rotary, *caches, slots, positions, C**-0.5, norms)
        return out, *(cache[slots, positions] for cache in caches)

    leaves = [make.normal(S, G, R + 2, C), keys, values]
    fine = 1e-2 if make.dtype == BF16 else 1e-5
    cases = [
        Case(name=f"decode_attention {S} over {context}", op=attend, leaves=leaves, fixed=fixed, tolerance=fine),
        Case(name=f"decode_attention {S} over {context}, half rotated, norms", op=attend, leaves=leaves,
             fixed=[*halved, make.normal(C), make.normal(C)], tolerance=2 * fine),
    ]  # fmt: skip
    logits_SV = make.normal(S, V, scale=3.0)
    for words in ({}, {"top_k": 50}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}):
        cases.append(
            Case(
                name=f"sample_token {S}x{V} {words or ''}",
                op=lambda logits, uniforms, words=words: sample_token(logits.detach(), uniforms, **words),
                leaves=[logits_SV],
                fixed=[make.firm_uniforms(logits_SV, words)],
                tolerance=1e-4,
                starts_kernels=words.get("temperature") != 0.0,
            )
        )
    return cases


def attention(make: Maker, lengths: tuple[int, ...]) -> list[Case]:
    """Flash attention over segments, whose backward pass adds in any order; on a CPU there is none."""
    if make.device != "cuda" or make.dtype != BF16:
        return []
    H, G, C, T = 16, 4, 128, sum(lengths)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=make.device)
    packed = PackedInputs(
        qkv_format="thd", cu_seqlens_q=ends, max_seqlen_q=max(lengths), segment_lengths=lengths
    )
    return [
        Case(name=f"attention {T}x{H}x{C} in {len(lengths)} segments", leaves=[make.normal(T, n, C) for n in (H, G, G)],
             op=lambda q, k, v: varlen_attention(q, k, v, packed, C**-0.5), differentiated=[0], tolerance=1.5e-2,
             reference=lambda q, k, v: segment_attention(q, k, v, lengths, C**-0.5), starts_kernels=False,
             repeatable=False),
    ]  # fmt: skip


def cases(make: Maker, small: bool) -> Iterator[Case]:
    """All of them, the smallest first; in fp32 without the microbatch of 49,152 rows."""
    kind = str(make.dtype).removeprefix("torch.")
    for each in _small(make) if small else (*_small(make), *_large(make)):
        # a wrong kernel must not produce the inputs of the others
        with dispatch.force("torch"):
            made = each()
        for case in made:
            yield replace(case, name=f"{case.name}, {kind}")


def _small(make: Maker) -> list[Callable[[], list[Case]]]:
    made = [
        partial(products, make, *size)
        for size in ((1, 8, 8, 1, False), (133, 40, 24, 3, True), (300, 264, 136, 8, True))
    ]
    made += [partial(accumulated, make, 133, 40, 24, 3), partial(dropping, make, 37, 136, 8, 2)]
    for T in (1, 5, 37):
        made += [partial(routing, make, T, 136, 8, 2), partial(rows, make, T, 136, 2, 2, 64)]
    made += [partial(logprobs, make, 5, 4099, 0.7), partial(decoding, make, 5, 70, 4099)]
    return [*made, partial(attention, make, (1, 5, 64))]


def _large(make: Maker) -> list[Callable[[], list[Case]]]:
    made = [
        partial(products, make, *size)
        for size in (
            (1536, 2048, 1408, 64, True),
            (6, 2048, 1408, 64, False),
            (1000, 2048, 512, 256, True),
            (4097, 1032, 520, 5, True),
        )
    ]
    made.append(partial(accumulated, make, 1536, 2048, 1408, 64))
    for T, E, K in ((8192, 64, 6), (1000, 256, 8)):
        made += [partial(routing, make, T, 2048, E, K), partial(dropping, make, T, 2048, E, K)]
    made += [partial(rows, make, 8192, 2048, 4, 4, 128), partial(rows, make, 133, 5632, 4, 7, 128)]
    made += [partial(logprobs, make, 2048, 126_464, 1.0), partial(decoding, make, 256, 1024, 126_464)]
    made.append(partial(attention, make, (1, 63, 64, 65, 500, 1024)))
    if make.dtype == BF16:
        made += [
            partial(products, make, 49_152 + 5 * skewed, 2048, 1408, 64, skewed) for skewed in (False, True)
        ]
    return made

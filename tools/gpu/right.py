#!/usr/bin/env python3
"""Every op, forward and backward, beside its reference in fp64 on the same device; twice, and equal bit for bit.

    python tools/gpu/right.py OUT            the paper's sizes and odd ones; exit code 1 for what is wrong
    python tools/gpu/right.py OUT --small    small ones only, for compute-sanitizer and a CPU

Legend: T tokens, N rows, D model width, F expert width, E experts, K experts per token, V vocabulary, S sequences.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
from tools.gpu.results import Results
from tools.gpu.shapes import expert_ends

BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. ``op(*leaves, *fixed)`` gives tensors, of which those at ``differentiated`` are differentiated."""

    name: str
    op: Callable[..., Any]
    leaves: Sequence[Tensor]
    fixed: Sequence[Tensor] = ()
    differentiated: Sequence[int] = ()
    tolerance: float = 8e-3
    """Norm of the difference over the norm: bf16 has 2^-8."""
    repeatable: bool = True
    reference: Callable[..., Any] | None = field(default=None)
    """In place of ``op`` on plain torch in fp64."""


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

    def angles(self, tokens: int, half: int) -> Tensor:
        turns = self.uniform(tokens, half) * 6
        return torch.stack((turns.cos(), turns.sin()))


def check(case: Case, results: Results) -> None:
    """Add the case's row to ``results``, and a line for each thing that is wrong with it."""
    begun = time.perf_counter()
    try:
        first, second = _run(case, wide=False), _run(case, wide=False)
        expected = _run(case, wide=True)
    except Exception as error:
        results.wrong(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    worst = 0.0
    for kind, ours, again, theirs in zip(("output", "gradient"), first, second, expected, strict=True):
        for index, (one, two, true) in enumerate(zip(ours, again, theirs, strict=True)):
            what = f"{case.name}: {kind} {index}"
            if case.repeatable and not torch.equal(one.nan_to_num(), two.nan_to_num()):
                results.wrong(f"{what}: two runs differ")
            if not one.is_floating_point():
                if not torch.equal(one, true.to(one.dtype)):
                    results.wrong(f"{what}: {int((one != true).sum())} of {one.numel()} integers differ")
                continue
            gap = float((one.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))
            worst = max(worst, gap if gap == gap else float("inf"))
            if not gap < case.tolerance:
                results.wrong(f"{what}: relative error {gap:.2e}, at most {case.tolerance:.2e}")
    results.row(name=case.name, error=worst, seconds=round(time.perf_counter() - begun, 2))


def _run(case: Case, wide: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the leaves); ``wide``: of the reference in fp64, on the same values."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.double() if wide and tensor.is_floating_point() else tensor

    leaves = [cast(leaf).detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in case.leaves]
    op = case.reference if wide and case.reference is not None else case.op
    with dispatch.force("torch") if wide else dispatch.force(dispatch.backend(leaves[0])):
        made = op(*leaves, *map(cast, case.fixed))
        outputs = [each for each in (made if isinstance(made, tuple) else (made,)) if each is not None]
        return [each.detach() for each in outputs], _gradients(case, outputs, leaves)


def _gradients(case: Case, outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    if not case.differentiated:
        return []
    chosen = [outputs[index] for index in case.differentiated]
    into = []
    for index, output in enumerate(chosen):
        generator = torch.Generator(output.device).manual_seed(5 + index)
        # values that bf16 holds, so that the reference has the same
        into.append(
            torch.randn(output.shape, generator=generator, device=output.device).to(BF16).to(output.dtype)
        )
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(chosen, wanted, into, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


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
        Case(name=f"grouped_gemm {size}", op=grouped_gemm, leaves=[x_ND, up_e2FD.flatten(1, 2)], fixed=[offsets_e],
             differentiated=[0], tolerance=tolerance),
        # between the products values are rounded, which the reference does not do
        Case(name=f"expert_mlp {size}", op=lambda x, up, down, p, ends: expert_mlp(x, up, down, ends, p),
             leaves=[x_ND, up_e2FD, down_eDF, make.uniform(rows)], fixed=[offsets_e], differentiated=[0],
             tolerance=loose * tolerance),
    ]  # fmt: skip


def routing(make: Maker, T: int, D: int, E: int, K: int) -> list[Case]:
    """From logits to rows and back."""
    logits_TE, bias_E = (
        make.normal(T, E, scale=2.0, dtype=torch.float32),
        make.normal(E, scale=0.1, dtype=torch.float32),
    )
    experts_TK = route(logits_TE, topk=K).experts_TK
    index = route_index(experts_TK, E)

    def sigmoid(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        words = {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2, "scaling_factor": 2.5}
        return tuple(route(logits, topk=K, expert_bias_E=bias, **words))

    fine = 8e-3 if make.dtype == BF16 else 1e-5
    x_TD, y_ND, weights_TK = make.normal(T, D), make.normal(T * K, D), make.uniform(T, K)
    return [
        Case(name=f"route {T}x{E} top-{K}", op=lambda x: tuple(route(x, topk=K)), leaves=[logits_TE],
             differentiated=[0, 3, 4], tolerance=1e-4),
        Case(name=f"route {T}x{E} sigmoid, groups, bias", op=sigmoid, leaves=[logits_TE], fixed=[bias_E],
             differentiated=[0, 3, 4], tolerance=1e-4),
        Case(name=f"route_index {T}x{K}", op=lambda ids: tuple(route_index(ids, E)), leaves=[experts_TK]),
        Case(name=f"permute {T}x{D} x{K}", op=lambda x: permute(x, index), leaves=[x_TD], differentiated=[0],
             tolerance=fine),
        Case(name=f"combine {T}x{D} x{K}", op=lambda y, w: combine(y, index, w), leaves=[y_ND, weights_TK],
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
    ]  # fmt: skip


def logprobs(make: Maker, T: int, V: int, temperature: float) -> list[Case]:
    """The head's log p and entropy; the last column is padding."""

    def op(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return tuple(token_logprob(logits, targets, temperature=temperature, vocab_size=V - 1))

    return [
        Case(name=f"token_logprob {T}x{V} at {temperature}", op=op, leaves=[make.normal(T, V, scale=3.0)],
             fixed=[make.integers(V - 1, T)], differentiated=[0, 1], tolerance=1e-2 if make.dtype == BF16 else 1e-5),
    ]  # fmt: skip


def decoding(make: Maker, S: int, context: int, V: int) -> list[Case]:
    """One token of each sequence: attention over the cache, and the draw."""
    G, R, C = 4, 4, 128
    keys, values = make.normal(S + 1, context, G, C), make.normal(S + 1, context, G, C)

    def attend(mixed: Tensor, keys: Tensor, values: Tensor, *fixed: Tensor) -> Tensor:
        rotary, slots, positions = fixed
        # the cache is written to
        caches = keys.detach().clone(), values.detach().clone()
        return decode_attention(mixed.detach(), rotary, *caches, slots, positions, C**-0.5)

    cases = [
        Case(name=f"decode_attention {S} over {context}", op=attend, leaves=[make.normal(S, G, R + 2, C), keys, values],
             fixed=[make.angles(S, C // 2), torch.arange(S, device=make.device), make.integers(context, S)],
             tolerance=1e-2 if make.dtype == BF16 else 1e-5),
    ]  # fmt: skip
    logits_SV, uniforms_S = make.normal(S, V, scale=3.0), make.uniform(S, dtype=torch.float64)
    for words in ({}, {"top_k": 50}, {"temperature": 0.7, "top_p": 0.9}):
        cases.append(
            Case(
                name=f"sample_token {S}x{V} {words or ''}",
                op=lambda logits, uniforms, words=words: sample_token(logits.detach(), uniforms, **words),
                leaves=[logits_SV],
                fixed=[uniforms_S],
                tolerance=1e-4,
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
             reference=lambda q, k, v: segment_attention(q, k, v, lengths, C**-0.5), repeatable=False),
    ]  # fmt: skip


def cases(make: Maker, small: bool) -> list[Case]:
    """All of them, the smallest first."""
    found: list[Case] = []
    for size in ((1, 8, 8, 1, False), (133, 40, 24, 3, True), (300, 264, 136, 8, True)):
        found += products(make, *size)
    for T in (1, 5, 37):
        found += [*routing(make, T, 136, 8, 2), *rows(make, T, 136, 2, 2, 64)]
    found += [*logprobs(make, 5, 4099, 0.7), *decoding(make, 5, 70, 4099), *attention(make, (1, 5, 64))]
    if small:
        return found
    for size in (
        (1536, 2048, 1408, 64, True),
        (6, 2048, 1408, 64, False),
        (1000, 2048, 512, 256, True),
        (4097, 1032, 520, 5, True),
    ):
        found += products(make, *size)
    found += [*routing(make, 8192, 2048, 64, 6), *rows(make, 8192, 2048, 4, 4, 128)]
    found += [*logprobs(make, 2048, 126_464, 1.0), *decoding(make, 256, 1024, 126_464)]
    found += attention(make, (1, 63, 64, 65, 500, 1024))
    for skewed in (False, True):
        found += products(make, 49_152 + 5 * skewed, 2048, 1408, 64, skewed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for right.json")
    parser.add_argument("--small", action="store_true", help="small sizes only")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fp32 is held to fp32's accuracy
    torch.backends.cuda.matmul.allow_tf32 = False
    results = Results(args.out, "right-small" if args.small else "right")
    for dtype in (BF16, torch.float32):
        make = Maker(device, dtype)
        # of fp32 the small sizes: it is what a user debugs with
        for case in cases(make, args.small or dtype == torch.float32):
            check(case, results)
            if device == "cuda":
                torch.cuda.empty_cache()
    results.write()
    print(f"{len(results.rows)} comparisons, {len(results.bad)} wrong", flush=True)
    return 1 if results.bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""The kernels' calls of a training step and of a step of decoding, and odd ones: they are compiled, checked and
timed.

Legend: T tokens, D model width, F expert width, E experts, K experts per token, G key heads, R query heads of each, C
channels per head, V vocabulary, S sequences that are decoded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ring.kernels import (
    HeadNorms,
    combine,
    decode_attention,
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

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """A model's sizes. Example: ``RING_LITE`` is the paper's."""

    D: int
    F: int
    E: int
    K: int
    G: int
    R: int
    C: int
    V: int
    rotated: int
    sigmoid: bool = False
    groups: int = 0
    open_groups: int = 0
    head_norms: bool = False


RING_LITE = Widths(D=2048, F=1408, E=64, K=6, G=4, R=4, C=128, V=126_464, rotated=128)
LING_MINI_2 = Widths(
    D=2048, F=512, E=256, K=8, G=4, R=4, C=128, V=157_184, rotated=64,
    sigmoid=True, groups=8, open_groups=4, head_norms=True,
)  # fmt: skip
ODD = (
    Widths(D=8, F=8, E=1, K=1, G=1, R=1, C=16, V=1, rotated=16),
    Widths(D=40, F=24, E=3, K=2, G=1, R=4, C=64, V=1000, rotated=32, head_norms=True),
    Widths(D=264, F=136, E=8, K=2, G=2, R=1, C=40, V=4097, rotated=20),
    Widths(D=5632, F=64, E=5, K=3, G=4, R=7, C=128, V=4099, rotated=128, head_norms=True),
)
"""Sizes that do not fill blocks; D and F stay multiples of 8, because tensor maps need 16 bytes."""
TRAINING_TOKENS = 8192
DECODED = (256, 255, 241, 100, 17, 16, 3, 2, 1)
ODD_TOKENS = (1, 5, 17, 133)


class Calls:
    """The calls of one set of sizes on empty tensors; a call with gradients ends in its backward pass."""

    def __init__(self, widths: Widths, tokens: int, dtype: torch.dtype, device: str = "cpu"):
        self.widths, self.tokens, self.dtype, self.device = widths, tokens, dtype, device

    def new(self, *shape: int, dtype: torch.dtype | None = None, leaf: bool = True) -> Tensor:
        tensor = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        return tensor.requires_grad_(leaf and torch.is_grad_enabled())

    def layer(self) -> Iterator[tuple[str, Call]]:
        """Forward and, where gradients are on, backward of every op in a layer, and the head."""
        w, T, new = self.widths, self.tokens, self.new
        N = T * w.K
        fp32 = torch.float32 if self.dtype != torch.float64 else self.dtype
        offsets_E = torch.full((w.E,), N, dtype=torch.int32, device=self.device)
        valid_T = torch.ones(T, dtype=torch.bool, device=self.device)
        bias_E = new(w.E, dtype=fp32, leaf=False) if w.sigmoid else None
        score = "sigmoid" if w.sigmoid else "softmax"
        norms = HeadNorms(new(w.C), new(w.C), 1e-6) if w.head_norms else None

        def routed(**options: object) -> object:
            routing = route(
                new(T, w.E, dtype=fp32), topk=w.K, score_function=score, expert_bias_E=bias_E,
                num_groups=w.groups, group_topk=w.open_groups, **options,
            )  # fmt: skip
            return routing.probs_TK, routing.prob_sum_E, routing.z_sum

        def index():
            return route_index(torch.zeros(T, w.K, dtype=torch.int64, device=self.device), w.E)

        def experts(**options: object) -> object:
            return expert_mlp(
                new(N, w.D),
                new(w.E, 2, w.F, w.D),
                new(w.E, w.D, w.F),
                offsets_E,
                new(N, dtype=fp32),
                **options,
            )

        yield "rms_norm", lambda: rms_norm(new(T, w.D), new(w.D))
        yield (
            "qk_norm_rope",
            lambda: qk_norm_rope(
                new(T, w.G, w.R + 2, w.C), new(2, T, w.rotated // 2, dtype=fp32, leaf=False), norms
            ),
        )
        yield "route", lambda: routed(valid_T=valid_T)
        yield "route_index", index
        yield "permute", lambda: permute(new(T, w.D), index())
        yield "expert_mlp", experts
        yield "combine", lambda: combine(new(N, w.D), index())
        if torch.is_grad_enabled():
            main = new(w.E, 2, w.F, w.D, dtype=fp32, leaf=False), new(w.E, w.D, w.F, dtype=fp32, leaf=False)
            yield "expert_mlp into main_grad", lambda: experts(main_grads=main)
            yield "grouped_gemm", lambda: grouped_gemm(new(N, w.D), new(w.E, w.F, w.D), offsets_E)
            replay_TK = torch.zeros(T, w.K, dtype=torch.int64, device=self.device)
            yield "route, replayed", lambda: routed(valid_T=valid_T, replay_TK=replay_TK)
            yield "token_logprob", self.logprob
            yield "token_logprob, in place", lambda: self.logprob(inplace_backward=True, with_entropy=False)

    def logprob(self, **options: bool) -> object:
        targets_T = torch.zeros(self.tokens, dtype=torch.int64, device=self.device)
        return token_logprob(self.new(self.tokens, self.widths.V), targets_T, **options)

    def decoding(self, context: int = 1024) -> Iterator[tuple[str, Call]]:
        """What generation adds to :meth:`layer` without gradients."""
        w, S = self.widths, self.tokens
        fp32 = torch.float32 if self.dtype != torch.float64 else self.dtype
        norms = HeadNorms(self.new(w.C), self.new(w.C), 1e-6) if w.head_norms else None
        keys, values = (self.new(S + 1, context, w.G, w.C, leaf=False) for _ in range(2))
        rows_T = torch.arange(S, device=self.device)
        yield "decode_attention", lambda: decode_attention(
            self.new(S, w.G, w.R + 2, w.C), self.new(2, S, w.rotated // 2, dtype=fp32), keys, values,
            rows_T, torch.zeros_like(rows_T), w.C**-0.5, norms,
        )  # fmt: skip
        uniform_T = torch.zeros(S, dtype=torch.float64, device=self.device)
        for top_k in (0, min(20, w.V)):
            yield "sample_token", lambda top_k=top_k: sample_token(self.new(S, w.V), uniform_T, top_k=top_k)


def expert_ends(rows: int, experts: int, device: str, *, skewed: bool, left_over: int = 0) -> Tensor:
    """Where each expert's rows end (int32); skewed: some have few or none. The last ``left_over`` rows have no
    expert.

    Example: ``expert_ends(6, 3, "cpu", skewed=False).tolist() == [2, 4, 6]``.
    """
    if not skewed:
        return (torch.arange(1, experts + 1) * (rows // experts)).int().to(device)
    generator = torch.Generator().manual_seed(3)
    shares = torch.softmax(torch.randn(experts, generator=generator) * 1.5, 0)
    shares[:: max(experts // 4, 2)] = 0
    drawn = torch.multinomial(shares, rows - left_over, replacement=True, generator=generator)
    return drawn.bincount(minlength=experts).cumsum(0).int().to(device)


def training(
    widths: Widths, tokens: int, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, Call]]:
    """Every op of a training step with its backward pass."""
    for name, call in Calls(widths, tokens, dtype, device).layer():
        yield name, lambda call=call: _backward(call())


def decoding(
    widths: Widths, sequences: int, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, Call]]:
    """Every op of a step of generation."""
    with torch.no_grad():
        calls = Calls(widths, sequences, dtype, device)
        for name, call in (*calls.layer(), *calls.decoding()):
            yield name, torch.no_grad()(call)


def _backward(outputs: object) -> None:
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    differentiable = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]
    torch.autograd.backward(differentiable, [torch.empty_like(tensor) for tensor in differentiable])

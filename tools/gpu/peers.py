"""Calls of other packages that do what the kernels do, if they are installed, by their public API.

Written from the sources of Transformer Engine 2.18, Liger 0.8.2 and flash-attn 2.8.4. Each function returns
sides for :meth:`tools.gpu.bench.Bench.compare`; none for a package that is not installed.

Legend: T tokens, N rows, D model width, F width, E experts, K experts per token, V vocabulary, H heads, C channels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.gpu.bench import BF16, Side, Work, peer

TE, LIGER = "transformer_engine", "liger_kernel"
# Triton's autotuning would take longer than everything that is timed; Liger reads this when it is imported
os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")


@contextlib.contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, sizes: list[int], dy_NF: Tensor | None = None) -> list[Side]:
    """Transformer Engine's GroupedLinear, on cuBLAS streams and on CUTLASS; with ``dy_NF`` all gradients too."""

    def made(cutlass: str) -> Callable[[], Work]:
        def make() -> Work:
            from transformer_engine.pytorch import GroupedLinear

            E, width, D = w_EFD.shape
            layer = GroupedLinear(E, D, width, bias=False, params_dtype=BF16, device="cuda")
            weights = [getattr(layer, f"weight{expert}") for expert in range(E)]
            with torch.no_grad():
                for weight, given_FD in zip(weights, w_EFD, strict=True):
                    weight.copy_(given_FD)

            def forward() -> Tensor:
                with torch.no_grad(), _setting("NVTE_USE_CUTLASS_GROUPED_GEMM", cutlass):
                    return layer(x_ND, sizes)

            def both() -> Sequence[Tensor]:
                with _setting("NVTE_USE_CUTLASS_GROUPED_GEMM", cutlass):
                    return torch.autograd.grad(layer(x_ND, sizes), (x_ND, *weights), dy_NF)

            return forward if dy_NF is None else both

        return make

    def seen(found: Any) -> list[Tensor]:
        return [found] if dy_NF is None else [found[0], torch.stack(found[1:])]

    return [
        *peer(TE, "Transformer Engine, cuBLAS", made("0"), seen),
        *peer(TE, "Transformer Engine, CUTLASS", made("1"), seen),
    ]


def moe_experts(run: Callable[[Callable[..., Tensor]], Work]) -> list[Side]:
    """Liger's fused experts; ``run(experts)`` makes the work of ``experts(x_TD, up_E2FD, down_EDF, ids_TK, probs_TK)``."""

    def make() -> Work:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        def experts(x_TD: Tensor, up: Tensor, down: Tensor, ids_TK: Tensor, probs_TK: Tensor) -> Tensor:
            return LigerFusedMoEFunction.apply(x_TD, up.flatten(1, 2), down, ids_TK.int(), probs_TK)

        return run(experts)

    tuned = os.environ["LIGER_FUSED_MOE_AUTOTUNE"] != "0"
    return peer(LIGER, f"Liger, {'tuned' if tuned else 'not tuned'}", make)


def router(logits_TE: Tensor, ids_TK: Tensor, into_TK: Tensor | None = None) -> list[Side]:
    """Transformer Engine's fused top-k, without statistics; with ``into_TK`` the gradient of the logits too."""

    def make() -> Work:
        from transformer_engine.pytorch.router import fused_topk_with_score_function

        K = ids_TK.shape[1]

        def forward() -> Tensor:
            # softmax after the choice, so that the weights sum to 1, as ours do
            return fused_topk_with_score_function(logits_TE, K, False, None, None, None, "softmax", None)[0]

        if into_TK is None:
            return torch.no_grad()(forward)
        into_TE = torch.zeros_like(logits_TE).scatter(1, ids_TK, into_TK)
        return lambda: torch.autograd.grad(forward(), logits_TE, into_TE)

    def seen(found: Any) -> list[Tensor]:
        return [found.gather(1, ids_TK)] if into_TK is None else list(found)

    return peer(TE, "Transformer Engine (no statistics)", make, seen)


def permuted(x_TD: Tensor, ids_TK: Tensor, into_ND: Tensor | None = None) -> list[Side]:
    """Transformer Engine's permutation, which sorts as well."""

    def make() -> Work:
        from transformer_engine.pytorch import moe_permute

        ids = ids_TK.int()
        count = ids.numel()

        def forward() -> Tensor:
            return moe_permute(x_TD, ids, count, -1, "index")[0]

        if into_ND is None:
            return torch.no_grad()(forward)
        return lambda: torch.autograd.grad(forward(), x_TD, into_ND)

    return peer(TE, "Transformer Engine (sorts too)", make)


def combined(y_ND: Tensor, x_TD: Tensor, ids_TK: Tensor, into_TD: Tensor | None = None) -> list[Side]:
    """Transformer Engine's unpermute, which needs weights: here all are 1."""

    def make() -> Work:
        from transformer_engine.pytorch import moe_permute, moe_unpermute

        with torch.no_grad():
            rows = moe_permute(x_TD, ids_TK.int(), ids_TK.numel(), -1, "index")[1]
        ones_TK = torch.ones(ids_TK.shape, device=x_TD.device)

        def forward() -> Tensor:
            return moe_unpermute(y_ND, rows, ones_TK, map_type="index")

        if into_TD is None:
            return torch.no_grad()(forward)
        return lambda: torch.autograd.grad(forward(), y_ND, into_TD)

    return peer(TE, "Transformer Engine (weighs too)", make)


def norm(x_TD: Tensor, weight_D: Tensor, eps: float, into_TD: Tensor | None = None) -> list[Side]:
    """Liger's and Transformer Engine's RMSNorm; with ``into_TD`` both gradients too."""

    def timed(apply: Callable[[], Tensor], weight: Tensor) -> Work:
        if into_TD is None:
            return torch.no_grad()(apply)
        return lambda: torch.autograd.grad(apply(), (x_TD, weight), into_TD)

    def liger() -> Work:
        from liger_kernel.transformers.functional import liger_rms_norm

        # in place it would overwrite the gradient that all sides share
        return timed(lambda: liger_rms_norm(x_TD, weight_D, eps, in_place=False), weight_D)

    def transformer_engine() -> Work:
        from transformer_engine.pytorch import RMSNorm

        layer = RMSNorm(weight_D.numel(), eps=eps).to(x_TD.device, x_TD.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight_D)
        return timed(lambda: layer(x_TD), layer.weight)

    return [*peer(LIGER, "Liger", liger), *peer(TE, "Transformer Engine", transformer_engine)]


def qk_norm_rope(mixed_TGMC: Tensor, rotary_2TH: Tensor, norms: Any, into: Any = None) -> list[Side]:
    """Liger's RMSNorm of each head and its rotation, and a copy of the values."""

    def make() -> Work:
        from liger_kernel.transformers.functional import liger_rms_norm, liger_rope

        R, C = mixed_TGMC.shape[2] - 2, mixed_TGMC.shape[3]
        cos, sin = rotary_2TH.repeat(1, 1, 2)[:, None]
        # the rotation's backward pass overwrites the gradients that it is given
        own = None if into is None else [each.clone() for each in into]

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            q = liger_rms_norm(
                mixed_TGMC[:, :, :R].reshape(-1, C), norms.q_weight_C, norms.eps, in_place=False
            )
            k = liger_rms_norm(
                mixed_TGMC[:, :, R].reshape(-1, C), norms.k_weight_C, norms.eps, in_place=False
            )
            T = mixed_TGMC.shape[0]
            q, k = (each.view(1, T, -1, C).transpose(1, 2) for each in (q, k))
            q, k = (each.transpose(1, 2)[0] for each in liger_rope(q, k, cos, sin))
            return q, k, mixed_TGMC[:, :, -1].contiguous()

        if own is None:
            return torch.no_grad()(forward)
        leaves = (mixed_TGMC, norms.q_weight_C, norms.k_weight_C)
        return lambda: torch.autograd.grad(forward(), leaves, own)

    return peer(LIGER, "Liger (norm, then rope)", make)


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> list[Side]:
    """Loss and gradient of Liger's cross entropy, which writes over the logits, and of Transformer Engine's, which does
    in early versions and keeps a gradient in fp32 in late ones.
    """

    def liger() -> Work:
        from liger_kernel.transformers.functional import liger_cross_entropy

        own_TV = logits_TV.detach().clone().requires_grad_()

        def work() -> tuple[Tensor, Tensor]:
            loss = liger_cross_entropy(own_TV, targets_T, reduction="sum")
            return loss, torch.autograd.grad(loss, own_TV)[0]

        return work

    def transformer_engine() -> Work:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        own_1TV = logits_TV.detach().clone()[None].requires_grad_()

        def work() -> tuple[Tensor, Tensor]:
            # the mean: with a loss per token another pass would multiply it into the gradient
            loss = parallel_cross_entropy(own_1TV, targets_T[None], 0.0, True, None)
            return loss, torch.autograd.grad(loss, own_1TV)[0]

        return work

    T = targets_T.numel()
    return [
        *peer(LIGER, "Liger (in place)", liger),
        *peer(
            TE,
            "Transformer Engine",
            transformer_engine,
            lambda found: [found[0] * T, found[1].squeeze(0) * T],
        ),
    ]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float) -> list[tuple]:
    """(who, package, make) of flash-attn 2 and 3; what ``make`` returns attends causally within segments."""

    def two() -> Work:
        from flash_attn import flash_attn_varlen_func

        return lambda: flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True
        )

    def three() -> Work:
        from flash_attn_interface import flash_attn_varlen_func

        def attend() -> Tensor:
            found = flash_attn_varlen_func(
                q, k, v, ends, ends, longest, longest, softmax_scale=scale, causal=True
            )
            # early versions return the log sums too
            return found[0] if isinstance(found, tuple) else found

        return attend

    return [("flash-attn 2", "flash_attn", two), ("flash-attn 3", "flash_attn_interface", three)]


def flash_decoding(
    qkv: tuple[Tensor, Tensor, Tensor], caches: tuple[Tensor, Tensor], rotary_2LH: Tensor, at: tuple[Tensor, Tensor],
    scale: float,
) -> list[Side]:  # fmt: skip
    """flash-attn's step of decoding: rotate, write into the cache and attend, at ``at`` = (slots, positions)."""

    def make() -> Work:
        from flash_attn import flash_attn_with_kvcache

        q, k, v = (each[:, None] for each in qkv)
        cos, sin = rotary_2LH.to(q.dtype)
        slots, positions = (each.int() for each in at)
        return lambda: flash_attn_with_kvcache(
            q, *caches, k=k, v=v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=positions, cache_batch_idx=slots,
            softmax_scale=scale, causal=True, rotary_interleaved=False,
        )  # fmt: skip

    return peer("flash_attn", "flash-attn with its cache", make, lambda found: [found.squeeze(1)])

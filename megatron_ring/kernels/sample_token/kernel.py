"""Sampling in Triton; the launcher has the name and signature of its reference.

Legend: T rows, V vocabulary (BV: its block). A program reads its row twice: for the total mass, then for the token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def sample_kernel(
    logits_ptr,
    uniform_ptr,
    threshold_ptr,
    tokens_ptr,
    logp_ptr,
    stride,
    V,
    inverse_temperature,
    BOUNDED: tl.constexpr,
    ACC: tl.constexpr,
    BV: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + t * stride
    lowest = float("-inf")
    if BOUNDED:
        lowest = tl.load(threshold_ptr + t).to(ACC)
    lane = tl.arange(0, BV)
    high = tl.full([], float("-inf"), ACC)
    mass = tl.zeros([], tl.float64)
    allowed = tl.zeros([], tl.float64)
    for start in range(0, V, BV):
        i = start + lane
        x = tl.load(row_ptr + i, mask=i < V, other=float("-inf")).to(ACC)
        top = tl.maximum(high, tl.max(x, 0))
        kept = tl.exp((high - top) * inverse_temperature).to(tl.float64)
        e = tl.exp((x - top) * inverse_temperature).to(tl.float64)
        mass = mass * kept + tl.sum(e, 0)
        allowed = allowed * kept + tl.sum(tl.where(x >= lowest, e, 0.0), 0)
        high = top
    target = tl.load(uniform_ptr + t) * allowed
    before = tl.zeros([], tl.float64)
    taken = tl.full([], V, tl.int32)
    last = tl.zeros([], tl.int32)
    for start in range(0, V, BV):
        i = start + lane
        x = tl.load(row_ptr + i, mask=i < V, other=float("-inf")).to(ACC)
        e = tl.exp((x - high) * inverse_temperature).to(tl.float64)
        e = tl.where((x >= lowest) & (i < V), e, 0.0)
        reached = (before + tl.cumsum(e, 0) > target) & (e > 0)
        taken = tl.minimum(taken, tl.min(tl.where(reached, i, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, i, 0), 0))
        before += tl.sum(e, 0)
    # rounding may leave the total at the target
    taken = tl.where(taken < V, taken, last)
    z = (tl.load(row_ptr + taken).to(ACC) - high) * inverse_temperature
    tl.store(tokens_ptr + t, taken.to(tl.int64))
    tl.store(logp_ptr + t, z - tl.log(mass).to(ACC))


def sample_token(
    logits_TV: Tensor, uniform_T: Tensor, temperature: float, threshold_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, vocabulary = logits_TV.shape
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    tokens_T = torch.empty(tokens, dtype=torch.int64, device=logits_TV.device)
    logp_T = torch.empty(tokens, dtype=wide, device=logits_TV.device)
    if tokens:
        sample_kernel[(tokens,)](
            logits_TV,
            uniform_T.double().contiguous(),
            threshold_T,
            tokens_T,
            logp_T,
            logits_TV.stride(0),
            vocabulary,
            1.0 / temperature,
            BOUNDED=threshold_T is not None,
            ACC=tl.float64 if wide == torch.float64 else tl.float32,
            BV=1024,
            **OPTIONS,
        )
    return tokens_T, logp_T

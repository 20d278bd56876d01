"""One decoding step's attention in Triton; the launcher has the name and signature of its reference.

Legend: T tokens, G key/value heads, R query heads that share one, M = R + 2, C channels per head, S cache rows, L
positions (BR, BL, BC: their blocks), H half of the rotated channels. A program holds one token's R queries and loops
over the positions, so each key and value is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ring.kernels.qk_norm_rope.kernel import qk_norm_rope

# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    rows_ptr,
    positions_ptr,
    scale,
    L,
    G,
    R,
    C,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    t, g = item // G, item % G
    r = tl.arange(0, BR)
    c = tl.arange(0, BC)
    at = (item * R + r[:, None]) * C + c[None, :]
    inside = (r < R)[:, None] & (c < C)[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0).to(ACC)
    last = tl.load(positions_ptr + t)
    base = (tl.load(rows_ptr + t).to(tl.int64) * L * G + g) * C
    high = tl.full([BR], float("-inf"), ACC)
    mass = tl.zeros([BR], ACC)
    context = tl.zeros([BR, BC], ACC)
    for start in range(0, last + 1, BL):
        p = start + tl.arange(0, BL)
        place = base + p.to(tl.int64)[:, None] * (G * C) + c[None, :]
        there = (p <= last)[:, None] & (c < C)[None, :]
        k = tl.load(k_ptr + place, mask=there, other=0.0).to(ACC)
        scores = tl.sum(q[:, None, :] * k[None, :, :], 2) * scale
        scores = tl.where((p <= last)[None, :], scores, float("-inf"))
        top = tl.maximum(high, tl.max(scores, 1))
        kept = tl.exp(high - top)
        weights = tl.exp(scores - top[:, None])
        v = tl.load(v_ptr + place, mask=there, other=0.0).to(ACC)
        context = context * kept[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
        mass = mass * kept + tl.sum(weights, 1)
        high = top
    tl.store(out_ptr + at, (context / mass[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def decode_attention(
    mixed_TGMC: Tensor,
    rotary_2TH: Tensor,
    keys_SLGC: Tensor,
    values_SLGC: Tensor,
    rows_T: Tensor,
    positions_T: Tensor,
    scale: float,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    eps: float,
) -> Tensor:
    T, G, M, C = mixed_TGMC.shape
    R = M - 2
    q_THC, keys_TGC, values_TGC = qk_norm_rope(
        mixed_TGMC.contiguous(), rotary_2TH, q_weight_C, k_weight_C, eps
    )
    keys_SLGC[rows_T, positions_T] = keys_TGC
    values_SLGC[rows_T, positions_T] = values_TGC
    out_THC = torch.empty_like(q_THC)
    padded = triton.next_power_of_2(max(C, 16))
    wide = tl.float64 if q_THC.dtype == torch.float64 else tl.float32
    if T:
        attend_kernel[(T * G,)](
            q_THC,
            keys_SLGC,
            values_SLGC,
            out_THC,
            rows_T.contiguous(),
            positions_T.contiguous(),
            scale,
            keys_SLGC.shape[1],
            G,
            R,
            C,
            ACC=wide,
            BR=triton.next_power_of_2(R),
            BL=16,
            BC=padded,
            **OPTIONS,
        )
    return out_THC

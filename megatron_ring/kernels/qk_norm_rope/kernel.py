"""Head norms and rotary positions in Triton; every launcher has the name and signature of its reference.

Legend: T tokens, G key/value heads, R query heads that share one, M = R + 2 (BM: padded), C channels per head (BC:
padded), H half of the rotated channels. A program holds the heads of one group of one token: an item. Each channel
is loaded together with its rotation partner, which is still in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# programs of the backward pass, each with its own partial sums of the weights' gradients; fixed for determinism
PARTS = 1024


@triton.jit
def _other(c, H):
    """The channel that c is rotated with; c itself if it is not rotated."""
    return tl.where(c < H, c + H, tl.where(c < 2 * H, c - H, c))


@triton.jit
def _angles(rotary_ptr, t, c, tokens, H, ACC: tl.constexpr):
    """cos and signed sin of every channel: in the first half, the partner's term is subtracted."""
    turned = c < 2 * H
    at = t * H + tl.where(c < H, c, c - H)
    cos = tl.load(rotary_ptr + at, mask=turned, other=1.0).to(ACC)
    sin = tl.load(rotary_ptr + tokens * H + at, mask=turned, other=0.0).to(ACC)
    return cos, tl.where(c < H, -sin, sin)


@triton.jit
def _weights(q_weight_ptr, k_weight_ptr, c, is_query, C, ACC: tl.constexpr):
    q_weight = tl.load(q_weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    k_weight = tl.load(k_weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    return tl.where(is_query[:, None], q_weight[None, :], k_weight[None, :])


@triton.jit(do_not_specialize=["tokens"])
def qk_norm_rope_kernel(
    mixed_ptr,
    rotary_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tokens,
    G,
    H,
    R: tl.constexpr,
    C: tl.constexpr,
    eps: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BM)
    c = tl.arange(0, BC)
    partner = _other(c, H)
    row = (item * (R + 2) + m)[:, None] * C
    inside = (m < R + 2)[:, None] & (c < C)[None, :]
    own = tl.load(mixed_ptr + row + c[None, :], mask=inside, other=0.0)
    x = own.to(ACC)
    other = tl.load(mixed_ptr + row + partner[None, :], mask=inside, other=0.0).to(ACC)
    if NORM:
        is_query = m < R
        r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)[:, None]
        x = x * r * _weights(q_weight_ptr, k_weight_ptr, c, is_query, C, ACC)
        other = other * r * _weights(q_weight_ptr, k_weight_ptr, partner, is_query, C, ACC)
        # rounded as a separate norm op would
        x = x.to(own.dtype).to(ACC)
        other = other.to(own.dtype).to(ACC)
    cos, sin = _angles(rotary_ptr, item // G, c, tokens, H, ACC)
    turned = (x * cos[None, :] + other * sin[None, :]).to(own.dtype)
    within = (c < C)[None, :]
    q_at = (item * R + m)[:, None] * C + c[None, :]
    tl.store(q_ptr + q_at, turned, mask=(m < R)[:, None] & within)
    kv_at = item * C + c[None, :] + m[:, None] * 0
    tl.store(k_ptr + kv_at, turned, mask=(m == R)[:, None] & within)
    tl.store(v_ptr + kv_at, own, mask=(m == R + 1)[:, None] & within)


@triton.jit(do_not_specialize=["items", "tokens"])
def qk_norm_rope_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    mixed_ptr,
    rotary_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dmixed_ptr,
    parts_ptr,
    items,
    tokens,
    G,
    H,
    R: tl.constexpr,
    C: tl.constexpr,
    eps: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    m = tl.arange(0, BM)
    c = tl.arange(0, BC)
    partner = _other(c, H)
    within = (c < C)[None, :]
    query = (m < R)[:, None]
    key = (m == R)[:, None]
    value = (m == R + 1)[:, None]
    if NORM:
        weights = _weights(q_weight_ptr, k_weight_ptr, c, m < R, C, ACC)
    dq_weight = tl.zeros([BC], ACC)
    dk_weight = tl.zeros([BC], ACC)
    for index in range(tl.program_id(0), items, tl.num_programs(0)):
        item = tl.zeros([], tl.int64) + index
        q_row = (item * R + m)[:, None] * C
        kv_row = item * C + m[:, None] * 0
        narrow = tl.load(dq_ptr + q_row + c[None, :], mask=query & within, other=0.0)
        dy = narrow.to(ACC) + tl.load(dk_ptr + kv_row + c[None, :], mask=key & within, other=0.0).to(ACC)
        other = tl.load(dq_ptr + q_row + partner[None, :], mask=query & within, other=0.0).to(ACC)
        other += tl.load(dk_ptr + kv_row + partner[None, :], mask=key & within, other=0.0).to(ACC)
        cos, sin = _angles(rotary_ptr, item // G, c, tokens, H, ACC)
        # inverse rotation: the sines change sign
        dx = (dy * cos[None, :] - other * sin[None, :]).to(narrow.dtype).to(ACC)
        at = (item * (R + 2) + m)[:, None] * C + c[None, :]
        if NORM:
            x = tl.load(mixed_ptr + at, mask=(m < R + 1)[:, None] & within, other=0.0).to(ACC)
            r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)[:, None]
            weight_share = dx * x * r
            dq_weight += tl.sum(tl.where(query, weight_share, 0.0), 0)
            dk_weight += tl.sum(tl.where(key, weight_share, 0.0), 0)
            u = dx * weights
            along = tl.sum(u * x, 1)[:, None] / C
            dx = r * (u - x * r * r * along)
        passed = tl.load(dv_ptr + kv_row + c[None, :], mask=value & within, other=0.0)
        out = tl.where(value, passed, dx.to(passed.dtype))
        tl.store(dmixed_ptr + at, out, mask=(m < R + 2)[:, None] & within)
    at = tl.program_id(0) * 2 * C + c
    tl.store(parts_ptr + at, dq_weight, mask=c < C)
    tl.store(parts_ptr + at + C, dk_weight, mask=c < C)


def _shape(mixed_TGMC: Tensor, rotary_2TH: Tensor, norm: bool, eps: float) -> dict:
    T, G, M, C = mixed_TGMC.shape
    wide = tl.float64 if mixed_TGMC.dtype == torch.float64 else tl.float32
    padded = {"BM": triton.next_power_of_2(M), "BC": triton.next_power_of_2(max(C, 16))}
    counts = {"tokens": T, "G": G, "H": rotary_2TH.shape[2]}
    return {**counts, "R": M - 2, "C": C, "eps": eps, "NORM": norm, "ACC": wide, **padded, **OPTIONS}


def qk_norm_rope(
    mixed_TGMC: Tensor, rotary_2TH: Tensor, q_weight_C: Tensor | None, k_weight_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    T, G, M, C = mixed_TGMC.shape
    q_TNC = mixed_TGMC.new_empty((T, G * (M - 2), C))
    k_TGC, v_TGC = mixed_TGMC.new_empty((T, G, C)), mixed_TGMC.new_empty((T, G, C))
    if T:
        norm = q_weight_C is not None
        weights = (q_weight_C.contiguous(), k_weight_C.contiguous()) if norm else (mixed_TGMC, mixed_TGMC)
        shape = _shape(mixed_TGMC, rotary_2TH, norm, eps)
        qk_norm_rope_kernel[(T * G,)](
            mixed_TGMC, rotary_2TH.contiguous(), *weights, q_TNC, k_TGC, v_TGC, **shape
        )
    return q_TNC, k_TGC, v_TGC


def qk_norm_rope_backward(
    dq_TNC: Tensor,
    dk_TGC: Tensor,
    dv_TGC: Tensor,
    mixed_TGMC: Tensor,
    rotary_2TH: Tensor,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    T, G, _, C = mixed_TGMC.shape
    dmixed_TGMC = torch.empty_like(mixed_TGMC)
    parts = min(PARTS, T * G)
    wide = torch.promote_types(mixed_TGMC.dtype, torch.float32)
    parts_P2C = torch.empty((parts, 2, C), dtype=wide, device=mixed_TGMC.device)
    if T:
        norm = q_weight_C is not None
        weights = (q_weight_C.contiguous(), k_weight_C.contiguous()) if norm else (mixed_TGMC, mixed_TGMC)
        shape = _shape(mixed_TGMC, rotary_2TH, norm, eps)
        qk_norm_rope_backward_kernel[(parts,)](
            dq_TNC,
            dk_TGC,
            dv_TGC,
            mixed_TGMC,
            rotary_2TH.contiguous(),
            *weights,
            dmixed_TGMC,
            parts_P2C,
            items=T * G,
            **shape,
        )
    return dmixed_TGMC, parts_P2C.sum(0)

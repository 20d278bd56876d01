"""RMSNorm in Triton; every launcher has the name and signature of its reference.

Legend: T rows, D width (BD: D padded to a power of two). A program holds whole rows, so that each is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# programs of the backward pass, each with its own partial sum of the weight's gradient; fixed for determinism
PARTS = 512


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    r_ptr,
    tokens,
    D,
    eps: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    at = t[:, None] * D + d[None, :]
    inside = (t < tokens)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(ACC)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    y = x * r[:, None] * weight[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(r_ptr + t, r, mask=t < tokens)


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    r_ptr,
    dx_ptr,
    parts_ptr,
    tokens,
    D,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.arange(0, BD)
    lane = tl.arange(0, BT)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(ACC)
    dweight = tl.zeros([BD], ACC)
    for start in range(tl.program_id(0) * BT, tokens, tl.num_programs(0) * BT):
        t = (start + lane).to(tl.int64)
        at = t[:, None] * D + d[None, :]
        inside = (t < tokens)[:, None] & (d < D)[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
        r = tl.load(r_ptr + t, mask=t < tokens, other=0.0).to(ACC)[:, None]
        u = dy * weight[None, :]
        along = tl.sum(u * x, 1)[:, None] / D
        dx = r * (u - x * r * r * along)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += tl.sum(dy * x * r, 0)
    tl.store(parts_ptr + tl.program_id(0) * D + d, dweight, mask=d < D)


def _tile(x_TD: Tensor) -> dict:
    padded = triton.next_power_of_2(max(x_TD.shape[1], 16))
    wide = tl.float64 if x_TD.dtype == torch.float64 else tl.float32
    return {"ACC": wide, "BT": max(1, min(16, 2048 // padded)), "BD": padded}


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    tokens, width = x_TD.shape
    tile = _tile(x_TD)
    y_TD = torch.empty_like(x_TD)
    r_T = x_TD.new_empty(tokens, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    if tokens:
        grid = (triton.cdiv(tokens, tile["BT"]),)
        rms_norm_kernel[grid](
            x_TD, weight_D.contiguous(), y_TD, r_T, tokens, width, eps=eps, **tile, **OPTIONS
        )
    return y_TD, r_T


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, r_T: Tensor) -> tuple[Tensor, Tensor]:
    tokens, width = x_TD.shape
    tile = _tile(x_TD)
    dx_TD = torch.empty_like(x_TD)
    parts = min(PARTS, triton.cdiv(tokens, tile["BT"]))
    parts_PD = torch.empty(parts, width, dtype=r_T.dtype, device=x_TD.device)
    if tokens:
        rms_norm_backward_kernel[(parts,)](
            dy_TD, x_TD, weight_D.contiguous(), r_T, dx_TD, parts_PD, tokens, width, **tile, **OPTIONS
        )
    return dx_TD, parts_PD.sum(0).to(weight_D.dtype)

"""Permute and combine in Triton; every launcher has the name and signature of its reference.

Legend: T tokens, D model width, K experts per token, N = T*K sorted rows. Row numbers are int64 throughout,
so offsets do not wrap however many rows there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["num_rows"])
def permute_kernel(
    x_ptr, gather_ptr, offsets_ptr, out_ptr, num_rows, width, E, BN: tl.constexpr, BD: tl.constexpr
):
    used = tl.load(offsets_ptr + E - 1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(gather_ptr + n, mask=n < used, other=0)
    inside = (n < num_rows)[:, None] & (d < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * width + d[None, :], mask=inside & (n < used)[:, None], other=0.0)
    tl.store(out_ptr + n[:, None] * width + d[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    y_ptr,
    position_ptr,
    weights_ptr,
    out_ptr,
    tokens,
    width,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    total = tl.zeros([BT, BD], ACC)
    for k in tl.static_range(K):
        row = tl.load(position_ptr + t * K + k, mask=t < tokens, other=-1)
        kept = inside & (row >= 0)[:, None]
        y = tl.load(y_ptr + row[:, None] * width + d[None, :], mask=kept, other=0.0).to(ACC)
        if WEIGHTED:
            weight = tl.load(weights_ptr + t * K + k, mask=t < tokens, other=0.0).to(ACC)
            y = y * weight[:, None]
        total += tl.where(kept, y, 0.0)
    tl.store(out_ptr + t[:, None] * width + d[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def combine_backward_kernel(
    dout_ptr,
    position_ptr,
    weights_ptr,
    y_ptr,
    offsets_ptr,
    dy_ptr,
    dweights_ptr,
    num_rows,
    width,
    E,
    K: tl.constexpr,
    KP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    BD: tl.constexpr,
):
    # one token: its K rows at once, K padded to the power of two KP
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    lane = tl.arange(0, BD)
    row = tl.load(position_ptr + t * K + k, mask=k < K, other=-1)
    kept = row >= 0
    weight = tl.full([KP], 1.0, ACC)
    if WEIGHTED:
        weight = tl.load(weights_ptr + t * K + k, mask=k < K, other=0.0).to(ACC)
    dweight = tl.zeros([KP], ACC)
    for start in range(0, width, BD):
        d = start + lane
        inside = kept[:, None] & (d < width)[None, :]
        at = row[:, None] * width + d[None, :]
        dout = tl.load(dout_ptr + t * width + d, mask=d < width, other=0.0).to(ACC)
        if WEIGHT_GRADIENT:
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(ACC)
            dweight += tl.sum(y * dout[None, :], 1)
        dy = weight[:, None] * dout[None, :]
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=inside)
    if WEIGHT_GRADIENT:
        tl.store(dweights_ptr + t * K + k, dweight.to(dweights_ptr.dtype.element_ty), mask=k < K)
    # the rows of dropped slots are past the last offset: the programs divide them and zero them
    used = tl.load(offsets_ptr + E - 1).to(tl.int64)
    zero = tl.zeros([BD], dy_ptr.dtype.element_ty)
    for n in range(used + t, num_rows, tl.num_programs(0)):
        for start in range(0, width, BD):
            d = start + lane
            tl.store(dy_ptr + n * width + d, zero, mask=d < width)


def _accumulator(tensor: Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def permute_rows(x_TD: Tensor, gather_N: Tensor, offsets_E: Tensor) -> Tensor:
    num_rows, width = gather_N.shape[0], x_TD.shape[1]
    out_ND = x_TD.new_empty(num_rows, width)
    bn, bd = 4, min(1024, triton.next_power_of_2(max(width, 16)))
    if out_ND.numel():
        grid = (triton.cdiv(num_rows, bn), triton.cdiv(width, bd))
        permute_kernel[grid](
            x_TD.contiguous(),
            gather_N.contiguous(),
            offsets_E,
            out_ND,
            num_rows,
            width,
            offsets_E.shape[0],
            BN=bn,
            BD=bd,
            **OPTIONS,
        )
    return out_ND


def combine_rows(y_ND: Tensor, position_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    (tokens, topk), width = position_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(tokens, width)
    bt, bd = 2, min(512, triton.next_power_of_2(max(width, 16)))
    if out_TD.numel():
        combine_kernel[(triton.cdiv(tokens, bt), triton.cdiv(width, bd))](
            y_ND.contiguous(),
            position_TK.contiguous(),
            None if weights_TK is None else weights_TK.contiguous(),
            out_TD,
            tokens,
            width,
            K=topk,
            WEIGHTED=weights_TK is not None,
            ACC=_accumulator(y_ND),
            BT=bt,
            BD=bd,
            **OPTIONS,
        )
    return out_TD


def combine_rows_backward(
    dout_TD: Tensor,
    position_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    y_ND: Tensor | None,
    num_rows: int,
) -> tuple[Tensor, Tensor | None]:
    (tokens, topk), width = position_TK.shape, dout_TD.shape[1]
    if not tokens or not topk:
        return dout_TD.new_zeros(num_rows, width), None if y_ND is None else torch.zeros_like(weights_TK)
    dy_ND = dout_TD.new_empty(num_rows, width)
    dw_TK = None if y_ND is None else torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    combine_backward_kernel[(tokens,)](
        dout_TD.contiguous(),
        position_TK.contiguous(),
        None if weights_TK is None else weights_TK.contiguous(),
        None if y_ND is None else y_ND.contiguous(),
        offsets_E,
        dy_ND,
        dw_TK,
        num_rows,
        width,
        offsets_E.shape[0],
        K=topk,
        KP=triton.next_power_of_2(topk),
        WEIGHTED=weights_TK is not None,
        WEIGHT_GRADIENT=y_ND is not None,
        ACC=_accumulator(dout_TD),
        BD=min(512, triton.next_power_of_2(max(width, 16))),
        **OPTIONS,
    )
    return dy_ND, dw_TK

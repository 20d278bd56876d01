"""Log-probability and entropy in Triton; every launcher has the name and signature of its reference.

Legend: T tokens, V vocabulary columns of this rank. Forward reads each logit once (one program per token),
backward reads and writes each once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# columns a program holds at once
BLOCK = 4096
# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# a thread holds two sums for each of its columns: with 8 warps one of them is spilled on sm_100
PARTIALS = OPTIONS | {"num_warps": 16}


@triton.jit
def token_logprob_partials_kernel(
    logits_ptr, stride, local_ptr, out_ptr, columns, tau: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    target = tl.load(local_ptr + t)
    row_ptr = logits_ptr + t * stride
    lane = tl.arange(0, BV)
    infinity = float("inf")
    # from -inf, not from 0: a row may lie far below 0
    m = tl.full([], -infinity, ACC)
    mass = tl.zeros([BV], ACC)
    moment = tl.zeros([BV], ACC)
    wanted = tl.where(target == -2, 0, columns)
    for start in range(0, wanted, BV):
        v = start + lane
        x = tl.load(row_ptr + v, mask=v < columns, other=-infinity).to(ACC)
        high = tl.maximum(m, tl.max(x, 0))
        # before the first finite logit everything is 0, and -inf - -inf would be NaN
        centre = tl.where(high == -infinity, 0.0, high)
        shift = tl.where(m == -infinity, 0.0, (m - centre) / tau)
        factor = tl.exp(shift)
        z = (x - centre) / tau
        e = tl.exp(z)
        moment = factor * (moment + shift * mass) + e * tl.maximum(z, -1e4)
        mass = factor * mass + e
        m = high
    at = tl.load(row_ptr + target, mask=target >= 0, other=0.0).to(ACC)
    tl.store(out_ptr + t * 4, m)
    tl.store(out_ptr + t * 4 + 1, tl.sum(mass, 0))
    tl.store(out_ptr + t * 4 + 2, tl.sum(moment, 0))
    tl.store(out_ptr + t * 4 + 3, tl.where(target >= 0, at, infinity))


@triton.jit
def token_logprob_gradient_kernel(
    logits_ptr,
    stride,
    local_ptr,
    max_ptr,
    log_sum_ptr,
    entropy_ptr,
    dlogp_ptr,
    dentropy_ptr,
    out_ptr,
    out_stride,
    columns,
    width,
    tau: tl.constexpr,
    ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    BV: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    target = tl.load(local_ptr + t)
    live = v < tl.where(target == -2, 0, columns)
    x = tl.load(logits_ptr + t * stride + v, mask=live, other=-float("inf")).to(ACC)
    logp = (x - tl.load(max_ptr + t).to(ACC)) / tau - tl.load(log_sum_ptr + t).to(ACC)
    p = tl.exp(logp)
    dlogp = tl.load(dlogp_ptr + t).to(ACC)
    dx = tl.where(v == target, dlogp - p * dlogp, -p * dlogp)
    if ENTROPY:
        centred = tl.maximum(logp, -1e4) + tl.load(entropy_ptr + t).to(ACC)
        dx -= p * centred * tl.load(dentropy_ptr + t).to(ACC)
    dx = tl.where(live, dx / tau, 0.0)
    tl.store(out_ptr + t * out_stride + v, dx.to(out_ptr.dtype.element_ty), mask=v < width)


def _accumulator(tensor: Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _block(columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(columns, 16)))


def token_logprob_partials(logits_TV: Tensor, local_T: Tensor, columns: int, temperature: float) -> Tensor:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    out_T4 = torch.empty(logits_TV.shape[0], 4, dtype=wide, device=logits_TV.device)
    if logits_TV.shape[0]:
        token_logprob_partials_kernel[(logits_TV.shape[0],)](
            logits_TV,
            logits_TV.stride(0),
            local_T.contiguous(),
            out_T4,
            columns,
            tau=temperature,
            ACC=_accumulator(logits_TV),
            BV=_block(columns),
            **PARTIALS,
        )
    return out_T4


def token_logprob_gradient(
    logits_TV: Tensor,
    local_T: Tensor,
    columns: int,
    temperature: float,
    max_T: Tensor,
    log_sum_T: Tensor,
    entropy_T: Tensor,
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    out_TV: Tensor,
) -> None:
    tokens, width = logits_TV.shape
    if not logits_TV.numel():
        return
    token_logprob_gradient_kernel[(tokens, triton.cdiv(width, _block(width)))](
        logits_TV,
        logits_TV.stride(0),
        local_T.contiguous(),
        max_T,
        log_sum_T,
        entropy_T,
        dlogp_T.contiguous(),
        None if dentropy_T is None else dentropy_T.contiguous(),
        out_TV,
        out_TV.stride(0),
        columns,
        width,
        tau=temperature,
        ENTROPY=dentropy_T is not None,
        ACC=_accumulator(logits_TV),
        BV=_block(width),
        **OPTIONS,
    )

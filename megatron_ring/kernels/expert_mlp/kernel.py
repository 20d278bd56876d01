"""The experts' SwiGLU network in Triton: two fused kernels, and the grouped GEMM for the other products.

Legend: N rows sorted by expert, D model width, F expert width, e local experts. Both kernels loop over tiles
like the grouped GEMM (see there) and compute the activation in the epilogue, while the products are still
in registers:

- ``expert_up_kernel``: gate and up in two accumulators; writes h = silu(gate) up p and, for training, z = [gate,
  up].
- ``expert_down_backward_kernel``: dh = dy Wdown; from dh and z it writes dz, h (again, for the weight gradient), and per
  column block a partial sum of dp = <dh, silu(gate) up>. It uses no atomics, so the result does not depend on the
  order of the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ring.kernels.grouped_gemm.kernel import (
    Tiles,
    arithmetic,
    grouped_nn,
    grouped_nt,
    grouped_tn,
    load_weight,
    num_programs,
    place,
    plain,
    product,
    quarters,
    ragged,
    store_rows,
    tile_ends,
    tiles_for,
)


@triton.jit(do_not_specialize=["num_rows", "reduced", "tiles_n"])
def expert_up_kernel(
    x_desc, w_desc, gate_desc, up_desc, h_desc, probs_ptr, offsets_ptr,
    num_experts, num_rows, reduced, tiles_n,
    STORE_Z: tl.constexpr, HAS_PROBS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, E_PAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = silu(x Wgate^T) (x Wup^T) p, and both products; w is [2 e, F, D], gate and up in turn."""
    ends_E, total = tile_ends(offsets_ptr, num_experts, num_rows, tiles_n, BM, E_PAD)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, n = place(tile, ends_E, offsets_ptr, num_experts, num_rows, tiles_n, BM, GROUP)
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, tl.where(expert < num_experts, reduced, 0), BK):
            x = x_desc.load([row, k])
            gate = product(x, load_weight(w_desc, 2 * expert, n * BN, k).T, gate, UPCAST, PRECISION)
            up = product(x, load_weight(w_desc, 2 * expert + 1, n * BN, k).T, up, UPCAST, PRECISION)
        p = _probs(probs_ptr, row, end, expert < num_experts, BM, HAS_PROBS)
        g0, g1, g2, g3 = quarters(gate)
        u0, u1, u2, u3 = quarters(up)
        _finish_up(gate_desc, up_desc, h_desc, row, end, n * BN, g0, u0, p, STORE_Z)
        _finish_up(gate_desc, up_desc, h_desc, row, end, n * BN + BN // 4, g1, u1, p, STORE_Z)
        _finish_up(gate_desc, up_desc, h_desc, row, end, n * BN + BN // 2, g2, u2, p, STORE_Z)
        _finish_up(gate_desc, up_desc, h_desc, row, end, n * BN + 3 * (BN // 4), g3, u3, p, STORE_Z)


@triton.jit
def _probs(probs_ptr, row, end, real, BM: tl.constexpr, HAS_PROBS: tl.constexpr):
    """Routing weights of a row block, fp32; zero past its end and for the virtual expert."""
    rows = row + tl.arange(0, BM)
    mine = rows < tl.where(real, end, 0)
    if HAS_PROBS:
        return tl.load(probs_ptr + rows, mask=mine, other=0.0).to(tl.float32)
    return mine.to(tl.float32)


@triton.jit
def _finish_up(gate_desc, up_desc, h_desc, row, end, column, gate, up, p, STORE_Z: tl.constexpr):
    store_rows(h_desc, row, end, column, gate * tl.sigmoid(gate) * up * p[:, None])
    if STORE_Z:
        store_rows(gate_desc, row, end, column, gate)
        store_rows(up_desc, row, end, column, up)


@triton.jit(do_not_specialize=["num_rows", "reduced", "tiles_n"])
def expert_down_backward_kernel(
    dy_desc, w_desc, gate_desc, up_desc, dgate_desc, dup_desc, h_desc, probs_ptr, partial_ptr, offsets_ptr,
    num_experts, num_rows, reduced, tiles_n,
    HAS_PROBS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    E_PAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz, h and the partial sums of dp from dy; w is [e, D, F], z = [gate, up] is the forward pass's."""
    ends_E, total = tile_ends(offsets_ptr, num_experts, num_rows, tiles_n, BM, E_PAD)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, n = place(tile, ends_E, offsets_ptr, num_experts, num_rows, tiles_n, BM, GROUP)
        dh = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, tl.where(expert < num_experts, reduced, 0), BK):
            dy = dy_desc.load([row, k])
            dh = product(dy, load_weight(w_desc, expert, k, n * BN), dh, UPCAST, PRECISION)
        p = _probs(probs_ptr, row, end, expert < num_experts, BM, HAS_PROBS)
        q0, q1, q2, q3 = quarters(dh)
        column = n * BN
        dp = _finish_down(gate_desc, up_desc, dgate_desc, dup_desc, h_desc, row, end, column, q0, p)
        column += BN // 4
        dp += _finish_down(gate_desc, up_desc, dgate_desc, dup_desc, h_desc, row, end, column, q1, p)
        column += BN // 4
        dp += _finish_down(gate_desc, up_desc, dgate_desc, dup_desc, h_desc, row, end, column, q2, p)
        column += BN // 4
        dp += _finish_down(gate_desc, up_desc, dgate_desc, dup_desc, h_desc, row, end, column, q3, p)
        if HAS_PROBS:
            rows = row + tl.arange(0, BM)
            tl.store(partial_ptr + n.to(tl.int64) * num_rows + rows, dp, mask=rows < end)


@triton.jit
def _finish_down(gate_desc, up_desc, dgate_desc, dup_desc, h_desc, row, end, column, dh, p):
    """Activation gradient of some columns; returns their share of dp, one value per row."""
    gate = gate_desc.load([row, column]).to(tl.float32)
    up = up_desc.load([row, column]).to(tl.float32)
    # a NaN stays a NaN; the use of dh keeps the activation in the product's register layout, otherwise the
    # compiler computes it a second time in the layout from which h is stored
    gate = tl.where(dh == dh, gate, dh)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    value = silu * up
    store_rows(h_desc, row, end, column, value * p[:, None])
    dp = tl.sum(dh * value, 1)
    dh = dh * p[:, None]
    store_rows(dup_desc, row, end, column, dh * silu)
    store_rows(dgate_desc, row, end, column, dh * up * (sigmoid + silu * (1 - sigmoid)))
    return dp


def up_swiglu(
    x_ND: Tensor,
    w_up_e2FD: Tensor,
    offsets_e: Tensor,
    probs_N: Tensor | None,
    keep_z: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``h_NF = silu(gate) up p`` and, with ``keep_z``, ``z_N2F = [gate, up]``; contiguous inputs, N > 0."""
    N, (e, _, F, D) = x_ND.shape[0], w_up_e2FD.shape
    h_NF = x_ND.new_empty(N, F)
    z_N2F = x_ND.new_empty(N, 2 * F) if keep_z else None
    gate_NF, up_NF = (h_NF, h_NF) if z_N2F is None else z_N2F.chunk(2, dim=1)
    t = tiles or tiles_for("up", x_ND.dtype)
    tiles_n, quarter = triton.cdiv(F, t.bn), (t.bm, t.bn // 4)
    expert_up_kernel[(num_programs(x_ND.device),)](
        plain(x_ND, (t.bm, t.bk)), plain(w_up_e2FD.view(2 * e, F, D), (1, t.bn, t.bk)),
        ragged(gate_NF, quarter), ragged(up_NF, quarter), ragged(h_NF, quarter), probs_N, offsets_e,
        e, N, D, tiles_n,
        STORE_Z=keep_z, HAS_PROBS=probs_N is not None, BM=t.bm, BN=t.bn, BK=t.bk, GROUP=t.group,
        E_PAD=triton.next_power_of_2(e + 1), **arithmetic(x_ND.dtype), **t.options(),
    )  # fmt: skip
    return h_NF, z_N2F


def down_backward(
    dy_ND: Tensor,
    w_down_eDF: Tensor,
    z_N2F: Tensor,
    offsets_e: Tensor,
    probs_N: Tensor | None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(dz_N2F, h_NF, dprobs_N)``; dy and the weights contiguous, N > 0."""
    N, (e, D, F) = dy_ND.shape[0], w_down_eDF.shape
    t = tiles or tiles_for("down", dy_ND.dtype)
    tiles_n, quarter = triton.cdiv(F, t.bn), (t.bm, t.bn // 4)
    dz_N2F, h_NF = torch.empty_like(z_N2F), dy_ND.new_empty(N, F)
    partial = None if probs_N is None else dy_ND.new_empty(tiles_n, N, dtype=torch.float32)
    (gate_NF, up_NF), (dgate_NF, dup_NF) = z_N2F.chunk(2, dim=1), dz_N2F.chunk(2, dim=1)
    expert_down_backward_kernel[(num_programs(dy_ND.device),)](
        plain(dy_ND, (t.bm, t.bk)), plain(w_down_eDF, (1, t.bk, t.bn)),
        plain(gate_NF, quarter), plain(up_NF, quarter),
        ragged(dgate_NF, quarter), ragged(dup_NF, quarter), ragged(h_NF, quarter),
        probs_N, partial, offsets_e,
        e, N, D, tiles_n, HAS_PROBS=probs_N is not None, BM=t.bm, BN=t.bn, BK=t.bk, GROUP=t.group,
        E_PAD=triton.next_power_of_2(e + 1), **arithmetic(dy_ND.dtype), **t.options(),
    )  # fmt: skip
    return dz_N2F, h_NF, None if partial is None else partial.sum(0).to(probs_N.dtype)


def forward(x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, keep_z):
    """``(y_ND, z_N2F or None)``."""
    h_NF, z_N2F = up_swiglu(x_ND.contiguous(), w_up_e2FD.contiguous(), offsets_e, probs_N, keep_z)
    return grouped_nt(h_NF, w_down_eDF, offsets_e), z_N2F


def backward(dy_ND, x_ND, w_up_e2FD, w_down_eDF, offsets_e, probs_N, z_N2F, needs, main_grads):
    """``(dx, dw_up, dw_down, dprobs)``; None for a gradient that is not needed or was added into a main_grad."""
    dz_N2F, h_NF, dprobs_N = down_backward(
        dy_ND.contiguous(), w_down_eDF.contiguous(), z_N2F, offsets_e, probs_N
    )
    up_main, down_main = main_grads
    dw_down = grouped_tn(dy_ND, h_NF, offsets_e, down_main) if needs[2] else None
    dx_ND = grouped_nn(dz_N2F, w_up_e2FD.flatten(1, 2), offsets_e) if needs[0] else None
    dw_up = (
        grouped_tn(dz_N2F, x_ND, offsets_e, None if up_main is None else up_main.flatten(1, 2))
        if needs[1]
        else None
    )
    return (
        dx_ND,
        None if dw_up is None or up_main is not None else dw_up.view_as(w_up_e2FD),
        None if down_main is not None else dw_down,
        dprobs_N,
    )

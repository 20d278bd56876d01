"""Grouped GEMM in Triton: persistent programs over ragged tiles, forward, input gradient and weight gradient.

Legend: N rows sorted by expert, D and F widths, e local experts. M/N/K in tile sizes (BM, BN, BK) are the
product's rows, columns and reduction. Offsets are inclusive cumulative row counts, int32.

No host synchronisation: every program derives the tiles from the offsets. Within an expert, tiles are ordered in
groups of GROUP row blocks so that concurrent programs share weight columns in L2. Rows past the last offset form
one more, virtual expert without a reduction: its tiles store zeros.

The end of a ragged descriptor is an argument of each access and uses the hardware's bounds check: the part of a tile
past its expert's end reads zeros and writes nothing. Two leading dimensions shift the base address by wrapping around
64 bits (the method of triton.tools.ragged_tma).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# the interpreter multiplies bf16 wrongly; only there, tiles are converted to fp32 before a product
INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch options of one kernel."""

    bm: int
    bn: int
    bk: int
    warps: int = 8
    stages: int = 4
    group: int = 8

    def options(self) -> dict:
        """Launch options; fused multiply-add is set explicitly because Triton's default is about to change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@triton.jit
def tile_ends(offsets_ptr, num_experts, num_rows, tiles_n, BM: tl.constexpr, E_PAD: tl.constexpr):
    """Cumulative tile counts [E_PAD] of the experts and of the rows past the last offset; and their sum."""
    lane = tl.arange(0, E_PAD)
    begin = tl.load(offsets_ptr + lane - 1, mask=(lane > 0) & (lane <= num_experts), other=0)
    end = tl.load(offsets_ptr + lane, mask=lane < num_experts, other=num_rows)
    tiles = tl.where(lane <= num_experts, tl.cdiv(end - begin, BM) * tiles_n, 0)
    return tl.cumsum(tiles, 0), tl.sum(tiles, 0)


@triton.jit
def place(tile, ends_E, offsets_ptr, num_experts, num_rows, tiles_n, BM: tl.constexpr, GROUP: tl.constexpr):
    """(expert, first row of the tile, row past the expert's last, column block) of a tile."""
    before = ends_E <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    local = tile - tl.max(tl.where(before, ends_E, 0), 0)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert, mask=expert < num_experts, other=num_rows)
    tiles_m = tl.cdiv(end - begin, BM)
    group = local // (GROUP * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = local - group * GROUP * tiles_n
    return expert, begin + (group * GROUP + inside % group_m) * BM, end, inside // group_m


@triton.jit
def load_rows(desc, row, end, column):
    """Block at (row, column) of a ragged tensor; rows at and past end read as zeros."""
    block = desc.load([0x40000000, end, 0x40000000 - end + row, column])
    return tl.reshape(block, [desc.block_shape[2], desc.block_shape[3]])


@triton.jit
def store_rows(desc, row, end, column, block):
    """Write a block at (row, column) of a ragged tensor, but nothing at and past row end."""
    block = tl.reshape(block.to(desc.dtype), [1, 1, desc.block_shape[2], desc.block_shape[3]])
    desc.store([0x40000000, end, 0x40000000 - end + row, column], block)


@triton.jit
def halves(block):
    """The left and the right half of a block's columns."""
    pair = tl.reshape(block, [block.shape[0], 2, block.shape[1] // 2])
    return tl.split(tl.permute(pair, [0, 2, 1]))


@triton.jit
def quarters(block):
    """A block's columns in four blocks, left to right: by quarters, an epilogue fits the loop's registers."""
    left, right = halves(block)
    a, b = halves(left)
    c, d = halves(right)
    return a, b, c, d


@triton.jit
def product(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_weight(w_desc, expert, row, column):
    """Block of one expert's matrix, in its layout in memory; zeros outside the matrix."""
    return tl.reshape(w_desc.load([expert, row, column]), [w_desc.block_shape[1], w_desc.block_shape[2]])


@triton.jit(do_not_specialize=["num_rows", "reduced", "tiles_n"])
def grouped_gemm_rows_kernel(
    x_desc, w_desc, y_desc, offsets_ptr, num_experts, num_rows, reduced, tiles_n,
    NT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    E_PAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[n] = w[expert] x[n] where NT, else y[n] = w[expert]^T x[n]; w is [e, out, in] and [e, in, out]."""
    ends_E, total = tile_ends(offsets_ptr, num_experts, num_rows, tiles_n, BM, E_PAD)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, end, n = place(tile, ends_E, offsets_ptr, num_experts, num_rows, tiles_n, BM, GROUP)
        acc = tl.zeros([BM, BN], tl.float32)
        # the virtual expert has nothing to reduce
        for k in tl.range(0, tl.where(expert < num_experts, reduced, 0), BK):
            x = x_desc.load([row, k])
            # a constexpr condition: only one of the two loads is compiled
            w = load_weight(w_desc, expert, n * BN, k).T if NT else load_weight(w_desc, expert, k, n * BN)
            acc = product(x, w, acc, UPCAST, PRECISION)
        a, b, c, d = quarters(acc)
        store_rows(y_desc, row, end, n * BN, a)
        store_rows(y_desc, row, end, n * BN + BN // 4, b)
        store_rows(y_desc, row, end, n * BN + BN // 2, c)
        store_rows(y_desc, row, end, n * BN + 3 * (BN // 4), d)


@triton.jit(do_not_specialize=["tiles_f", "tiles_d"])
def grouped_gemm_weight_kernel(
    dy_desc, x_desc, dw_desc, offsets_ptr, num_experts, tiles_f, tiles_d,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw[expert] = sum of outer(dy[n], x[n]) over its rows, or dw[expert] += that where ACCUMULATE."""
    per_expert = tiles_f * tiles_d
    for tile in tl.range(tl.program_id(0), num_experts * per_expert, tl.num_programs(0)):
        expert = tile // per_expert
        local = tile % per_expert
        group = local // (GROUP * tiles_d)
        group_f = tl.minimum(tiles_f - group * GROUP, GROUP)
        inside = local - group * GROUP * tiles_d
        f = (group * GROUP + inside % group_f) * BM
        d = inside // group_f * BN
        begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(offsets_ptr + expert)
        acc = tl.zeros([BM, BN], tl.float32)
        for row in tl.range(begin, end, BK):
            dy = load_rows(dy_desc, row, end, f)
            x = load_rows(x_desc, row, end, d)
            acc = product(dy.T, x, acc, UPCAST, PRECISION)
        q0, q1, q2, q3 = quarters(acc)
        _store_weight(dw_desc, expert, f, d, q0, ACCUMULATE)
        _store_weight(dw_desc, expert, f, d + BN // 4, q1, ACCUMULATE)
        _store_weight(dw_desc, expert, f, d + BN // 2, q2, ACCUMULATE)
        _store_weight(dw_desc, expert, f, d + 3 * (BN // 4), q3, ACCUMULATE)


@triton.jit
def _store_weight(dw_desc, expert, f, d, block, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        block += load_weight(dw_desc, expert, f, d).to(tl.float32)
    dw_desc.store([expert, f, d], tl.reshape(block.to(dw_desc.dtype), [1, block.shape[0], block.shape[1]]))


def tiles_for(kind: str, dtype: torch.dtype, arch: int | None = None) -> Tiles:
    """Tile sizes of one kernel on the current device, or on ``arch`` (80, 90, 100). ``kind``: rows, weight,
    up or down.

    Chosen from the compiled code (no spills, loop limited by the tensor cores), not yet from timing on a GPU.
    """
    if INTERPRETED:
        return Tiles(16, 32, 16, group=2)
    if dtype == torch.float32:
        return Tiles(64, 64, 32, warps=4, stages=2)
    if (arch or triton.runtime.driver.active.get_current_target().arch) < 90:
        return Tiles(128, 64, 32) if kind in ("up", "down") else Tiles(128, 128, 32)
    # up holds two accumulators; down needs the registers for its epilogue
    return Tiles(128, 128, 64) if kind in ("up", "down") else Tiles(128, 256, 64)


def num_programs(device: torch.device) -> int:
    """One program per multiprocessor."""
    if INTERPRETED:
        return 3
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["multiprocessor_count"]


def arithmetic(dtype: torch.dtype) -> dict:
    """How products of ``dtype`` are computed: fp32 follows torch.set_float32_matmul_precision."""
    precision = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    return {"UPCAST": INTERPRETED and dtype == torch.bfloat16, "PRECISION": precision}


def ragged(x_NC: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """Descriptor of the rows before an end that is an argument of each access: see load_rows and store_rows."""
    # coordinates (2^30, end, 2^30 - end + row) add up to 2^30 (2^34 - pitch) + 2^30 pitch + row pitch
    # elements, and 2^64 elements are 0 bytes modulo 2^64; the third coordinate reaches its bound, 2^30, when
    # row reaches end
    pitch = x_NC.stride(0)
    shape = [0x7FFF0000, 0x7FFF0000, 0x40000000, x_NC.shape[1]]
    return TensorDescriptor(x_NC, shape, [2**34 - pitch, pitch, pitch, 1], [1, 1, *block])


def plain(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor of a whole tensor; the part of a block outside of it reads zeros."""
    return TensorDescriptor.from_tensor(tensor, list(block))


def taken(*tensors: Tensor) -> bool:
    """True if the tensor memory accelerator can address every operand: 16-byte rows, not empty, not fp64.

    Other operands (fp64, and widths that no real model has) use the reference, also on a GPU.
    """
    return all(
        t.numel() > 0 and t.dtype != torch.float64 and t.shape[-1] * t.element_size() % 16 == 0
        for t in tensors
    )


def grouped_nt(x_ND: Tensor, w_eFD: Tensor, offsets_e: Tensor, tiles: Tiles | None = None) -> Tensor:
    """``y[n] = w[expert of n] @ x[n]``; see the reference."""
    return _rows(x_ND, w_eFD, offsets_e, w_eFD.shape[1], True, tiles)


def grouped_nn(dy_NF: Tensor, w_eFD: Tensor, offsets_e: Tensor, tiles: Tiles | None = None) -> Tensor:
    """``dx[n] = dy[n] @ w[expert of n]``; see the reference."""
    return _rows(dy_NF, w_eFD, offsets_e, w_eFD.shape[2], False, tiles)


def _rows(x: Tensor, w: Tensor, offsets_e: Tensor, width: int, nt: bool, tiles: Tiles | None) -> Tensor:
    x, w = x.contiguous(), w.contiguous()
    y = x.new_empty(x.shape[0], width)
    t = tiles or tiles_for("rows", x.dtype)
    e, tiles_n = w.shape[0], triton.cdiv(width, t.bn)
    w_block = (1, t.bn, t.bk) if nt else (1, t.bk, t.bn)
    grouped_gemm_rows_kernel[(num_programs(x.device),)](
        plain(x, (t.bm, t.bk)), plain(w, w_block), ragged(y, (t.bm, t.bn // 4)), offsets_e,
        e, x.shape[0], x.shape[1], tiles_n,
        NT=nt, BM=t.bm, BN=t.bn, BK=t.bk, GROUP=t.group, E_PAD=triton.next_power_of_2(e + 1),
        **arithmetic(x.dtype), **t.options(),
    )  # fmt: skip
    return y


def grouped_tn(
    dy_NF: Tensor,
    x_ND: Tensor,
    offsets_e: Tensor,
    main_grad_eFD: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """``dw[i] = sum of outer(dy[n], x[n])`` over expert i's rows; added into ``main_grad_eFD`` if given."""
    dy_NF, x_ND = dy_NF.contiguous(), x_ND.contiguous()
    F, D, e = dy_NF.shape[1], x_ND.shape[1], offsets_e.shape[0]
    dw_eFD = x_ND.new_empty(e, F, D) if main_grad_eFD is None else main_grad_eFD
    t = tiles or tiles_for("weight", x_ND.dtype)
    tiles_f, tiles_d = triton.cdiv(F, t.bm), triton.cdiv(D, t.bn)
    grouped_gemm_weight_kernel[(min(num_programs(x_ND.device), e * tiles_f * tiles_d),)](
        ragged(dy_NF, (t.bk, t.bm)), ragged(x_ND, (t.bk, t.bn)), plain(dw_eFD, (1, t.bm, t.bn // 4)),
        offsets_e, e, tiles_f, tiles_d, ACCUMULATE=main_grad_eFD is not None,
        BM=t.bm, BN=t.bn, BK=t.bk, GROUP=t.group, **arithmetic(x_ND.dtype), **t.options(),
    )  # fmt: skip
    return dw_eFD

"""grouped_gemm: every backend against fp64. Inputs lie between NaNs; on Triton outputs between canaries."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ring.kernels import grouped_gemm
from megatron_ring.kernels.grouped_gemm import cpu, reference
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter
from tests.helpers.kernels.grouped_rows import SHAPES, WIDTHS, offsets_of, poisoned


def in_fp64(x: Tensor, w: Tensor, offsets: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) by the reference in double precision."""
    x, w, dy = x.detach().double(), w.detach().double(), dy.detach().double()
    products = reference.grouped_nt(x, w, offsets), reference.grouped_nn(dy, w, offsets)
    return *products, reference.grouped_tn(dy, x, offsets)


def operands(counts: list[int], past: int, D: int, F: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    """(x, w, offsets, dy), reproducible; x and w are leaves."""
    make = torch.Generator().manual_seed(len(counts) + sum(counts) + D)
    N = sum(counts) + past
    x, w, dy = (torch.randn(s, generator=make) for s in ((N, D), (len(counts), F, D), (N, F)))
    return poisoned(x.to(dtype)), poisoned(w.to(dtype)), offsets_of(counts), dy.to(dtype)


def check(counts: list[int], past: int, D: int, F: int, dtype=torch.float32, tolerance: float = 1e-5) -> None:
    """Forward and both gradients against fp64."""
    x, w, offsets, dy = operands(counts, past, D, F, dtype)
    y = grouped_gemm(x, w, offsets)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    for name, found, wanted in zip(("y", "dx", "dw"), (y, dx, dw), in_fp64(x, w, offsets, dy), strict=True):
        assert found.dtype == dtype and relative_error(found, wanted) <= tolerance, (
            name,
            counts,
            relative_error(found, wanted),
        )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("D", "F"), WIDTHS)
def test_forward_and_gradients_equal_fp64(backend, name, D, F):
    check(*SHAPES[name], D, F)


def test_several_column_blocks_in_groups_of_row_blocks(backend):
    check([50, 10], 3, 16, 104)


def test_a_hundred_experts(backend):
    check([2 * (n % 9 == 5) for n in range(100)], 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_only_the_result(backend, dtype):
    # the interpreter truncates to bf16 where a GPU rounds
    check([3, 0, 33, 18], 2, 40, 24, dtype, tolerance=torch.finfo(dtype).eps * (1 + (backend == "triton")))


def test_gradients_are_right_in_double_precision(backend):
    x, w, offsets, _ = operands([2, 0, 3], 1, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, offsets), (x, w))


def test_docstring_example(backend):
    y = grouped_gemm(
        torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([[[2.0]], [[10.0]]]), offsets_of([1, 1])
    )
    assert y.tolist() == [[2.0], [30.0], [0.0]]


def test_rows_of_no_expert_neither_give_nor_get(backend):
    x, w, offsets, dy = operands([3, 4], 2, 8, 8)
    with torch.no_grad():
        x[7:], dy[7:] = torch.nan, torch.nan
    y = grouped_gemm(x, w, offsets)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert not y[7:].any() and not dx[7:].any()
    assert all(t.isfinite().all() for t in (y, dx, dw))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_main_grad_takes_the_weight_gradient_by_addition(backend, dtype):
    x, w, offsets, dy = operands([3, 0, 34], 2, 24, 40, dtype)
    main = torch.full(w.shape, 0.5)
    grouped_gemm(x, w, offsets, main_grad_eFD=main).backward(dy)
    assert w.grad is None
    # off Triton the weight gradient is rounded before it is added
    tolerance = 1e-5 if backend == "triton" or dtype == torch.float32 else 1e-3
    assert relative_error(main, 0.5 + in_fp64(x, w, offsets, dy)[2]) < tolerance


def test_experts_do_not_see_each_others_rows_or_weights(backend):
    x, w, offsets, dy = operands([5, 18, 7], 3, 24, 40)
    clean = in_fp64(x, w, offsets, dy)
    with torch.no_grad():
        # expert 1 owns rows 5 to 22; rows past 30 are nobody's
        x[5:23], w[1], dy[5:23], x[30:], dy[30:] = (torch.nan,) * 5
    y = grouped_gemm(x, w, offsets)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    mine = torch.tensor([*range(5), *range(23, 33)])
    assert relative_error(y[mine], clean[0][mine]) < 1e-5
    assert relative_error(dx[mine], clean[1][mine]) < 1e-5
    assert relative_error(dw[[0, 2]], clean[2][[0, 2]]) < 1e-5


def test_recompute_gives_the_same_gradients(backend):
    x, w, offsets, dy = operands([5, 0, 4], 0, 8, 8)
    plain = torch.autograd.grad(grouped_gemm(x, w, offsets), (x, w), dy)
    again = checkpoint(lambda x, w: grouped_gemm(x, w, offsets), x, w, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(again, (x, w), dy)))


def test_strided_and_expanded_operands(backend):
    x, w, offsets, _ = operands([3, 0, 4], 1, 8, 16)
    wide = torch.randn(8, 8, requires_grad=True)
    y = grouped_gemm(wide.t(), w, offsets)
    assert (
        relative_error(y, reference.grouped_nt(wide.detach().double().t(), w.detach().double(), offsets))
        < 1e-5
    )
    one = torch.ones(8, 1).expand(8, 16)
    dx = torch.autograd.grad(grouped_gemm(x, w, offsets), x, one)[0]
    assert relative_error(dx, in_fp64(x, w, offsets, one)[1]) < 1e-5


def test_host_products_leave_no_row_unwritten(monkeypatch):
    x, w, offsets, dy = operands([3, 0, 4], 6, 8, 8)
    garbage = torch.nn.functional.grouped_mm

    def dirty(*args, **kwargs):
        out = garbage(*args, **kwargs)
        if out.dim() == 2:
            out[7:] = torch.nan
        return out

    monkeypatch.setattr(cpu.F, "grouped_mm", dirty)
    with torch.no_grad():
        assert not cpu.grouped_nt(x, w, offsets)[7:].any()
        assert not cpu.grouped_nn(dy, w, offsets)[7:].any()


def test_one_and_seven_programs_do_what_three_do(backend, monkeypatch):
    if backend != "triton":
        pytest.skip("only Triton has programs")
    from megatron_ring.kernels.grouped_gemm import kernel

    for programs in (1, 7):
        monkeypatch.setattr(kernel, "num_programs", lambda device, programs=programs: programs)
        check([20, 0, 17], 4, 16, 40)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")

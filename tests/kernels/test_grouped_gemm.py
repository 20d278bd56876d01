"""grouped_gemm against fp64 on the host, and its Triton kernels against fp64 in the interpreter.

The interpreter needs its own process (TRITON_INTERPRET is read at import), so the Triton cases below are plain
functions: ``python -m tests.kernels.test_grouped_gemm`` runs them, one test starts that, and the planted faults of
test_mutations run them too. Outputs lie between canaries and start as NaN; inputs lie between NaNs.
"""

import itertools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ring.kernels import dispatch
from megatron_ring.kernels.grouped_gemm import grouped_gemm, host, reference

ROOT = Path(__file__).resolve().parents[2]
_MARGIN, _CANARY = 64, 1234.5

# rows per expert, then rows past the last offset; 16 is the interpreter's row block
SHAPES = {
    "no rows at all": ([0, 0, 0], 0),
    "no row of an expert": ([0, 0, 0], 5),
    "one row": ([0, 1, 0], 0),
    "a block less one": ([15, 15], 15),
    "a block": ([16, 16], 16),
    "a block and one": ([17, 17], 17),
    "all to one": ([0, 0, 70, 0], 0),
    "uneven, empty experts": ([3, 0, 33, 0, 18], 2),
}


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def poisoned(tensor: Tensor) -> Tensor:
    """A leaf with the same values, in the middle of NaNs."""
    buffer = torch.full((tensor.numel() + 2 * _MARGIN,), torch.nan, dtype=tensor.dtype)
    inside = buffer[_MARGIN : _MARGIN + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor).detach().requires_grad_()


@contextmanager
def guarded() -> Iterator[None]:
    """Every tensor allocated empty inside starts as NaN between two margins, which must come out untouched."""
    new_empty, empty_like, buffers = torch.Tensor.new_empty, torch.empty_like, []

    def guarded_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None, **more: str) -> Tensor:
        if more:
            # the interpreter's own bookkeeping names a device
            return new_empty(like, *shape, **more)
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = torch.full((shape.numel() + 2 * _MARGIN,), _CANARY, dtype=dtype or like.dtype)
        buffers.append(buffer)
        return buffer[_MARGIN : buffer.numel() - _MARGIN].view(shape).fill_(torch.nan)

    torch.Tensor.new_empty = guarded_empty
    torch.empty_like = lambda like: guarded_empty(like, *like.shape)
    try:
        yield
    finally:
        torch.Tensor.new_empty, torch.empty_like = new_empty, empty_like
    assert buffers, "nothing was allocated: the guard saw no kernel"
    for buffer in buffers:
        for margin in (buffer[:_MARGIN], buffer[-_MARGIN:]):
            assert bool((margin == margin.new_tensor(_CANARY)).all()), "a kernel wrote outside its output"


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value; infinite where found is not a number."""
    if not wanted.numel():
        return 0.0
    worst = (found.detach().double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return float(worst.nan_to_num(torch.inf))


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
        assert found.dtype == dtype and error(found, wanted) <= tolerance, (name, counts, error(found, wanted))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("D", "F"), [(40, 24), (7, 3)])
def test_forward_and_gradients_equal_fp64(name, D, F):
    check(*SHAPES[name], D, F)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_only_the_result(dtype):
    check(*SHAPES["uneven, empty experts"], 40, 24, dtype, tolerance=torch.finfo(dtype).eps)


def test_gradients_are_right_in_double_precision():
    x, w, offsets, _ = operands([2, 0, 3], 1, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, offsets), (x, w))


def test_docstring_example():
    y = grouped_gemm(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([[[2.0]], [[10.0]]]), offsets_of([1, 1]))
    assert y.tolist() == [[2.0], [30.0], [0.0]]


def test_rows_of_no_expert_neither_give_nor_get():
    x, w, offsets, dy = operands([3, 4], 2, 8, 8)
    with torch.no_grad():
        x[7:], dy[7:] = torch.nan, torch.nan
    y = grouped_gemm(x, w, offsets)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert not y[7:].any() and not dx[7:].any()
    assert all(t.isfinite().all() for t in (y, dx, dw))


def test_main_grad_takes_the_weight_gradient_by_addition():
    x, w, offsets, dy = operands([3, 0, 4], 2, 8, 16)
    main = torch.ones_like(w)
    grouped_gemm(x, w, offsets, main_grad_eFD=main).backward(dy)
    assert w.grad is None
    assert error(main, 1 + in_fp64(x, w, offsets, dy)[2]) < 1e-5


def test_recompute_gives_the_same_gradients():
    x, w, offsets, dy = operands([5, 0, 4], 0, 8, 8)
    plain = torch.autograd.grad(grouped_gemm(x, w, offsets), (x, w), dy)
    again = checkpoint(lambda x, w: grouped_gemm(x, w, offsets), x, w, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(again, (x, w), dy)))


def test_strided_and_expanded_operands():
    x, w, offsets, dy = operands([3, 0, 4], 1, 8, 16)
    wide = torch.randn(8, 8, requires_grad=True)
    y = grouped_gemm(wide.t(), w, offsets)
    assert error(y, reference.grouped_nt(wide.detach().double().t(), w.detach().double(), offsets)) < 1e-5
    one = torch.ones(8, 1).expand(8, 16)
    dx = torch.autograd.grad(grouped_gemm(x, w, offsets), x, one)[0]
    assert error(dx, in_fp64(x, w, offsets, one)[1]) < 1e-5


def test_host_products_leave_no_row_unwritten(monkeypatch):
    x, w, offsets, dy = operands([3, 0, 4], 6, 8, 8)
    garbage = torch.nn.functional.grouped_mm

    def dirty(*args, **kwargs):
        out = garbage(*args, **kwargs)
        if out.dim() == 2:
            out[7:] = torch.nan
        return out

    monkeypatch.setattr(host.F, "grouped_mm", dirty)
    with torch.no_grad():
        assert not host.grouped_nt(x, w, offsets)[7:].any()
        assert not host.grouped_nn(dy, w, offsets)[7:].any()


# ---- Triton, in the interpreter ------------------------------------------------------------------

TRITON_CASES: dict[str, Callable[[], None]] = {}


def triton_case(case: Callable[[], None]) -> Callable[[], None]:
    """Registers a case that runs on the Triton kernels between canaries."""

    def run() -> None:
        with dispatch.force("triton"), guarded():
            case()

    TRITON_CASES[case.__name__] = run
    return case


def _register_sizes() -> None:
    # widths that are whole blocks, end inside one, and are smaller than one
    for (name, shape), (D, F) in itertools.product(SHAPES.items(), [(32, 64), (40, 24)]):
        if sum(shape[0]) + shape[1]:
            case = lambda shape=shape, D=D, F=F: check(*shape, D, F)  # noqa: E731
            case.__name__ = f"{name}, {D} x {F}"
            triton_case(case)


_register_sizes()


@triton_case
def fp16_and_bf16_round_only_the_result() -> None:
    shape = SHAPES["uneven, empty experts"]
    check(*shape, 40, 24, torch.float16, tolerance=1e-3)
    # the interpreter truncates to bf16 where a GPU rounds
    check(*shape, 40, 24, torch.bfloat16, tolerance=1e-2)


@triton_case
def many_column_blocks_in_groups() -> None:
    check([70, 10, 50], 3, 24, 168)


@triton_case
def two_hundred_experts() -> None:
    check([n % 3 for n in range(200)], 1, 8, 8)


@triton_case
def any_number_of_programs() -> None:
    from megatron_ring.kernels.grouped_gemm import kernel

    before = kernel.num_programs
    try:
        for programs in (1, 7, 64):
            kernel.num_programs = lambda device, programs=programs: programs
            check([20, 0, 17], 4, 24, 72)
    finally:
        kernel.num_programs = before


@triton_case
def experts_do_not_see_each_others_rows_or_weights() -> None:
    x, w, offsets, dy = operands([5, 18, 7], 3, 24, 40)
    clean = in_fp64(x, w, offsets, dy)
    with torch.no_grad():
        # expert 1 owns rows 5 to 22; rows past 30 are nobody's
        x[5:23], w[1], dy[5:23], x[30:], dy[30:] = (torch.nan,) * 5
    y = grouped_gemm(x, w, offsets)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    mine = torch.tensor([*range(5), *range(23, 33)])
    assert error(y[mine], clean[0][mine]) < 1e-5 and error(dx[mine], clean[1][mine]) < 1e-5
    assert error(dw[[0, 2]], clean[2][[0, 2]]) < 1e-5


@triton_case
def main_grad_is_added_to() -> None:
    for dtype in (torch.float32, torch.float16):
        x, w, offsets, dy = operands([3, 0, 34], 2, 40, 72, dtype)
        main = torch.full(w.shape, 0.5)
        grouped_gemm(x, w, offsets, main_grad_eFD=main).backward(dy)
        assert w.grad is None and error(main, 0.5 + in_fp64(x, w, offsets, dy)[2]) < 1e-5


@triton_case
def strided_operands() -> None:
    _, w, offsets, dy = operands([20, 0, 4], 0, 24, 40)
    x = torch.randn(24, 24).t().requires_grad_()
    dy = dy[:, :1].expand(24, 40)
    y = grouped_gemm(x, w, offsets)
    found = (y, *torch.autograd.grad(y, (x, w), dy))
    assert all(error(a, b) < 1e-5 for a, b in zip(found, in_fp64(x, w, offsets, dy), strict=True))


def failures(cases: dict[str, Callable[[], None]], at_most: int | None = None) -> dict[str, str]:
    """Name and traceback of each case that fails, in order, stopping after ``at_most``."""
    failed: dict[str, str] = {}
    for name, case in cases.items():
        try:
            case()
        except Exception:
            failed[name] = traceback.format_exc(limit=-3)
            if len(failed) == at_most:
                break
    return failed


def run_interpreted(module: str) -> None:
    """Run a test module's Triton cases in their own, interpreting process."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main(cases: dict[str, Callable[[], None]]) -> int:
    """Run all cases and say which fail."""
    failed = failures(cases)
    for name, why in failed.items():
        print(f"FAILED {name}\n{why}")
    print(f"{len(cases) - len(failed)} of {len(cases)} cases hold")
    return bool(failed)


def test_triton_kernels_in_the_interpreter():
    run_interpreted("tests.kernels.test_grouped_gemm")


if __name__ == "__main__":
    sys.exit(main(TRITON_CASES))

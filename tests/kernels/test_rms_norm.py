"""rms_norm: every backend against fp64 maths differentiated by autograd."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_ring.kernels import dispatch, rms_norm
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter

# rows per block of the Triton kernels for 128 columns or fewer
BLOCK = 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    x, weight_D = random(*shape).to(dtype), random(shape[-1], seed=1).to(dtype)
    dy = random(*shape, seed=2).to(dtype)
    wide, wide_D = x.double().requires_grad_(), weight_D.double().requires_grad_()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * wide_D
    leaf, leaf_D = x.clone().requires_grad_(), weight_D.clone().requires_grad_()
    got = rms_norm(leaf, leaf_D, 1e-3)
    assert got.dtype == dtype
    assert relative_error(got, want) < tolerance
    wanted = torch.autograd.grad(want, [wide, wide_D], dy.double())
    for grad, expected in zip(torch.autograd.grad(got, [leaf, leaf_D], dy), wanted, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, expected) < tolerance


@pytest.mark.parametrize("tokens", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_row_block_edges(backend, tokens):
    check((tokens, 24))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 127, 128, 129])
def test_column_edges(backend, width):
    check((3, width))


def test_leading_dimensions_and_pitch(backend):
    check((2, 3, 16))
    x, weight_D = random(4, 2, 8), random(8, seed=1)
    assert torch.equal(rms_norm(x.transpose(0, 1), weight_D), rms_norm(x, weight_D).transpose(0, 1))


def test_more_rows_than_parts(backend):
    """Partial sums of the weight's gradient hold several row blocks each."""
    check((530 * BLOCK if backend != "triton" else 520, 2 if backend != "triton" else 2048))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
def test_other_dtypes(backend, dtype, tolerance):
    check((5, 40), dtype, tolerance)


def test_the_docstring_example_holds(backend):
    assert (
        relative_error(
            rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0),
            torch.tensor([0.848528, 2.262742]),
        )
        < 1e-5
    )


@pytest.mark.skipif(not dispatch.native_is_available(), reason="megatron_ring._C is not built")
def test_gradcheck_of_the_extension():
    leaves = random(4, 13).double().requires_grad_(), random(13, seed=1).double().requires_grad_()
    with dispatch.force("native"):
        assert gradcheck(lambda x_TD, weight_D: rms_norm(x_TD, weight_D, 1e-3), leaves)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")

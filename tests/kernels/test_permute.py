"""permute and combine: every backend against one-hot matrices in fp64."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ring.kernels import RouteIndex, combine, permute, route_index
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter

# tokens and columns per block of the Triton combine; permute's are 4 rows, 1024 columns
BLOCK_T, BLOCK_D = 2, 512


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(tokens: int, topk: int, experts: int) -> Tensor:
    """Expert ids, one in (experts + 1) of them dropped."""
    generator = torch.Generator().manual_seed(tokens + topk)
    return torch.randint(0, experts + 1, (tokens, topk), generator=generator)


def gather_matrix(index: RouteIndex) -> Tensor:
    """[N, T] of ones where the sorted row n is a copy of token t, from the positions alone."""
    tokens, topk = index.position_TK.shape
    matrix_NT = torch.zeros(tokens * topk, tokens, dtype=torch.float64)
    for t, k in (index.position_TK >= 0).nonzero().tolist():
        matrix_NT[index.position_TK[t, k], t] = 1
    return matrix_NT


def weighted_combine(index: RouteIndex, y_ND: Tensor, weights_TK: Tensor | None) -> Tensor:
    rows = []
    for t, positions in enumerate(index.position_TK.tolist()):
        row_D = torch.zeros(y_ND.shape[1], dtype=y_ND.dtype)
        for k, n in enumerate(positions):
            if n >= 0:
                row_D = row_D + y_ND[n] * (1 if weights_TK is None else weights_TK[t, k])
        rows.append(row_D)
    return torch.stack(rows) if rows else y_ND.new_zeros(0, y_ND.shape[1])


def check(tokens: int, width: int, topk: int, experts_TK: Tensor | None = None) -> None:
    experts_TK = choices(tokens, topk, 4) if experts_TK is None else experts_TK
    index = route_index(experts_TK, 4)
    x_TD = random(tokens, width).requires_grad_()
    x_ND = permute(x_TD, index)
    matrix_NT = gather_matrix(index)
    # copies are exact
    assert torch.equal(x_ND.detach().double(), matrix_NT @ x_TD.detach().double())
    dx_ND = random(tokens * topk, width, seed=1)
    (dx_TD,) = torch.autograd.grad(x_ND, x_TD, dx_ND)
    assert relative_error(dx_TD, matrix_NT.t() @ dx_ND.double()) < 1e-5

    y_ND, weights_TK = random(tokens * topk, width, seed=2), random(tokens, topk, seed=3)
    dout_TD = random(tokens, width, seed=4)
    for weighted in (True, False):
        leaves = [y_ND.clone().requires_grad_()] + [weights_TK.clone().requires_grad_()] * weighted
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        out_TD = combine(leaves[0], index, *leaves[1:])
        expected_TD = weighted_combine(index, wide[0], wide[1] if weighted else None)
        assert relative_error(out_TD, expected_TD) < 1e-5
        grads = torch.autograd.grad(out_TD, leaves, dout_TD)
        wanted = (
            torch.autograd.grad(expected_TD, wide, dout_TD.double(), allow_unused=True)
            if expected_TD.requires_grad
            else [None] * len(wide)
        )
        for grad, want, leaf in zip(grads, wanted, leaves, strict=True):
            assert relative_error(grad, torch.zeros_like(leaf) if want is None else want) < 1e-5


@pytest.mark.parametrize("tokens", [0, 1, BLOCK_T - 1, BLOCK_T, BLOCK_T + 1, 9])
def test_token_block_edges(backend, tokens):
    check(tokens, 20, 6)


@pytest.mark.parametrize("width", [1, 15, 16, 17, BLOCK_D - 1, BLOCK_D, BLOCK_D + 1, 2 * BLOCK_D + 1])
def test_column_block_edges(backend, width):
    check(3, width, 2)


@pytest.mark.parametrize("topk", [1, 3, 6, 8])
def test_any_number_of_choices(backend, topk):
    check(5, 8, topk)


def test_all_on_one_expert_and_all_dropped(backend):
    check(5, 8, 3, torch.full((5, 3), 2))
    check(5, 8, 3, torch.full((5, 3), 4))


def test_rows_of_dropped_slots_get_no_gradient(backend):
    index = route_index(torch.tensor([[0, 9], [9, 9]]), 4)
    y_ND = random(4, 8).requires_grad_()
    (dy_ND,) = torch.autograd.grad(combine(y_ND, index), y_ND, torch.ones(2, 8))
    assert dy_ND[0].eq(1).all()
    assert dy_ND[1:].eq(0).all()


def test_values_of_dropped_rows_are_never_read(backend):
    index = route_index(torch.tensor([[0, 9], [9, 9]]), 4)
    y_ND = torch.full((4, 8), torch.nan)
    y_ND[0] = 1
    assert combine(y_ND, index, torch.tensor([[2.0, torch.nan], [torch.nan, torch.nan]])).tolist() == [
        [2.0] * 8,
        [0.0] * 8,
    ]


def test_sixteen_bit_rows_are_summed_in_fp32(backend):
    """2048 + 7 x 1 is 2055, which rounds to 2056; summing in fp16 would stay at 2048."""
    index = route_index(torch.zeros(1, 8, dtype=torch.long), 1)
    y_ND = torch.ones(8, 17, dtype=torch.float16)
    y_ND[0] = 2048
    assert combine(y_ND, index).tolist() == [[2056.0] * 17]
    x_TD = torch.zeros(1, 17, dtype=torch.float16, requires_grad=True)
    permute(x_TD, index).backward(y_ND)
    assert x_TD.grad.tolist() == [[2056.0] * 17]


def test_bf16_rounds_once_to_nearest(backend):
    if INTERPRETED:
        pytest.skip("the interpreter truncates fp32 to bf16")
    index = route_index(torch.zeros(1, 8, dtype=torch.long), 1)
    y_ND = torch.ones(8, 17, dtype=torch.bfloat16)
    y_ND[0] = 256
    assert combine(y_ND, index).tolist() == [[264.0] * 17]


def test_rows_beyond_a_million(backend):
    """Row numbers above 2^20 arrive whole."""
    rows = 2**20 + 8
    y_ND = torch.arange(rows, dtype=torch.float32)[:, None].requires_grad_()
    position_TK = torch.tensor([[rows - 1, 2**20 + 1], [5, 2**20]])
    index = RouteIndex(
        torch.tensor([rows], dtype=torch.int32), torch.zeros(rows, dtype=torch.long), position_TK
    )
    out_TD = combine(y_ND, index)
    assert out_TD.flatten().tolist() == [rows - 1 + 2**20 + 1, 5 + 2**20]
    gather_N = torch.tensor([rows - 1, 2**20, 3])
    index = RouteIndex(torch.tensor([3], dtype=torch.int32), gather_N, position_TK)
    assert permute(y_ND.detach(), index).flatten().tolist() == gather_N.tolist()


def test_under_activation_recompute(backend):
    index = route_index(choices(5, 3, 4), 4)
    weights_TK = random(5, 3, seed=1)

    def layer(x_TD: Tensor) -> Tensor:
        return combine(permute(x_TD, index).sin(), index, weights_TK)

    x_TD = random(5, 8).requires_grad_()
    (plain,) = torch.autograd.grad(layer(x_TD).sum(), x_TD)
    (again,) = torch.autograd.grad(checkpoint(layer, x_TD, use_reentrant=False).sum(), x_TD)
    assert torch.equal(plain, again)


def test_the_docstring_examples_hold(backend):
    index = route_index(torch.tensor([[1, 0], [2, 1]]), 2)
    assert permute(torch.tensor([[1.0], [2.0]]), index).tolist() == [[1.0], [1.0], [2.0], [0.0]]
    y_ND = torch.tensor([[1.0], [10.0], [100.0], [7.0]])
    weights_TK = torch.tensor([[0.5, 2.0], [9.0, 0.1]])
    assert relative_error(combine(y_ND, index, weights_TK), torch.tensor([[7.0], [10.0]])) < 1e-6


def test_y_is_kept_only_for_the_gradient_of_the_weights():
    index = route_index(choices(5, 3, 4), 4)
    y_ND, weights_TK = random(15, 8).requires_grad_(), random(5, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        combine(y_ND, index, weights_TK)
        permute(y_ND[:5], index)
        assert y_ND.shape not in kept
        combine(y_ND, index, weights_TK.requires_grad_())
    assert kept.count(y_ND.shape) == 1


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")

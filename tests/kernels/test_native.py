"""What only the C++ extension has to prove: gradients in double precision, 16-bit conversions, threads, other
instruction sets, and refusals instead of stray reads. What it computes is proven beside the other backends.
"""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_ring.kernels import RouteIndex, combine, dispatch, permute, route, route_index, token_logprob
from tests.helpers.kernels.backends import ROOT

pytestmark = pytest.mark.skipif(not dispatch.native_is_available(), reason="megatron_ring._C is not built")
ops = torch.ops.megatron_ring


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "group_topk": 2}])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_gradcheck_route(score_function, groups):
    valid_T = torch.tensor([True, False, True, True])

    def differentiable(logits_TE: Tensor) -> tuple[Tensor, ...]:
        routing = route(
            logits_TE, topk=3, score_function=score_function, scaling_factor=2.5, valid_T=valid_T, **groups
        )
        return routing.probs_TK, routing.prob_sum_E, routing.z_sum

    assert gradcheck(differentiable, random(4, 12).requires_grad_())


@pytest.mark.parametrize("width", [1, 5, 16, 37])
def test_gradcheck_permute_and_combine(width):
    index = route_index(torch.tensor([[0, 2, 3], [1, 3, 0], [2, 1, 0]]), 3)
    assert gradcheck(lambda x_TD: permute(x_TD, index), random(3, width).requires_grad_())
    y_ND, weights_TK = random(9, width).requires_grad_(), random(3, 3, seed=1).requires_grad_()
    assert gradcheck(lambda y_ND, weights_TK: combine(y_ND, index, weights_TK), (y_ND, weights_TK))
    assert gradcheck(lambda y_ND: combine(y_ND, index), y_ND)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradcheck_token_logprob(with_entropy):
    targets_T = torch.tensor([0, -100, 17, 18, 8])

    def differentiable(logits_TV: Tensor) -> tuple[Tensor, ...]:
        values = token_logprob(
            logits_TV, targets_T, temperature=0.7, vocab_size=18, with_entropy=with_entropy
        )
        return tuple(value for value in values if value is not None)

    assert gradcheck(differentiable, random(5, 20).requires_grad_())


def identity(values_N: Tensor) -> Tensor:
    """Every value through a load, a product with 1 and a store."""
    position_TK = torch.arange(1)[:, None]
    offsets_E = torch.ones(1, dtype=torch.int32)
    index = RouteIndex(offsets_E, torch.zeros(1, dtype=torch.long), position_TK)
    return combine(values_N[None], index)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sixteen_bit_value_survives_a_load_and_a_store(dtype):
    bits_N = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values_N = bits_N.view(dtype)
    result_N = identity(values_N)
    nan_N = values_N.isnan()
    assert torch.equal(result_N.isnan(), nan_N)
    same_N = result_N.view(torch.int16) == bits_N
    # 0 + -0 is 0
    assert (same_N | nan_N | (values_N == 0)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stores_round_to_nearest_even_as_torch_does(dtype):
    """Products of two 16-bit values, at every magnitude: subnormal, tie, overflow."""
    x_N = (random(20_011).mul(random(20_011, seed=1).mul(6).exp())).to(dtype)
    index = RouteIndex(
        torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.long), torch.zeros(1, 1).long()
    )
    for weight in (1 / 3, 1.5, 1e-5, 2**-14, 3e4, 1 + 2**-9):
        weights_TK = torch.tensor([[weight]], dtype=torch.float32)
        expected_N = (x_N.float() * weights_TK[0]).to(dtype)
        assert torch.equal(combine(x_N[None], index, weights_TK)[0].nan_to_num(), expected_N.nan_to_num())


def test_results_do_not_depend_on_the_number_of_threads():
    logits_TE, experts_TK = random(700, 64, dtype=torch.float32), torch.randint(0, 64, (70_000, 2))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf_TE = logits_TE.clone().requires_grad_()
            routing = route(leaf_TE, topk=6, score_function="sigmoid")
            (grad_TE,) = torch.autograd.grad((routing.prob_sum_E * torch.arange(64)).sum(), leaf_TE)
            results.append([*routing, *route_index(experts_TK, 64), grad_TE])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_large_index_is_sorted_in_parts():
    experts_TK = torch.randint(-1, 9, (60_000, 3), generator=torch.Generator().manual_seed(0))
    index = route_index(experts_TK, 8)
    from megatron_ring.kernels.route_index import reference

    for got, want in zip(index, reference.route_index(experts_TK, 8), strict=True):
        assert torch.equal(got, want)


INT32 = torch.int32
LOCAL = torch.zeros(2, dtype=torch.long)
STRAY: dict[str, Callable[[], object]] = {
    "is outside 0..1": lambda: ops.permute_rows(
        torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([2], dtype=INT32)
    ),
    "position 4 is not below 4": lambda: ops.combine_rows(torch.zeros(4, 3), torch.tensor([[0, 4]]), None),
    "offsets end at row 9 of 4": lambda: ops.combine_rows_backward(
        torch.zeros(1, 3), torch.tensor([[0, 1]]), torch.tensor([9], dtype=INT32), None, None, 4
    ),
    "weights must have the shape": lambda: ops.combine_rows(
        torch.zeros(4, 3), torch.tensor([[0, 1]]), torch.zeros(2, 2)
    ),
    "target column 7 is not below 5": lambda: ops.token_logprob_partials(
        torch.zeros(2, 5), LOCAL + 7, 5, 1.0
    ),
    "columns <= V": lambda: ops.token_logprob_partials(torch.zeros(2, 5), LOCAL, 6, 1.0),
    "is not a float type": lambda: ops.token_logprob_partials(torch.zeros(2, 5).int(), LOCAL, 5, 1.0),
    "must be fp32 or fp64": lambda: ops.route(
        torch.zeros(2, 5).half(), 2, False, None, 0, 0, 1.0, None, None
    ),
    "one bias per expert": lambda: ops.route(
        torch.zeros(2, 5), 2, True, torch.zeros(4), 0, 0, 1.0, None, None
    ),
    "a bool per token": lambda: ops.route(
        torch.zeros(2, 5), 2, False, None, 0, 0, 1.0, torch.ones(3, dtype=torch.bool), None
    ),
    "must be int64": lambda: ops.route_index(torch.zeros(2, 2, dtype=INT32), 4),
}


@pytest.mark.parametrize("words", STRAY)
def test_arguments_that_do_not_belong_together_are_refused(words):
    with pytest.raises(RuntimeError, match=words.replace("(", r"\(")):
        STRAY[words]()


@pytest.mark.skipif(os.environ.get("MEGATRON_RING_ISA") == "baseline", reason="this is that process")
def test_the_narrow_vectors_of_other_processors():
    """Everything native again, as a processor without AVX2 runs it."""
    environment = {**os.environ, "MEGATRON_RING_ISA": "baseline", "OMP_NUM_THREADS": "1"}
    files = [f"tests/kernels/test_{name}.py" for name in ("native", "routing", "permute", "token_logprob")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "300",
        *files,
    ]
    done = subprocess.run(
        [*command, "-k", "(native or test_this) and not interpreter"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_this_process_runs_the_instruction_set_it_was_told():
    wanted = os.environ.get("MEGATRON_RING_ISA")
    assert (
        ops.instruction_set() == "baseline"
        if wanted == "baseline"
        else ops.instruction_set() in ("avx2", "baseline")
    )

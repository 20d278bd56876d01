"""route: every backend against fp64 maths; choices and counts bit for bit."""

import pytest
import torch
from torch import Tensor

from megatron_ring.errors import ConfigError
from megatron_ring.kernels import route
from megatron_ring.kernels.routing import reference
from tests.helpers.kernels.backends import INTERPRETED, relative_error, run_in_the_interpreter

# tokens per block of the Triton kernels for 16 experts or fewer
BLOCK = 32
DEFAULTS = {
    "expert_bias_E": None,
    "num_groups": 0,
    "group_topk": 0,
    "scaling_factor": 1.0,
    "valid_T": None,
    "replay_TK": None,
}


def random_logits(tokens: int, experts: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    return torch.randn(tokens, experts, generator=generator) * scale


def cotangents(tokens: int, topk: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(tokens, topk, generator=generator),
        torch.randn(experts, generator=generator),
        torch.randn((), generator=generator),
    )


def check(logits_TE: Tensor, topk: int, score_function: str, **options) -> None:
    """Outputs and the gradient within 1e-5 of fp64 maths differentiated by autograd; choices bit-exact."""
    options = DEFAULTS | options
    wide_TE = logits_TE.double().requires_grad_()
    expected = reference.route(wide_TE, topk, score_function == "sigmoid", **options)
    leaf_TE = logits_TE.clone().requires_grad_()
    actual = route(leaf_TE, topk=topk, score_function=score_function, **options)
    assert torch.equal(actual.experts_TK, expected[1])
    assert torch.equal(actual.counts_E, expected[2])
    for index in (0, 3, 4):
        assert relative_error(actual[index], expected[index]) < 1e-5
    grads = cotangents(*actual.probs_TK.shape, logits_TE.shape[1])
    (want_TE,) = torch.autograd.grad([expected[i] for i in (0, 3, 4)], wide_TE, [g.double() for g in grads])
    (got_TE,) = torch.autograd.grad([actual[i] for i in (0, 3, 4)], leaf_TE, grads)
    assert relative_error(got_TE, want_TE) < 1e-5


@pytest.mark.parametrize("tokens", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_six_of_sixteen_at_block_edges(backend, score_function, tokens):
    check(random_logits(tokens, 16), 6, score_function)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("experts", "topk", "num_groups", "group_topk"),
    [(16, 8, 4, 2), (10, 3, 5, 2), (3, 2, 3, 2), (7, 7, 0, 0), (10, 1, 5, 2), (3, 1, 3, 2), (7, 1, 0, 0)],
)
def test_groups_bias_scaling_and_padding(backend, experts, topk, num_groups, group_topk, score_function):
    bias_E = torch.linspace(-0.3, 0.3, experts)
    valid_T = torch.arange(9) % 3 != 1
    groups = {"num_groups": num_groups, "group_topk": group_topk}
    check(
        random_logits(9, experts),
        topk,
        score_function,
        expert_bias_E=bias_E,
        valid_T=valid_T,
        scaling_factor=2.5,
        **groups,
    )


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_one_missing_cotangent_is_a_zero(backend, score_function):
    logits_TE = random_logits(5, 8)
    for present in ((0,), (3,), (4,), (0, 4)):
        grads = dict(zip((0, 3, 4), cotangents(5, 2, 8), strict=True))
        wide_TE, leaf_TE = logits_TE.double().requires_grad_(), logits_TE.clone().requires_grad_()
        expected = reference.route(wide_TE, 2, score_function == "sigmoid", *DEFAULTS.values())
        actual = route(leaf_TE, topk=2, score_function=score_function)
        (want_TE,) = torch.autograd.grad(
            [expected[i] for i in present], wide_TE, [grads[i].double() for i in present]
        )
        (got_TE,) = torch.autograd.grad([actual[i] for i in present], leaf_TE, [grads[i] for i in present])
        assert relative_error(got_TE, want_TE) < 1e-5


def weights_of_one(logits_TE: Tensor, experts_T1: Tensor, score_function: str, scaling: float) -> Tensor:
    """The published gates with one expert per token: its score as it is, 0 where there is no such expert."""
    scores_TE = (
        torch.softmax(logits_TE, 1) if score_function == "softmax" else 1 / (1 + torch.exp(-logits_TE))
    )
    zero_T1 = torch.zeros_like(scores_TE[:, :1])
    return scaling * torch.cat([scores_TE, zero_T1], 1).gather(1, experts_T1)


def check_one(logits_TE: Tensor, experts_T1: Tensor, score_function: str, scaling: float, **options) -> None:
    """Experts, weights and the logits' gradient through the weights alone, against fp64 autograd of the formula."""
    wide_TE, leaf_TE = logits_TE.double().requires_grad_(), logits_TE.clone().requires_grad_()
    expected_T1 = weights_of_one(wide_TE, experts_T1, score_function, scaling)
    actual = route(leaf_TE, topk=1, score_function=score_function, scaling_factor=scaling, **options)
    assert torch.equal(actual.experts_TK, experts_T1)
    assert relative_error(actual.probs_TK, expected_T1) < 1e-5
    grad_T1 = cotangents(*experts_T1.shape, logits_TE.shape[1])[0]
    (want_TE,) = torch.autograd.grad(expected_T1, wide_TE, grad_T1.double())
    (got_TE,) = torch.autograd.grad(actual.probs_TK, leaf_TE, grad_T1)
    assert relative_error(got_TE, want_TE) < 1e-5
    kept_T = experts_T1[:, 0] < logits_TE.shape[1]
    reached_TE = got_TE.count_nonzero(1) == (logits_TE.shape[1] if score_function == "softmax" else 1)
    assert torch.equal(reached_TE, kept_T)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tokens", [0, 1, BLOCK + 1])
def test_weights_that_are_not_renormalised_are_the_scores(backend, score_function, tokens):
    """Choices, statistics and their gradients are those of the renormalised gate."""
    logits_TE, valid_T = random_logits(tokens, 7), torch.arange(tokens) % 3 != 1
    options = {"topk": 3, "score_function": score_function, "scaling_factor": 2.5, "valid_T": valid_T}
    wide_TE, leaf_TE = logits_TE.double().requires_grad_(), logits_TE.clone().requires_grad_()
    usual, actual = route(leaf_TE, **options), route(leaf_TE, renormalise=False, **options)
    assert all(torch.equal(a, b) for a, b in zip(usual[1:], actual[1:], strict=True))
    expected_TK = weights_of_one(wide_TE, actual.experts_TK, score_function, 2.5)
    assert relative_error(actual.probs_TK, expected_TK) < 1e-5
    with torch.no_grad():
        assert torch.equal(route(leaf_TE, renormalise=False, **options).probs_TK, actual.probs_TK)
    grads = cotangents(tokens, 3, 7)
    (want_TE,) = torch.autograd.grad(expected_TK, wide_TE, grads[0].double())
    (got_TE,) = torch.autograd.grad(actual.probs_TK, leaf_TE, grads[0], retain_graph=True)
    assert relative_error(got_TE, want_TE) < 1e-5
    both = (actual.probs_TK, actual.prob_sum_E, actual.z_sum)
    (all_TE,) = torch.autograd.grad(both, leaf_TE, grads)
    (statistics_TE,) = torch.autograd.grad((usual.prob_sum_E, usual.z_sum), leaf_TE, grads[1:])
    assert relative_error(all_TE, got_TE + statistics_TE) < 1e-5


def test_replayed_experts_that_are_not_renormalised_have_their_scores(backend):
    logits_TE = random_logits(2, 5)
    replay_TK = torch.tensor([[4, 0], [5, 2]])
    routing = route(logits_TE, topk=2, renormalise=False, replay_TK=replay_TK)
    assert torch.equal(routing.experts_TK, replay_TK) and routing.probs_TK[1, 0] == 0
    expected_TK = weights_of_one(logits_TE.double(), replay_TK, "softmax", 1.0)
    assert relative_error(routing.probs_TK, expected_TK) < 1e-5


@pytest.mark.parametrize("tokens", [1, BLOCK + 1])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_one_expert_is_weighed_by_its_score(backend, score_function, tokens):
    logits_TE = random_logits(tokens, 7)
    check_one(logits_TE, logits_TE.argmax(1, keepdim=True), score_function, 1.0)
    check(logits_TE, 1, score_function, scaling_factor=2.5)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_one_expert_of_biased_groups_is_weighed_without_the_bias(backend, score_function):
    logits_TE, valid_T = random_logits(9, 10), torch.arange(9) % 3 != 1
    bias_E = torch.linspace(0.6, -0.6, 10)
    scores_TE = logits_TE.softmax(1) if score_function == "softmax" else logits_TE.sigmoid()
    rows = (scores_TE + bias_E).tolist()
    chosen = [by_hand(row, 1, 5, 2) if valid else [10] for row, valid in zip(rows, valid_T, strict=True)]
    assert chosen != logits_TE.argmax(1, keepdim=True).where(valid_T[:, None], 10).tolist()
    options = {"expert_bias_E": bias_E, "num_groups": 5, "group_topk": 2, "valid_T": valid_T}
    check_one(logits_TE, torch.tensor(chosen), score_function, 2.5, **options)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_one_replayed_expert_has_its_score_however_small(backend, score_function):
    """Row by row, so that a large weight hides no small one."""
    logits_TE = random_logits(1, 7).repeat(5, 1)
    logits_TE[:, 2] = -60
    for t, expert in enumerate([2, 0, 7, -1, 6]):
        row_1E, replay_11 = logits_TE[t : t + 1], torch.tensor([[expert]])
        kept_11 = torch.tensor([[expert if 0 <= expert < 7 else 7]])
        check_one(row_1E, kept_11, score_function, 1.5, replay_TK=replay_11)
    replay_T1 = torch.tensor([[2], [0], [7], [-1], [6]])
    kept_T1 = torch.tensor([[2], [0], [7], [7], [7]])
    check_one(logits_TE, kept_T1, score_function, 1.5, replay_TK=replay_T1, valid_T=torch.arange(5) < 4)


def test_one_replayed_expert_without_any_score_has_no_weight_and_no_gradient(backend):
    logits_TE = torch.tensor([[0.0, -400.0, 3.0]]).requires_grad_()
    routing = route(logits_TE, topk=1, replay_TK=torch.tensor([[1]]))
    (grad_TE,) = torch.autograd.grad(routing.probs_TK.sum(), logits_TE)
    assert routing.probs_TK.tolist() == [[0.0]] and grad_TE.tolist() == [[0.0] * 3]
    assert routing.counts_E.tolist() == [0, 1, 0]


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_gradients_are_those_of_small_differences(backend, score_function, topk):
    logits_TE = random_logits(3, 5).double().requires_grad_()
    options = {"replay_TK": torch.tensor([[4, 1], [5, 0], [2, 3]])[:, :topk], "valid_T": torch.arange(3) < 2}

    def outputs(logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = route(logits_TE, topk=topk, score_function=score_function, scaling_factor=2.5, **options)
        return routing.probs_TK, routing.prob_sum_E, routing.z_sum

    assert torch.autograd.gradcheck(outputs, logits_TE)


def by_hand(selection_E: list[float], topk: int, num_groups: int = 0, group_topk: int = 0) -> list[int]:
    """Best experts first, lowest index among equals, by sorting in Python."""
    ids = range(len(selection_E))
    if num_groups:
        size = len(selection_E) // num_groups
        score = [sum(sorted(selection_E[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
        best = sorted(range(num_groups), key=lambda g: (-score[g], g))[:group_topk]
        ids = [e for e in ids if e // size in best]
    return sorted(ids, key=lambda e: (-selection_E[e], e))[:topk]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_groups", "group_topk"), [(0, 0), (4, 2)])
def test_the_lowest_index_wins_every_tie(backend, score_function, num_groups, group_topk):
    generator = torch.Generator().manual_seed(3)
    # 0, 1 and 3: no sum of two sigmoids equals another
    logits_TE = torch.tensor([0.0, 1.0, 3.0])[torch.randint(0, 3, (40, 16), generator=generator)]
    actual = route(
        logits_TE, topk=6, score_function=score_function, num_groups=num_groups, group_topk=group_topk
    )
    scores_TE = logits_TE if not num_groups else logits_TE.exp()
    if score_function == "sigmoid":
        scores_TE = logits_TE.sigmoid()
    # rounding makes equal what is equal in exact arithmetic
    rows = scores_TE.double().round(decimals=5).tolist()
    assert actual.experts_TK.tolist() == [by_hand(row, 6, num_groups, group_topk) for row in rows]


def test_tied_biased_scores_are_weighed_without_the_bias(backend):
    """Where the boundary ties after the bias, weights still come from the scores before it."""
    logits_TE = torch.tensor([[0.0, 2.0, 0.0, -40.0]])
    tie = torch.sigmoid(torch.tensor(2.0)).item() - 0.5
    bias_E = torch.tensor([tie, 0.0, tie, 0.0])
    routing = route(logits_TE, topk=2, score_function="sigmoid", expert_bias_E=bias_E)
    scores = torch.sigmoid(logits_TE[0].double())[routing.experts_TK[0]]
    assert relative_error(routing.probs_TK[0], scores / scores.sum()) < 1e-6
    bias_E = torch.tensor([0.75, 0.0, 0.0, 0.0])
    routing = route(torch.zeros(1, 4), topk=2, score_function="sigmoid", expert_bias_E=bias_E)
    assert routing.experts_TK.tolist() == [[0, 1]]
    assert routing.probs_TK.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_all_tokens_on_one_expert(backend, score_function):
    logits_TE = random_logits(33, 16)
    logits_TE[:, 5] += 40
    routing = route(logits_TE, topk=6, score_function=score_function)
    assert routing.counts_E[5] == 33
    check(logits_TE, 1, score_function)
    check(logits_TE, 6, score_function)


def test_logits_far_below_zero_keep_their_order_and_weights(backend):
    logits_TE = torch.tensor([[-400.0, -500.0, -401.0, 0.0]])
    routing = route(logits_TE, topk=3)
    assert routing.experts_TK.tolist() == [[3, 0, 2]]
    replayed = route(logits_TE, topk=2, replay_TK=torch.tensor([[0, 2]]))
    assert relative_error(replayed.probs_TK[0], torch.tensor([1.0, 0.0]).add(-400).softmax(0)) < 1e-5


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_replay_of_its_own_choice_changes_nothing(backend, score_function):
    logits_TE = random_logits(12, 16)
    first = route(logits_TE, topk=6, score_function=score_function)
    again = route(logits_TE, topk=6, score_function=score_function, replay_TK=first.experts_TK.int())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_replay_of_others_drops_what_is_no_expert(backend, score_function):
    replay_TK = torch.tensor([[0, 15, 3], [16, 2, -1], [16, 16, 16], [7, 8, 9]])
    valid_T = torch.tensor([True, True, True, False])
    check(random_logits(4, 16), 3, score_function, replay_TK=replay_TK, valid_T=valid_T)
    routing = route(
        random_logits(4, 16), topk=3, score_function=score_function, replay_TK=replay_TK, valid_T=valid_T
    )
    assert routing.experts_TK.tolist() == [[0, 15, 3], [16, 2, 16], [16] * 3, [16] * 3]
    assert routing.probs_TK[2:].count_nonzero() == 0
    assert routing.counts_E.sum() == 4


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)]
)
def test_other_dtypes(backend, dtype, tolerance, topk):
    logits_TE = random_logits(6, 8).to(dtype).requires_grad_()
    routing = route(logits_TE, topk=topk)
    assert routing.probs_TK.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (grad_TE,) = torch.autograd.grad(routing.probs_TK[:, 0].sum(), logits_TE)
    assert grad_TE.dtype == dtype
    wide_TE = logits_TE.detach().double().requires_grad_()
    expected = reference.route(wide_TE, topk, False, *DEFAULTS.values())
    (want_TE,) = torch.autograd.grad(expected[0][:, 0].sum(), wide_TE)
    assert relative_error(grad_TE, want_TE) < tolerance


def test_the_docstring_example_holds(backend):
    logits_TE = torch.tensor([[1.0, 0.0, 1.0], [9.0, 9.0, 9.0]])
    routing = route(logits_TE, topk=2, valid_T=torch.tensor([True, False]))
    assert routing.probs_TK.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert routing.experts_TK.tolist() == [[0, 2], [3, 3]]
    assert routing.counts_E.tolist() == [1, 0, 1]
    routing = route(torch.ones(1, 2), topk=1)
    assert routing.probs_TK.tolist() == [[0.5]] and routing.experts_TK.tolist() == [[0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": 9}, "topk=9 must be in 1..num_experts=8"),
        ({"topk": 2, "score_function": "relu"}, "score_function='relu'"),
        ({"topk": 2, "num_groups": 3, "group_topk": 1}, "num_groups=3 must divide num_experts=8"),
        ({"topk": 2, "num_groups": 4, "group_topk": 5}, "group_topk=5"),
        ({"topk": 3, "num_groups": 4, "group_topk": 1}, "have fewer than topk=3"),
        ({"topk": 2, "replay_TK": torch.zeros(4, 3, dtype=torch.long)}, "replay of shape (4, 3)"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, words):
    with pytest.raises(ConfigError) as refused:
        route(torch.zeros(4, 8), **options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "triton and not interpreter")

"""Every token of the budget lies in exactly one loss mask, and what is left is known by where it begins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.run import RunConfig
from megatron_ring.rl.batch.planner import MinibatchPlanner, Plan
from megatron_ring.rl.types import Response, Rollout
from tests.helpers.rl.collecting import session
from tests.helpers.rl.rollouts import rollout, step_of

PHI = 40
VOCAB = 1_000


def config(**settings) -> RunConfig:
    return config_from_mapping(
        {
            "token_budget": PHI,
            "minibatches_per_step": 2,
            "microbatch_capacity": 48,
            "max_prompt_length": 8,
            "max_response_length": 24,
            **settings,
        }
    )


def trained(plan: Plan) -> list[list[int]]:
    """Per minibatch, the labels that carry loss."""
    return [[int(t) for m in grid for t in m.labels_T[m.loss_mask_T > 0]] for grid in plan.grids]


@pytest.mark.parametrize("overshoot", ["token", "response", "carry"])
def test_the_loss_masks_hold_exactly_phi_tokens_at_every_step(overshoot):
    planner = MinibatchPlanner.of(config(budget_overshoot=overshoot), session())
    carried: list[Rollout] = []
    for step in range(4):
        new = step_of(step, groups=4)
        offered = {r.response.key: (0, r) for r in new} | {r.response.key: (r.start, r) for r in carried}
        plan = planner.plan(new, carried, step=step)
        sizes = [len(part) for part in trained(plan)]
        if overshoot == "response":
            assert all(PHI <= size < PHI + 19 for size in sizes)
        else:
            assert sizes == [PHI, PHI]
        assert plan.metrics["c3po/selected"] == sum(sizes) and plan.shortfall == 0
        every = Counter(t for part in trained(plan) for t in part)
        assert max(every.values()) == 1, "a token was trained on twice"
        unused = Counter(int(t) for start, r in offered.values() for t in r.response.tokens_R[start:])
        assert every <= unused
        if overshoot == "carry":
            left = Counter(int(t) for r in plan.carried for t in r.response.tokens_R[r.start :])
            assert every + left == unused, "a token was lost"
        else:
            assert plan.carried == []
        carried = [r for r in plan.carried if r.carried < 2] if overshoot == "carry" else []


def test_a_shortfall_is_counted():
    planner = MinibatchPlanner.of(config(), session())
    short = planner.plan(step_of(0)[:3], [], 0)
    tokens = sum(r.response.length for r in step_of(0)[:3])
    assert short.shortfall == 2 * PHI - tokens == short.metrics["c3po/shortfall"]
    assert sum(map(len, trained(short))) == tokens
    nothing = planner.plan([], [], 0)
    assert nothing.shortfall == 2 * PHI and trained(nothing) == [[], []]
    assert [len(grid) for grid in nothing.grids] == [1, 1], "every rank takes part with padding"


@st.composite
def lengths_of_a_step(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(prompt tokens of each group, response tokens of each response), 4 to a group; their ratio is from 0.01 to 100."""
    groups = draw(st.integers(1, 40))
    ratio = draw(st.sampled_from([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0]))
    longest = draw(st.integers(1, 100))
    response = max(int(min(longest, longest / ratio)), 1)
    prompt_tokens = max(int(min(longest, longest * ratio)), 1)
    prompts = draw(st.lists(st.integers(1, prompt_tokens), min_size=groups, max_size=groups))
    responses = draw(st.lists(st.integers(1, response), min_size=4 * groups, max_size=4 * groups))
    return prompts, responses


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    lengths=lengths_of_a_step(),
    dp_size=st.sampled_from([1, 2, 3, 8, 64]),
    stages=st.sampled_from([1, 2, 4]),
    overshoot=st.sampled_from(["token", "response", "carry"]),
    minibatches=st.integers(1, 3),
    share=st.floats(0.05, 1.5),
)
def test_what_is_selected_is_trained_on_whatever_the_lengths(
    lengths, dp_size, stages, overshoot, minibatches, share
):
    """Over all ranks: every selected token lies in exactly one loss mask, Phi of them in every minibatch."""
    prompts, responses = lengths
    phi = max(int(share * sum(responses) / minibatches), 1)
    made = [
        sized(index // 4, index % 4, prompts[index // 4], length) for index, length in enumerate(responses)
    ]
    settings = config(
        token_budget=phi,
        minibatches_per_step=minibatches,
        budget_overshoot=overshoot,
        microbatch_capacity=200,
        max_prompt_length=100,
        max_response_length=100,
    )
    plan, grids = plan_on_all_ranks(settings, made, dp_size, stages)
    selected = plan.metrics["c3po/selected"]
    masks = [sum(m.num_loss_tokens for rank in grids for m in rank[number]) for number in range(minibatches)]
    assert sum(masks) == selected
    there = sum(responses)
    for number, size in enumerate(masks):
        if overshoot == "response":
            assert size >= min(phi, there - sum(masks[:number]))
        elif sum(responses) >= phi * minibatches and overshoot == "carry":
            assert size == phi
        else:
            assert size == phi or plan.shortfall
    for number in range(minibatches):
        counts = {len(rank[number]) for rank in grids}
        assert len(counts) == 1 and counts.pop() % stages == 0


@pytest.mark.parametrize(
    ("prompt_tokens", "length", "limits", "phi", "capacity"),
    [
        (1000, 1000, (2048, 22528), 409_600, 32_768),
        (200, 150, (1024, 8192), 65_536, 16_384),
    ],
)
def test_short_answers_to_long_prompts_are_all_trained_on(prompt_tokens, length, limits, phi, capacity):
    """Responses much shorter than the longest allowed bring more prompts along than an estimate would expect."""
    count = -(-phi // length) + 8
    made = [sized(i // 4, i % 4, prompt_tokens, length) for i in range(-(-count // 4) * 4)]
    settings = config(
        token_budget=phi,
        minibatches_per_step=1,
        microbatch_capacity=capacity,
        max_prompt_length=limits[0],
        max_response_length=limits[1],
    )
    plan, grids = plan_on_all_ranks(settings, made, 1, 1)
    trained_tokens = sum(m.num_loss_tokens for rank in grids for m in rank[0])
    assert trained_tokens == plan.metrics["c3po/selected"] == phi
    assert plan.metrics["packing/fill"] > 0.9


def sized(uid: int, sample: int, prompt_tokens: int, length: int) -> Rollout:
    made = rollout(uid % 8, sample % 3, 1)
    response = Response(
        prompt_uid=uid,
        sample=sample,
        tokens_R=np.zeros(length, np.int32),
        logprobs_R=np.full(length, -0.5, np.float32),
        versions_R=np.zeros(length, np.int32),
        stop="eos",
    )
    return replace(
        made,
        prompt=replace(made.prompt, uid=uid, tokens=(5,) * prompt_tokens),
        response=response,
        advantages_R=np.ones(length, np.float32),
    )


def plan_on_all_ranks(settings: RunConfig, made: list[Rollout], dp_size: int, stages: int):
    """The plan of ``dp_size`` ranks, and each rank's microbatches, worked out in this process."""
    where = session()
    where.topology.pp_size, where.topology.vpp_size = stages, 2 if stages > 1 else 1
    planner = MinibatchPlanner.of(settings, where)
    # what every rank is told is the same wherever a rollout lies; here all of them lie on this one
    planner.dp_size = dp_size
    of_ranks = [[] for _ in range(dp_size)]
    build = planner._build

    def build_on_all_ranks(rollouts, picks, grid, step, *, weights_moved):
        for planner.dp_rank, of_rank in enumerate(of_ranks):
            of_rank.append(build(rollouts, picks, grid, step, weights_moved=weights_moved))
        planner.dp_rank = 0
        return of_ranks[0][-1]

    planner._exchange = lambda own, metas, _wanted: {i: own[m.local_index] for i, m in enumerate(metas)}
    planner._build = build_on_all_ranks
    return planner.plan(made, [], 0), of_ranks


def test_without_a_budget_every_token_is_trained_on():
    planner = MinibatchPlanner.of(config(token_budget=0, microbatch_capacity=32), session())
    for step in range(3):
        new = step_of(step)
        plan = planner.plan(new, [], step=step)
        every = Counter(t for part in trained(plan) for t in part)
        assert every == Counter(int(t) for r in new for t in r.response.tokens_R)
        assert [sum(m.num_responses for m in grid) for grid in plan.grids] == [5, 4]
        assert plan.shortfall == 0
    assert trained(planner.plan([], [], 0)) == [[], []]


def test_without_a_budget_responses_without_advantage_can_be_left_out_too():
    planner = MinibatchPlanner.of(config(token_budget=0, zero_advantage="exclude"), session())
    new = step_of(0)
    same = [replace(r, advantages_R=np.zeros_like(r.advantages_R)) if r.prompt.uid < 2 else r for r in new]
    plan = planner.plan(same, [], step=0)
    kept = Counter(int(t) for r in same if r.prompt.uid >= 2 for t in r.response.tokens_R)
    assert Counter(t for part in trained(plan) for t in part) == kept
    assert plan.excluded == sum(r.response.length for r in same if r.prompt.uid < 2)


@pytest.mark.parametrize("treatment", ["count", "exclude"])
def test_responses_without_advantage(treatment):
    planner = MinibatchPlanner.of(config(zero_advantage=treatment), session())
    plain = step_of(0, groups=4)
    same = [replace(r, advantages_R=np.zeros_like(r.advantages_R)) if r.prompt.uid < 2 else r for r in plain]
    plan = planner.plan(same, [], step=0)
    zeros = {int(t) for r in same if r.prompt.uid < 2 for t in r.response.tokens_R}
    hit = zeros & {t for part in trained(plan) for t in part}
    if treatment == "exclude":
        assert not hit and plan.metrics["c3po/excluded"] == len(zeros)
    else:
        assert hit and plan.metrics["c3po/excluded"] == 0
        assert trained(plan) == trained(planner.plan(plain, [], step=0)), "advantages must not choose"


def test_the_carried_go_on_where_they_were_cut_until_they_are_too_old():
    planner = MinibatchPlanner.of(
        config(budget_overshoot="carry", minibatches_per_step=1, rollout_max_staleness=2), session()
    )
    new = step_of(0, groups=5)
    plan = planner.plan(new, [], step=0)
    cut = [r for r in plan.carried if r.start]
    assert len(cut) == 1 and all(r.carried == 1 for r in plan.carried)
    for step in (1, 2):
        before = plan
        plan = planner.plan([], plan.carried, step=step)
        first = trained(plan)[0]
        rest = [int(t) for r in before.carried if r.start for t in r.response.tokens_R[r.start :]]
        assert set(rest) <= set(first), "what was cut opens the next step"
        assert plan.metrics["c3po/carried_in"] == plan.metrics["c3po/sampled"]
        assert (plan.stale > 0) == (step == 2)
    assert plan.carried == [], "offered for the second time, they are not kept for a third"
    assert plan.carried_tokens == 0 and plan.stale > 0 and plan.metrics["c3po/responses_carried"] == 0


def test_a_response_is_as_old_as_its_oldest_token():
    """What C3PO++ interrupted was old before it was carried: both waits count against one bound."""
    planner = MinibatchPlanner.of(
        config(budget_overshoot="carry", minibatches_per_step=1, rollout_max_staleness=2), session()
    )
    new = step_of(0, groups=5)
    for place, each in enumerate(new):
        each.response.versions_R[:] = 5
        each.response.versions_R[0] = 3 + place % 3
    plan = planner.plan(new, [], step=5)
    kept = {r.response.versions_R[0] for r in plan.carried}
    assert kept == {4, 5}, "at step 6 version 3 would be three versions old"
    assert plan.stale > 0
    assert plan.carried_tokens == sum(r.unused for r in plan.carried) > 0


def test_context_before_the_cut_is_there_but_carries_no_loss():
    planner = MinibatchPlanner.of(config(budget_overshoot="carry", minibatches_per_step=1), session())
    whole = rollout(0, 1, 12)
    (grid,) = planner.plan([], [replace(whole, start=7, carried=1)], step=0).grids
    (microbatch,) = [m for m in grid if m.num_responses]
    sequence = [*whole.prompt.tokens, *whole.response.tokens_R.tolist()]
    assert microbatch.tokens_T[: len(sequence) - 1].tolist() == sequence[:-1]
    assert microbatch.labels_T[microbatch.loss_mask_T > 0].tolist() == sequence[-5:]


@pytest.mark.parametrize("budget", [0, PHI])
def test_a_response_without_tokens_is_left_out(budget):
    planner = MinibatchPlanner.of(config(token_budget=budget), session())
    new = step_of(0, groups=4)
    with_empty = [*new[:5], rollout(50, 0, 0), *new[5:], rollout(50, 1, 0)]
    assert trained(planner.plan(with_empty, [], step=3)) == trained(planner.plan(new, [], step=3))


def test_arrival_is_an_order_that_no_layout_changes():
    """Earlier steps first, then earlier rounds, then who needed fewer tokens, wherever a response was sampled."""
    made = [
        replace(rollout(uid, sample, 10), arrival=(step, turn, new))
        for uid, sample, step, turn, new in (
            (0, 0, 4, 1, 9),
            (0, 1, 4, 1, 3),
            (1, 0, 3, 1, 8),
            (1, 1, 4, 2, 1),
            (2, 0, 4, 1, 3),
        )
    ]
    order = [(1, 0), (0, 1), (2, 0), (0, 0), (1, 1)]
    planner = MinibatchPlanner.of(
        config(budget_order="arrival", token_budget=10, minibatches_per_step=5), session()
    )
    for listed in (made, made[::-1]):
        plan = planner.plan(listed, [], step=4)
        first = {40 * ((3 * uid + sample) % 24): (uid, sample) for uid, sample in order}
        assert [first[min(part)] for part in trained(plan)] == order

"""Every token of the budget lies in exactly one loss mask, and what is left is known by where it begins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_ring.config.load import config_from_mapping
from megatron_ring.config.run import RunConfig
from megatron_ring.rl.minibatches import Carried, MinibatchPlanner, Plan
from megatron_ring.rl.types import Response, RewardResult, Rollout
from tests.rl.collecting import prompt, session

PHI = 40
VOCAB = 1_000


def config(**settings) -> RunConfig:
    return config_from_mapping(
        {
            "token_budget": PHI,
            "minibatches_per_step": 2,
            "microbatch_capacity": 48,
            "microbatch_reserve": 0.5,
            "max_prompt_length": 8,
            "max_response_length": 24,
            **settings,
        }
    )


def rollout(uid: int, sample: int, length: int, advantage: float = 1.0) -> Rollout:
    """Its tokens tell which response and which place they are: 40 * response + place."""
    first = 40 * ((3 * uid + sample) % 24)
    response = Response(
        prompt_uid=uid,
        sample=sample,
        tokens_R=np.arange(first, first + length, dtype=np.int32),
        logprobs_R=np.full(length, -0.5, np.float32),
        versions_R=np.zeros(length, np.int32),
        stop="eos",
    )
    return Rollout(
        prompt=prompt(uid),
        response=response,
        reward=RewardResult(score=float(sample % 2), status="correct" if sample % 2 else "wrong"),
        advantages_R=np.full(length, advantage, np.float32),
    )


def step_of(number: int, groups: int = 3, **changes) -> list[Rollout]:
    """Nine responses of 3 to 19 tokens."""
    uids = range(groups * number, groups * (number + 1))
    return [rollout(uid, s, 3 + (7 * uid + 5 * s) % 17, **changes) for uid in uids for s in range(3)]


def trained(plan: Plan) -> list[list[int]]:
    """Per minibatch, the labels that carry loss."""
    return [[int(t) for m in grid for t in m.labels_T[m.loss_mask_T > 0]] for grid in plan.grids]


def shapes(plan: Plan) -> list[int]:
    return [len(grid) for grid in plan.grids]


@pytest.mark.parametrize("overshoot", ["token", "response", "carry"])
def test_the_loss_masks_hold_exactly_phi_tokens_at_every_step(overshoot):
    planner = MinibatchPlanner(config(budget_overshoot=overshoot), session())
    carried: list[Carried] = []
    grid_shapes = set()
    for step in range(4):
        new = step_of(step, groups=4)
        offered = {r.response.key: (0, r) for r in new} | {
            c.rollout.response.key: (c.start, c.rollout) for c in carried
        }
        plan = planner.plan(new, carried, step=step)
        assert plan.metrics["packing/dropped_sequences"] == 0
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
            left = Counter(int(t) for c in plan.carried for t in c.rollout.response.tokens_R[c.start :])
            assert every + left == unused, "a token was lost"
        else:
            assert plan.carried == []
        carried = [c for c in plan.carried if c.steps < 2] if overshoot == "carry" else []
        grid_shapes.add(tuple(shapes(plan)))
    assert len(grid_shapes) == 1, "the grid is static"


def test_a_shortfall_is_counted_and_the_grid_keeps_its_shape():
    planner = MinibatchPlanner(config(), session())
    full, short = planner.plan(step_of(0, groups=4), [], 0), planner.plan(step_of(0)[:3], [], 0)
    tokens = sum(r.response.length for r in step_of(0)[:3])
    assert short.shortfall == 2 * PHI - tokens == short.metrics["c3po/shortfall"]
    assert shapes(short) == shapes(full) and sum(map(len, trained(short))) == tokens
    nothing = planner.plan([], [], 0)
    assert nothing.shortfall == 2 * PHI and trained(nothing) == [[], []] and shapes(nothing) == shapes(full)


def test_without_a_budget_every_token_is_trained_on():
    planner = MinibatchPlanner(config(token_budget=0, microbatch_capacity=32), session())
    for step in range(3):
        new = step_of(step)
        plan = planner.plan(new, [], step=step)
        every = Counter(t for part in trained(plan) for t in part)
        assert every == Counter(int(t) for r in new for t in r.response.tokens_R)
        assert [sum(m.num_responses for m in grid) for grid in plan.grids] == [5, 4]
        assert plan.metrics["packing/dropped_sequences"] == 0 and plan.shortfall == 0
    assert trained(planner.plan([], [], 0)) == [[], []]


def test_what_finds_no_room_is_counted_over_both_minibatches():
    planner = MinibatchPlanner(config(microbatch_reserve=0.0, microbatch_capacity=32), session())
    # one token each: every slot of the grid goes to prompts, which the estimate takes to be longer than answers
    planner.num_microbatches = 1
    new = [rollout(uid, sample, 5) for uid in range(8) for sample in range(3)]
    plan = planner.plan(new, [], step=0)
    placed = sum(m.num_responses for grid in plan.grids for m in grid)
    used = plan.metrics["c3po/responses_used"]
    assert plan.metrics["packing/dropped_sequences"] == used - placed > 0
    missing = plan.metrics["c3po/selected"] - sum(map(len, trained(plan)))
    assert plan.metrics["packing/dropped_tokens"] == missing + 2 * (used - placed)


@pytest.mark.parametrize("treatment", ["count", "aside"])
def test_responses_without_advantage(treatment):
    planner = MinibatchPlanner(config(zero_advantage=treatment), session())
    plain = step_of(0, groups=4)
    same = [replace(r, advantages_R=np.zeros_like(r.advantages_R)) if r.prompt.uid < 2 else r for r in plain]
    plan = planner.plan(same, [], step=0)
    zeros = {int(t) for r in same if r.prompt.uid < 2 for t in r.response.tokens_R}
    hit = zeros & {t for part in trained(plan) for t in part}
    if treatment == "aside":
        assert not hit and plan.metrics["c3po/set_aside"] == len(zeros)
    else:
        assert hit and plan.metrics["c3po/set_aside"] == 0
        assert trained(plan) == trained(planner.plan(plain, [], step=0)), "advantages must not choose"


def test_the_carried_go_on_where_they_were_cut_until_they_are_too_old():
    planner = MinibatchPlanner(
        config(budget_overshoot="carry", minibatches_per_step=1, rollout_max_staleness=2), session()
    )
    new = step_of(0, groups=5)
    plan = planner.plan(new, [], step=0)
    cut = [c for c in plan.carried if c.start]
    assert len(cut) == 1 and all(c.steps == 1 for c in plan.carried)
    for step in (1, 2):
        before = plan
        plan = planner.plan([], plan.carried, step=step)
        first = trained(plan)[0]
        rest = [int(t) for c in before.carried if c.start for t in c.rollout.response.tokens_R[c.start :]]
        assert set(rest) <= set(first), "what was cut opens the next step"
        assert plan.metrics["c3po/carried_in"] == plan.metrics["c3po/sampled"]
        assert (plan.metrics["c3po/carried_stale"] > 0) == (step == 2)
    assert plan.carried == [], "offered for the second time, they are not kept for a third"
    assert plan.metrics["c3po/carried_stale"] == plan.metrics["c3po/carried"]


def test_a_response_is_as_old_as_its_oldest_token():
    """What C3PO++ interrupted was old before it was carried: both waits count against one bound."""
    planner = MinibatchPlanner(
        config(budget_overshoot="carry", minibatches_per_step=1, rollout_max_staleness=2), session()
    )
    new = step_of(0, groups=5)
    for place, each in enumerate(new):
        each.response.versions_R[:] = 5
        each.response.versions_R[0] = 3 + place % 3
    plan = planner.plan(new, [], step=5)
    kept = {c.rollout.response.versions_R[0] for c in plan.carried}
    assert kept == {4, 5}, "at step 6 version 3 would be three versions old"
    assert 0 < plan.metrics["c3po/carried_stale"] < plan.metrics["c3po/carried"]


def test_context_before_the_cut_is_there_but_carries_no_loss():
    planner = MinibatchPlanner(config(budget_overshoot="carry", minibatches_per_step=1), session())
    whole = rollout(0, 1, 12)
    (grid,) = planner.plan([], [Carried(whole, 7, 1)], step=0).grids
    (microbatch,) = [m for m in grid if m.num_responses]
    sequence = [*whole.prompt.tokens, *whole.response.tokens_R.tolist()]
    assert microbatch.tokens_T[: len(sequence) - 1].tolist() == sequence[:-1]
    assert microbatch.labels_T[microbatch.loss_mask_T > 0].tolist() == sequence[-5:]


@pytest.mark.parametrize("budget", [0, PHI])
def test_a_response_without_tokens_is_left_out(budget):
    planner = MinibatchPlanner(config(token_budget=budget), session())
    new = step_of(0, groups=4)
    with_empty = [*new[:5], rollout(50, 0, 0), *new[5:], rollout(50, 1, 0)]
    assert trained(planner.plan(with_empty, [], step=3)) == trained(planner.plan(new, [], step=3))

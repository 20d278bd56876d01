"""From prompts to judged groups: nobody is forgotten, nobody asked twice, verifiers work meanwhile."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RolloutError
from megatron_ring.rl.collect.collector import StepRollouts
from megatron_ring.rl.reward.workers.pool import RewardPool
from megatron_ring.rl.rollout.protocol import RolloutBudget
from tests.helpers.rl.collecting import ScriptedEngine, collector, keys, prompt, saved, session, wanted_length


def test_every_prompt_is_answered_group_size_times():
    engine = ScriptedEngine()
    found = collector(engine).collect(version=0)
    assert keys(found.groups) == [[(uid, sample) for sample in range(3)] for uid in range(4)]
    assert found.generated_tokens == sum(wanted_length(u, s) for u in range(4) for s in range(3))
    assert [r.arrival for r in found.rollouts] == [
        (0, 1, wanted_length(*r.response.key)) for r in found.rollouts
    ]
    for rollout in found.rollouts:
        assert rollout.prompt.uid == rollout.response.prompt_uid
        assert rollout.reward.score == rollout.response.length % 2
    assert engine.budgets == [None] and found.rounds == 1


def test_data_parallel_ranks_share_the_prompts():
    asked = []
    for rank in range(2):
        engine = ScriptedEngine()
        collector(engine, where=session(dp_size=2, dp_rank=rank)).collect(version=0)
        asked.append({request.prompt.uid for request in engine.calls[0]})
    assert asked == [{0, 2}, {1, 3}]


def test_verifiers_begin_before_generation_ends():
    engine = ScriptedEngine()
    collector(engine).collect(version=0)
    assert engine.log.index("submit") < engine.log.index("end")
    assert engine.log[:4] == ["yield", "submit", "yield", "submit"]


def test_what_was_interrupted_goes_on_and_new_prompts_fill_the_rest():
    engine = ScriptedEngine()
    source = collector(engine, rollout_token_budget=20)
    generated, groups = 0, []
    for version in range(8):
        engine.publish(version)
        open_before = {g.prompt.uid: dict(g.unfinished) for g in source.state.pending.open.values()}
        finished_before = {g.prompt.uid: set(g.finished) for g in source.state.pending.open.values()}
        drawn = source.state.prompts.drawn
        found = source.collect(version)
        assert source.state.prompts.drawn - drawn == 4 - len(open_before)
        asked = {(r.prompt.uid, r.sample): r.prefix for r in engine.calls[-1]}
        for uid, prefixes in open_before.items():
            assert {s for u, s in asked if u == uid} == set(range(3)) - finished_before[uid]
            for sample, prefix in prefixes.items():
                assert asked[uid, sample] is prefix and prefix.length
        assert list(asked) == sorted(asked), "the oldest prompts go first"
        assert 20 <= found.generated_tokens < 20 + engine.slots
        generated += found.generated_tokens
        groups += keys(found.groups)
    held = source.state.pending.num_tokens
    assert held == found.open_after
    left = sum(wanted_length(uid, sample) for group in groups for uid, sample in group)
    assert generated == left + held, "a token was counted twice or never"
    assert len(groups) > 4 and len({group[0][0] for group in groups}) == len(groups)


def test_a_budget_comes_with_the_sequences_that_are_sure_to_end_within_it():
    engine = ScriptedEngine()
    source = collector(engine, rollout_token_budget=40)
    found = source.collect(version=0)
    source.refill(found, 1)
    assert engine.budgets == [RolloutBudget(tokens=40, concurrency=2)] * 2
    engine = ScriptedEngine()
    collector(engine).collect(version=0)
    assert engine.budgets == [None]


def test_a_continued_response_remembers_who_sampled_what():
    engine = ScriptedEngine(lambda uid, sample: 6, slots=1)
    source = collector(engine, rollout_token_budget=4, prompts_per_step=1, group_size=2)
    found = StepRollouts(version=0)
    for version in range(3):
        engine.publish(version)
        found = source.collect(version)
    (group,) = found.groups
    assert [r.response.versions_R.tolist() for r in group] == [[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]]
    assert [r.response.tokens_R.tolist() for r in group] == [list(range(6))] * 2
    # the first ended in step 1, after two of its tokens; the second in step 2, after four
    assert [r.arrival for r in found.rollouts] == [(1, 1, 2), (2, 1, 4)]


def test_what_is_too_old_is_dropped_and_counted():
    engine = ScriptedEngine(lambda uid, sample: 100 if sample == 0 else 2, slots=1)
    source = collector(engine, rollout_token_budget=8, prompts_per_step=1, rollout_max_staleness=1)
    first = source.collect(0)
    assert not first.groups and first.stale_responses == 0
    engine.publish(1)
    second = source.collect(1)
    assert second.stale_responses == 0 and not second.groups
    engine.publish(2)
    third = source.collect(2)
    assert third.stale_responses == 1
    assert keys(third.groups) == [[(0, 1), (0, 2)]], "the others are compared without it"
    generated = sum(found.generated_tokens for found in (first, second, third))
    # nothing vanishes: what was given up is counted where it was dropped
    assert third.stale_tokens > 0 and third.open_before == second.open_after
    assert generated == third.num_tokens + third.stale_tokens + third.open_after


def test_a_member_that_is_left_alone_is_counted_with_the_stale():
    engine = ScriptedEngine(lambda uid, sample: 100 if sample == 0 else 2, slots=1)
    source = collector(
        engine, rollout_token_budget=8, prompts_per_step=1, group_size=2, rollout_max_staleness=0
    )
    first = source.collect(0)
    engine.publish(1)
    second = source.collect(1)
    assert not first.groups and not second.groups and second.stale_responses == 1
    generated = first.generated_tokens + second.generated_tokens
    assert generated == second.stale_tokens + second.open_after
    assert second.stale_tokens == first.open_after + 2, (
        "the prefix, and the response that it was compared with"
    )


def test_uninformative_groups_are_replaced_by_new_prompts():
    engine = ScriptedEngine()

    def score(prompt, text):
        return 1.0 if prompt.uid in (1, 2) else by_place(text)

    def by_place(text):
        return float(len(text.split()) > 4)

    found = collector(engine, score, dynamic_sampling=True).collect(version=0)
    assert len(found.groups) >= 4 and found.rounds > 1
    assert {1, 2}.isdisjoint(group[0].prompt.uid for group in found.groups)
    assert found.uninformative_groups >= 2
    assert found.excluded_tokens == found.generated_tokens - found.num_tokens > 0
    for group in found.groups:
        assert len({rollout.reward.score for rollout in group}) == 2
    # each round draws what is missing, no more
    assert len(engine.calls[1]) % 3 == 0 and len(engine.calls[1]) < len(engine.calls[0])


def test_refilling_gives_up_in_one_line():
    source = collector(ScriptedEngine(), lambda *_: 1.0, dynamic_sampling=True, dynamic_sampling_max_rounds=3)
    with pytest.raises(RolloutError) as refused:
        source.collect(version=0)
    line = str(refused.value)
    assert "found 0 of prompts_per_step=4" in line and "3 rounds" in line and "\n" not in line
    assert source.state.prompts.drawn == 12


def test_dynamic_sampling_keeps_to_the_tokens_of_a_step():
    engine = ScriptedEngine(lambda uid, sample: 3)
    source = collector(engine, lambda *_: 1.0, dynamic_sampling=True, rollout_token_budget=40)
    found = source.collect(version=0)
    # 36 tokens answer all four prompts alike; 4 are left for the next four, which then wait
    assert [budget.tokens for budget in engine.budgets if budget] == [40, 4]
    assert found.generated_tokens <= 40 + engine.slots and found.uninformative_groups == 4
    source.collect(version=1)
    assert {r.prompt.uid for r in engine.calls[2]} == {4, 5, 6, 7}, "those that wait come first"
    engine = ScriptedEngine(lambda uid, sample: 3)
    source = collector(engine, lambda *_: 1.0, dynamic_sampling=True, rollout_token_budget=36)
    assert source.collect(version=0).groups == []
    assert [budget.tokens for budget in engine.budgets if budget] == [
        36
    ] and source.state.prompts.drawn == 4, "without a token left nothing more is drawn"


def test_steps_that_end_by_their_tokens_and_teach_nothing_end_the_run():
    uninformative = True

    def score(prompt, text):
        return 1.0 if uninformative else float(len(text.split()) % 2)

    options = {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 3, "rollout_token_budget": 36}
    source = collector(ScriptedEngine(lambda uid, sample: 3), score, **options)
    for version in range(2):
        assert source.collect(version).uninformative_groups == 4
    # the count survives a checkpoint, and one group with different rewards starts it anew
    again = collector(ScriptedEngine(lambda uid, sample: 2 + sample), score, **options)
    again.state.load_state_dict(*saved([source]), session().topology)
    assert again.state.steps_without_signal == 2
    uninformative = False
    assert again.collect(2).groups and again.state.steps_without_signal == 0
    uninformative = True
    with pytest.raises(RolloutError, match=r"found 0 of prompts_per_step=4 .* in each of 3 steps"):
        source.collect(2)


def test_a_refill_adds_to_the_step():
    engine = ScriptedEngine()
    source = collector(engine)
    found = source.collect(version=0)
    before = found.generated_tokens
    source.refill(found, 2)
    assert keys(found.groups)[4:] == [[(4, 0), (4, 1), (4, 2)], [(5, 0), (5, 1), (5, 2)]]
    assert found.generated_tokens - before == sum(wanted_length(u, s) for u in (4, 5) for s in range(3))
    assert found.rounds == 2 and len(found.rollouts) == 18


def test_a_refill_of_an_interrupted_step_draws_no_more_than_is_missing():
    engine = ScriptedEngine(lambda uid, sample: 9)
    source = collector(engine, rollout_token_budget=12)
    found = source.collect(version=0)
    waiting = len(source.state.pending.open)
    for _ in range(3):
        source.refill(found, 4)
    assert waiting == 4 and source.state.prompts.drawn <= 4 + len(found.groups), (
        "the groups in the making are enough"
    )


def test_what_a_refill_finds_is_no_barren_step():
    source = collector(ScriptedEngine(), dynamic_sampling=True, rollout_token_budget=36)
    source.state.steps_without_signal = 2
    found = source.collect(version=0)
    source.state.steps_without_signal = 2
    source.refill(found, 4)
    assert found.groups and source.state.steps_without_signal == 0


def test_one_response_to_a_prompt_is_a_group_where_a_critic_judges():
    found = collector(ScriptedEngine(), group_size=1).collect(version=0)
    assert keys(found.groups) == [[(uid, 0)] for uid in range(4)]


def test_a_response_without_tokens_is_an_answer_like_any_other():
    found = collector(ScriptedEngine(lambda uid, sample: 0 if sample == 1 else 3)).collect(version=0)
    assert keys(found.groups) == [[(uid, sample) for sample in range(3)] for uid in range(4)]
    assert [r.reward.score for r in found.groups[0]] == [1.0, 0.0, 1.0]


def test_an_engine_that_fails_ends_the_step_and_the_pool_is_closed():
    engine = ScriptedEngine()
    engine.fails_after = 5
    source = collector(engine)
    threads = threading.active_count()
    config = RewardConfig(reward_functions=("toy=tests.helpers.e2e.toy_reward:even",), reward_workers=1)
    toy = replace(prompt(0), domain="toy")
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(RewardPool.open(config, {"toy"}))
        source.sampler.rewards = SimpleNamespace(submit=lambda _, text: pool.submit(toy, text))
        with pytest.raises(RolloutError, match="went away"), stack:
            source.collect(version=0)
    assert engine.log == ["yield"] * 5
    assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(toy, "x")


def test_open_groups_survive_a_checkpoint_at_another_number_of_ranks():
    engine = ScriptedEngine()
    source = collector(engine, rollout_token_budget=20)
    source.collect(version=0)
    state, read = saved([source])
    resumed = []
    for rank in range(2):
        other = collector(engine, where=session(dp_size=2, dp_rank=rank), rollout_token_budget=20)
        other.state.load_state_dict(state, read, session(2, rank).topology)
        assert all(uid % 2 == rank for uid in other.state.pending.open)
        resumed += other.state.pending.wanted()

    def told(entries) -> list:
        return sorted(
            (p.uid, p.text, sample, () if prefix is None else tuple(prefix.versions_R.tolist()))
            for p, sample, prefix in entries
        )

    assert told(resumed) == told(source.state.pending.wanted()) and any(prefix for *_, prefix in resumed)

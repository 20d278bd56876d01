"""Open groups: whole, once, in order, and what is unfinished goes on."""

from __future__ import annotations

import numpy as np

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.collect.pending import PendingGroups, is_informative
from megatron_ring.rl.rollout_io import (
    prompt_from_json,
    prompt_to_json,
    rollouts_from_bytes,
    rollouts_to_bytes,
)
from megatron_ring.rl.types import Response, RewardResult, Rollout


def prompt(uid: int) -> Prompt:
    return Prompt(uid=uid, domain="math", text=f"{uid} = ?", tokens=(3, uid, 4), reference={"answer": "x"})


def response(uid: int, sample: int, length: int = 3, version: int = 0, stop: str = "eos") -> Response:
    return Response(
        prompt_uid=uid,
        sample=sample,
        tokens_R=np.arange(length, dtype=np.int32),
        logprobs_R=-np.arange(length, dtype=np.float32) / 7,
        versions_R=np.full(length, version, dtype=np.int32),
        stop=stop,
    )


def judged(response: Response, reward: RewardResult) -> Rollout:
    return Rollout(prompt=prompt(response.prompt_uid), response=response, reward=reward)


RIGHT = RewardResult(score=1.0, status="correct")
WRONG = RewardResult(score=0.0, status="wrong", detail="7 is not 8 \N{SNOWMAN}")


def test_a_group_leaves_whole_and_once_whatever_the_order_of_arrival():
    book = PendingGroups(3)
    book.draw([prompt(5), prompt(6)])
    for uid, sample in [(6, 2), (5, 1), (6, 0), (6, 1), (5, 2)]:
        book.finish(judged(response(uid, sample), RIGHT if sample else WRONG))
    (group,), alone = book.take_complete()
    assert alone == []
    assert [r.response.key for r in group] == [(6, 0), (6, 1), (6, 2)]
    assert book.take_complete() == ([], [])
    book.finish(judged(response(5, 0), RIGHT))
    (group,), alone = book.take_complete()
    assert alone == []
    assert [r.response.sample for r in group] == [0, 1, 2]
    assert not book.open


def test_an_interrupted_response_is_wanted_with_its_prefix():
    book = PendingGroups(2)
    book.draw([prompt(1)])
    cut = response(1, 1, length=4, stop="unfinished")
    book.interrupt(cut)
    book.interrupt(response(1, 0, length=0, stop="unfinished"))
    assert [(p.uid, sample, prefix) for p, sample, prefix in book.wanted()] == [(1, 0, None), (1, 1, cut)]


def test_a_stale_prefix_is_dropped_and_its_group_goes_on_without_it():
    book = PendingGroups(3)
    book.draw([prompt(1)])
    book.interrupt(response(1, 0, length=4, version=2, stop="unfinished"))
    book.interrupt(response(1, 1, length=5, version=3, stop="unfinished"))
    assert [r.length for r in book.drop_stale(oldest_version=3)] == [4]
    assert book.num_tokens == 5
    book.finish(judged(response(1, 1), RIGHT))
    book.finish(judged(response(1, 2), WRONG))
    (group,), alone = book.take_complete()
    assert alone == []
    assert [r.response.sample for r in group] == [1, 2]


def test_a_member_that_waits_too_long_for_its_group_is_dropped_too():
    book = PendingGroups(3)
    book.draw([prompt(1)])
    book.finish(judged(response(1, 0, length=4, version=2), RIGHT))
    book.finish(judged(response(1, 1, length=5, version=3), WRONG))
    assert [r.key for r in book.drop_stale(oldest_version=3)] == [(1, 0)]
    book.finish(judged(response(1, 2, version=4), RIGHT))
    (group,), alone = book.take_complete()
    assert [r.response.sample for r in group] == [1, 2] and alone == []


def test_a_group_of_one_says_nothing_and_is_counted():
    book = PendingGroups(2)
    book.draw([prompt(1)])
    book.interrupt(response(1, 0, length=4, version=0, stop="unfinished"))
    assert [r.length for r in book.drop_stale(oldest_version=1)] == [4]
    book.finish(judged(response(1, 1, length=6), RIGHT))
    groups, alone = book.take_complete()
    assert groups == [] and [r.response.length for r in alone] == [6] and book.num_tokens == 0


def test_contents_restore_the_book():
    book = PendingGroups(2)
    book.draw([prompt(1), prompt(2)])
    book.finish(judged(response(1, 0), RIGHT))
    book.interrupt(response(2, 1, length=4, stop="unfinished"))
    prompts, finished, unfinished = book.contents()
    other = PendingGroups(2)
    assert book.num_tokens == 7
    other.restore(prompts, [sorted(g.waiting) for g in book.open.values()], finished, unfinished)
    assert other.num_tokens == 7
    assert other.wanted() == book.wanted()
    assert other.contents() == book.contents()


def test_only_groups_with_different_rewards_are_informative():
    members = [Rollout(prompt=prompt(1), response=response(1, s), reward=RIGHT) for s in range(2)]
    assert not is_informative(members)
    members.append(Rollout(prompt=prompt(1), response=response(1, 2), reward=WRONG))
    assert is_informative(members)


def test_rollouts_survive_as_bytes_bit_for_bit():
    routes = np.arange(5 * 2 * 2, dtype=np.int16).reshape(5, 2, 2)
    with_routes = response(1, 0)
    object.__setattr__(with_routes, "routes_SLK", routes)
    rollouts = [
        Rollout(prompt=prompt(1), response=with_routes, reward=WRONG),
        Rollout(
            prompt=prompt(2),
            response=response(2, 3, length=0, stop="unfinished"),
            reward=RIGHT,
            advantages_R=np.empty(0, np.float32),
        ),
        Rollout(
            prompt=prompt(2),
            response=response(2, 1, length=2),
            reward=RIGHT,
            arrival=(7, 1, 2),
            advantages_R=np.float32([0.1, -0.3]),
            values_R=np.float32([0.4, 0.5]),
            returns_R=np.float32([0.5, 0.2]),
        ),
    ]
    for given, back in zip(rollouts, rollouts_from_bytes(rollouts_to_bytes(rollouts)), strict=True):
        assert back.prompt == given.prompt
        assert back.reward == given.reward
        for name in ("sample", "stop", "prompt_uid"):
            assert getattr(back.response, name) == getattr(given.response, name)
        for name in ("tokens_R", "logprobs_R", "versions_R", "routes_SLK"):
            ours, theirs = getattr(back.response, name), getattr(given.response, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or (ours.dtype == theirs.dtype and np.array_equal(ours, theirs))
        assert back.arrival == given.arrival
        for name in ("advantages_R", "values_R", "returns_R"):
            ours, theirs = getattr(back, name), getattr(given, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or np.array_equal(ours, theirs)
    assert rollouts_from_bytes(rollouts_to_bytes([])) == []


def test_a_prompt_of_an_older_checkpoint_is_told_by_its_last_turn():
    values = prompt_to_json(prompt(3))
    del values["asked"]
    assert prompt_from_json(values).asked == ("3 =",)

"""A step whose responses nobody could judge is said, with the commonest reason; and so are held-out problems."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ring.data.prompts.same_problem import asked
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl import alarms
from megatron_ring.rl.alarms import AGAIN_AFTER, Alarms, say_held_out
from megatron_ring.rl.types import Response, RewardResult, Rollout


def prompt(uid: int = 0, domain: str = "math", text: str = "1+1") -> Prompt:
    return Prompt(uid=uid, domain=domain, text=text, tokens=(1,), reference={}, asked=asked([text]))


def rollout(domain: str, status: Any, detail: str) -> Rollout:
    empty = np.zeros(0, np.int32)
    response = Response(
        prompt_uid=0,
        sample=0,
        tokens_R=empty,
        logprobs_R=empty.astype(np.float32),
        versions_R=empty,
        stop="eos",
    )
    return Rollout(
        prompt=prompt(0, domain),
        response=response,
        reward=RewardResult(score=0.0, status=status, detail=detail),
    )


@pytest.fixture
def session(monkeypatch) -> Any:
    """The writer of two data-parallel ranks; the other one's code problems all failed alike."""
    other = [["code", "no sandbox", 5]]
    monkeypatch.setattr(alarms, "gather_json", lambda own, group, device: [own, other])
    groups = SimpleNamespace(dp=None)
    return SimpleNamespace(is_log_rank=True, topology=SimpleNamespace(groups=groups), device=None)


def check(alarm: Alarms, step: int, shares: dict[str, float], own: Sequence[Rollout] = ()) -> None:
    alarm.check(step, mismatch=None, shortfall=0, status_shares=shares, rollouts=own)


def said(caplog) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


@pytest.mark.parametrize("status", ["verifier_error", "parse_error"])
def test_a_status_that_dominates_is_said_with_its_commonest_detail(session, caplog, status):
    caplog.set_level(logging.WARNING)
    own = [
        rollout("math", status, "cannot be read"),
        rollout("math", status, "other"),
        rollout("math", "correct", ""),
    ]
    alarm = Alarms(session, 0.1)
    check(alarm, 3, {status: 0.75}, own)
    (line,) = said(caplog)
    assert line.startswith(
        f"step 3: {status} in 75% of the responses, most often in domain code: no sandbox; "
    )
    for step in range(4, 3 + AGAIN_AFTER):
        check(alarm, step, {status: 1.0}, own)
    assert said(caplog) == [], "once"
    check(alarm, 3 + AGAIN_AFTER, {status: 1.0}, own)
    assert len(said(caplog)) == 1, "and again later"


def test_half_is_not_dominant_and_each_kind_is_said_by_itself(session, caplog):
    caplog.set_level(logging.WARNING)
    alarm = Alarms(session, 0.1)
    check(alarm, 1, {"verifier_error": 0.5, "parse_error": 0.5})
    assert said(caplog) == []
    check(alarm, 2, {"verifier_error": 0.6})
    check(alarm, 3, {"parse_error": 0.6})
    assert len(said(caplog)) == 2


def test_other_alarms_are_the_writers(session, caplog):
    caplog.set_level(logging.WARNING)
    Alarms(session, 0.1).check(1, mismatch=0.2, shortfall=7, status_shares={}, rollouts=[])
    assert [line[:20] for line in said(caplog)] == ["step 1: rollout and ", "step 1: 7 of the tok"]
    session.is_log_rank = False
    shares = {"parse_error": 1.0}
    Alarms(session, 0.1).check(1, mismatch=0.2, shortfall=7, status_shares=shares, rollouts=[])
    assert said(caplog) == []


def test_a_checkpoint_that_carries_what_is_held_out_now_says_so(caplog):
    caplog.set_level(logging.WARNING)
    carried = [prompt(1, text="1 + 1 ?"), prompt(1, text="1 + 1 ?"), prompt(2, text="2 + 2")]
    say_held_out(carried, [prompt(9, text="1 + 1")])
    (line,) = said(caplog)
    assert "responses to problems that --eval-prompt-data holds out now (1, such as: 1 + 1 ?)" in line
    say_held_out(carried, [prompt(9, text="3 + 3")])
    assert said(caplog) == []

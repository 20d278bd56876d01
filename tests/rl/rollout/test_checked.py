"""An engine of a user's own is held to its contract: whatever it gives that is no answer is one line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import RolloutError
from megatron_ring.rl.rollout.checked import Checked
from megatron_ring.rl.rollout.protocol import Guarantees, Request, RolloutBudget, SamplingParams
from megatron_ring.rl.rollout_io import responses_to_bytes
from tests.helpers.rl.collecting import ScriptedEngine, prompt, session

NAME = "my_engines:Server"
ASKED = [Request(prompt=prompt(uid), sample=sample) for uid in range(2) for sample in range(2)]
SAMPLING = SamplingParams(max_response_length=16)


class Server(ScriptedEngine):
    """A scripted engine whose responses ``change`` spoils."""

    def __init__(self, change=lambda responses: responses):
        super().__init__()
        self.change = change

    def generate(self, requests, sampling, budget=None):
        yield from self.change(list(super().generate(requests, sampling, budget)))


MODEL = ModelConfig(vocab_size=50, num_layers=2, num_experts=8, moe_router_topk=2)


def answers(engine, asked=ASKED, sampling=SAMPLING, budget=None):
    checked = Checked(engine, session(), name=NAME, model=MODEL)
    checked.publish(3)
    assert checked.version == engine.version == 3
    return list(checked.generate(asked, sampling, budget))


def each(**fields):
    """Every response with these fields, each a value or a function of the response."""

    def change(responses):
        return [replace(r, **{k: v(r) if callable(v) else v for k, v in fields.items()}) for r in responses]

    return change


def of_length(count):
    rows = {"tokens_R": np.int32, "logprobs_R": np.float32, "versions_R": np.int32}
    return each(**{name: np.zeros(count, dtype) for name, dtype in rows.items()})


def test_what_keeps_the_contract_passes():
    assert [r.key for r in answers(Server())] == [r.key for r in ScriptedEngine().generate(ASKED, SAMPLING)]
    interrupted = answers(Server(), budget=RolloutBudget(tokens=3, concurrency=2))
    assert len(interrupted) == len(ASKED) and interrupted[-1].stop == "unfinished"
    resumed = [replace(ASKED[0], prefix=next(r for r in interrupted if r.key == (0, 0)))]
    assert answers(Server(), resumed)[0].stop == "eos"


def test_log_p_that_is_not_guaranteed_is_not_read():
    engine = Server(each(logprobs_R=lambda r: np.zeros(r.length, np.float32)))
    assert not any(np.isnan(r.logprobs_R).any() for r in answers(engine))
    for anything in (np.zeros(1, np.float32), None, "none"):
        engine = Server(each(logprobs_R=anything))
        engine.guarantees = Guarantees(exact_seeds=False, logprobs=False, routes=False, token_budget=False)
        assert all(np.isnan(r.logprobs_R).all() and len(r.logprobs_R) == r.length for r in answers(engine))


def test_an_engine_may_use_its_arrays_again():
    tokens_R = np.zeros(16, np.int32)

    def in_one_buffer(responses):
        for place, response in enumerate(responses):
            tokens_R[:] = place
            yield replace(response, tokens_R=tokens_R[: response.length])

    given = answers(Server(in_one_buffer))
    assert [set(r.tokens_R.tolist()) for r in given] == [{0}, {1}, {2}, {3}]


def test_integers_of_numpy_are_kept_in_a_checkpoint():
    numpys = each(
        prompt_uid=lambda r: np.int64(r.prompt_uid),
        sample=lambda r: np.int64(r.sample),
        tokens_R=lambda r: r.tokens_R.astype(np.int64),
        logprobs_R=lambda r: r.logprobs_R.astype(np.float64),
    )
    given, plain = answers(Server(numpys)), answers(Server())
    prompts = {request.prompt.uid: request.prompt for request in ASKED}

    def kept(responses):
        return responses_to_bytes([(prompts[r.prompt_uid], r) for r in responses])

    assert kept(given) == kept(plain)
    # what one rank of a group keeps is what the others receive
    assert [r.logprobs_R.dtype for r in given] == [r.logprobs_R.dtype for r in plain]


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        (lambda r: None, r"whose routes_SLK is no array of integers of shape \[\d+, 2, 2\]"),
        (lambda r: np.zeros((3 + r.length, 2, 2), np.int16), "whose routes_SLK is no array of integers"),
        (
            lambda r: np.full((2 + r.length, 2, 2), 8),
            "with expert ids from 8 to 8, which must be from 0 to below",
        ),
    ],
)
def test_routes_that_were_asked_for_are_there(routes, said):
    asked = replace(SAMPLING, record_routes=True)
    right = Server(each(routes_SLK=lambda r: np.zeros((2 + r.length, 2, 2), np.int64)))
    assert {r.routes_SLK.dtype for r in answers(right, sampling=asked)} == {np.dtype(np.int16)}
    with pytest.raises(RolloutError, match=f"^rollout_engine={NAME} gave a response to .*{said}"):
        answers(Server(each(routes_SLK=routes)), sampling=asked)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda rs: [*rs, rs[0]],
            r"answered sample 0 of prompt 0, which was not asked for or is answered already",
        ),
        (each(prompt_uid=7), "answered sample 0 of prompt 7, which was not asked for"),
        (lambda rs: rs[1:], "left 1 of 4 requests without a response, first sample 0 of prompt 0"),
        (lambda rs: ["text"], "gave str, not a Response"),
        (each(tokens_R=lambda r: r.tokens_R.tolist()), "whose tokens_R is no row of integers"),
        (each(tokens_R=lambda r: r.tokens_R / 2), "whose tokens_R is no row of integers"),
        (each(versions_R=np.zeros(1, np.int32)), "with 1 versions_R for "),
        (
            each(logprobs_R=lambda r: r.logprobs_R * np.nan),
            "whose log p is not finite, although it guarantees",
        ),
        (
            each(tokens_R=lambda r: r.tokens_R + 50),
            "with token ids from 50 to .*, which must be from 0 to below",
        ),
        (each(tokens_R=lambda r: r.tokens_R - 1), "with token ids from -1 to "),
        (
            each(versions_R=lambda r: r.versions_R + 1),
            "with policy versions from 4 to 4, which must be from 0 to 3, the last that was published",
        ),
        (each(versions_R=lambda r: r.versions_R - 9), "with policy versions from -6 to -6, which must be"),
        (each(logprobs_R=lambda r: np.full(r.length, -1e300)), "whose log p is not finite, although it"),
        (each(stop="stop"), "that says stop='stop', which must be one of eos, length;"),
        (each(stop="unfinished"), "that says stop='unfinished', which must be one of eos, length;"),
        (of_length(0), "of 0 tokens, which must be from 1 to max_response_length=16"),
        (of_length(17), "of 17 tokens, which must be from 1 to max_response_length=16"),
    ],
)
def test_what_breaks_it_is_one_line(change, said):
    with pytest.raises(RolloutError, match=f"^rollout_engine={NAME} .*{said}"):
        answers(Server(change))


def test_a_prefix_is_gone_on_from():
    prefix = replace(
        answers(Server(), budget=RolloutBudget(tokens=3, concurrency=2))[0],
        tokens_R=np.array([9, 9], np.int32),
    )
    with pytest.raises(RolloutError, match="that does not begin with the prefix"):
        answers(
            Server(lambda rs: [replace(r, tokens_R=r.tokens_R * 0) for r in rs]),
            [replace(ASKED[0], prefix=prefix)],
        )


def test_an_exception_of_it_is_one_line():
    def gone(responses):
        yield responses[0]
        raise ConnectionError("the server hung up")

    with pytest.raises(
        RolloutError, match=f"^rollout_engine={NAME} raised ConnectionError: the server hung up"
    ):
        answers(Server(gone))

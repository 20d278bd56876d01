"""Generation under a shared budget: what is there at the stop does not depend on how ranks and passes are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ring.config.rl import RolloutConfig, rollout_concurrency
from megatron_ring.rl.rollout.protocol import Request, SamplingParams
from megatron_ring.rl.rollout.rounds import RoundScheduler, in_queue_order, queue_places
from megatron_ring.rl.types import Response
from tests.helpers.rl.sequences import by_key, prompt

STOP = 0
RANKS = (1, 2, 3, 4, 8)
Key = tuple[int, int]


@dataclass
class Model:
    """Says ``STOP`` where a response has its length, else what its random number and position say."""

    length: Callable[[int, int], int]
    held: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    def advance(self, table: RoundScheduler) -> list[Response]:
        """One pass of one rank, whose bookkeeping is checked."""
        work = table.next_pass()
        if work is None:
            assert not table.in_round
            return []
        self.held.append(table.num_slots)
        self.passes.append(len(work.slots_W))
        if work.lengths is not None and len(work.lengths) > 1:
            assert sum(work.lengths) <= table.prefill_tokens
        if work.lengths is not None:
            assert len(work.tokens_N) == len(work.slots_N) == len(work.positions_N) == sum(work.lengths)
        tokens_W = np.zeros(len(work.slots_W), np.int64)
        for i, slot in enumerate(work.slots_W):
            request, count = table.request_of[slot], int(table.count_S[slot])
            assert request is not None and table.length_S[slot] == len(request.prompt.tokens) + count
            if count + 1 < self.length(request.prompt.uid, request.sample):
                tokens_W[i] = 1 + int(work.uniforms_W[i] * 200)
        return table.accept(work, tokens_W, -work.uniforms_W.astype(np.float32), None)


@dataclass
class Stop:
    """What a call left. Example: ``Stop(responses={(0, 0): ...}, ended=[[(0, 0)]], active=[2, 2])``."""

    responses: dict[Key, Response]
    ended: list[list[Key]]
    active: list[int]

    @property
    def tokens(self) -> dict[Key, tuple[list[int], list[float], list[int], str]]:
        return {
            key: (r.tokens_R.tolist(), r.logprobs_R.tolist(), r.versions_R.tolist(), r.stop)
            for key, r in self.responses.items()
        }


def generate(
    requests: Sequence[Request],
    model: Model,
    *,
    budget: int,
    concurrency: int,
    ranks: int = 1,
    longest: int = 30,
    prefill_tokens: int = 40,
    version: int = 0,
    owner: Callable[[Request], int] = lambda request: request.prompt.uid,
) -> Stop:
    """What the engine does on ``ranks`` data-parallel ranks, their sums taken by hand."""
    shares = [[r for r in requests if owner(r) % ranks == rank] for rank in range(ranks)]
    places = queue_places([[(r.prompt.uid, r.sample) for r in share] for share in shares])
    params = SamplingParams(max_response_length=longest, stop_ids=(STOP,), seed=3)
    tables = [
        RoundScheduler(
            share,
            params,
            places=place,
            concurrency=concurrency,
            version=version,
            prefill_tokens=prefill_tokens,
        )
        for share, place in zip(shares, places, strict=True)
    ]
    out = [response for table in tables for response in table.complete]
    found = Stop({}, [], [])
    ended = 0
    while any(t.busy for t in tables) and sum(t.produced for t in tables) < budget:
        before = sum(t.produced for t in tables)
        over: list[Response] = []
        for table in tables:
            table.begin_round(ended)
            while table.in_round:
                over += model.advance(table)
            assert table.num_slots <= min(concurrency, max(1, table.admitted))
        found.active.append(sum(t.produced for t in tables) - before)
        found.ended.append([response.key for response in in_queue_order(over)])
        out += over
        ended, ended_before = sum(t.ended for t in tables), ended
        assert found.active[-1] or ended > ended_before, "a round that did nothing"
    out += [response for table in tables for response in table.unfinished()]
    found.responses = by_key(out)
    return found


def asked(lengths: Sequence[int], samples: int = 1) -> list[Request]:
    """Prompts of different lengths, newest first: it is not the order of the list that counts."""
    return [
        Request(prompt=prompt(uid, 1 + 7 * uid % 12), sample=sample)
        for uid in reversed(range(len(lengths)))
        for sample in range(samples)
    ]


def test_places_follow_prompt_and_sample():
    assert queue_places([[(4, 0), (2, 1)], [(3, 0), (2, 0)]]) == [[3, 1], [2, 0]]
    assert queue_places([[], [(5, 1), (5, 0)], []]) == [[], [1, 0], []]


def test_the_example_of_the_table():
    lengths = (3, 1, 5, 2)
    stop = generate(asked(lengths), Model(lambda uid, _: lengths[uid]), budget=7, concurrency=2)
    assert stop.active == [2, 2, 2, 2]
    assert stop.ended == [[(1, 0)], [], [(0, 0)], []]
    assert [stop.responses[uid, 0].length for uid in range(4)] == [3, 1, 3, 1]
    assert [stop.responses[uid, 0].stop for uid in range(4)] == ["eos", "eos", "unfinished", "unfinished"]


@st.composite
def jobs(draw) -> tuple[list[int], int, int, int, list[int]]:
    """Lengths per (prompt, sample), samples, budget, concurrency and how long each one's prefix is."""
    samples = draw(st.integers(1, 3))
    # 40 is longer than a response may be; 1 ends with its first token
    count = draw(st.integers(0, 8)) * samples
    lengths = draw(st.lists(st.sampled_from((1, 1, 2, 3, 5, 8, 13, 40)), min_size=count, max_size=count))
    prefixes = draw(st.lists(st.sampled_from((0, 0, 0, 1, 4, 29, 30)), min_size=count, max_size=count))
    return lengths, samples, draw(st.integers(1, 150)), draw(st.integers(1, 12)), prefixes


def with_prefix(request: Request, length: int) -> Request:
    if not length:
        return request
    prefix = Response(
        prompt_uid=request.prompt.uid,
        sample=request.sample,
        tokens_R=np.full(length, 7, np.int32),
        logprobs_R=np.full(length, -1, np.float32),
        versions_R=np.zeros(length, np.int32),
        stop="unfinished",
    )
    return replace(request, prefix=prefix)


@settings(max_examples=60, deadline=None)
@given(jobs(), st.integers(0, 10**6))
def test_no_cut_into_ranks_or_passes_changes_a_token(job, seed):
    lengths, samples, budget, concurrency, prefixes = job

    def number(uid: int, sample: int) -> int:
        return uid * samples + sample

    def length(uid: int, sample: int) -> int:
        return prefixes[number(uid, sample)] + lengths[number(uid, sample)]

    requests = [
        with_prefix(r, prefixes[number(r.prompt.uid, r.sample)])
        for r in asked(range(len(lengths) // samples), samples)
    ]
    options = {"budget": budget, "concurrency": concurrency, "version": 1}
    expected = generate(requests, Model(length), **options)
    assert len(expected.responses) == len(requests)
    assert max(expected.active, default=0) <= concurrency
    new = sum(expected.active)
    assert new < budget + concurrency
    states = {response.stop for response in expected.responses.values()}
    assert new >= budget or "unfinished" not in states
    owners = np.random.default_rng(seed).integers(0, 8, len(requests))
    owner_of = {(r.prompt.uid, r.sample): int(n) for r, n in zip(requests, owners, strict=True)}
    for ranks in RANKS:
        for prefill_tokens in (1, 25, 1000):
            cut = {"ranks": ranks, "prefill_tokens": prefill_tokens}
            found = generate(requests, Model(length), **options, **cut)
            assert found.tokens == expected.tokens
            assert found.ended == expected.ended and found.active == expected.active
        scattered = generate(
            requests, Model(length), **options, ranks=ranks, owner=lambda r: owner_of[r.prompt.uid, r.sample]
        )
        assert scattered.tokens == expected.tokens and scattered.ended == expected.ended


def test_a_response_that_is_complete_already_holds_its_place_for_one_round():
    requests = [with_prefix(asked((9,))[0], 30), *(replace(r, sample=1) for r in asked((9, 9)))]
    for ranks in (1, 2):
        stop = generate(requests, Model(lambda *_: 9), budget=7, concurrency=1, ranks=ranks)
        assert stop.active == [0, 1, 1, 1, 1, 1, 1, 1]
        assert stop.responses[0, 0].length == 30 and stop.responses[0, 0].stop == "length"
        assert [stop.responses[uid, 1].length for uid in (0, 1)] == [7, 0]


def test_a_table_holds_what_its_rank_decodes_not_the_whole_queue():
    model = Model(lambda uid, sample: 1 + (5 * uid + 3 * sample) % 9)
    requests = asked(range(50), samples=4)
    stop = generate(requests, model, budget=10**6, concurrency=10)
    assert max(model.held) == 10 and len(stop.responses) == 200
    model = Model(model.length)
    again = generate(requests, model, budget=10**6, concurrency=10, ranks=4)
    assert again.tokens == stop.tokens
    assert max(model.held) <= 10 and len(set(model.held)) > 2, "tables grow with what they have to hold"
    assert max(model.passes) < 10


def default_concurrency(budget: int, longest: int) -> int:
    config = RolloutConfig(rollout_token_budget=budget, max_response_length=longest)
    concurrency = rollout_concurrency(config)
    assert concurrency is not None
    return concurrency


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=24),
    st.integers(30, 200),
    st.sampled_from(RANKS),
)
def test_by_default_every_sequence_admitted_at_first_ends_in_each_step(lengths, budget, ranks):
    """Whatever the lengths, as long as a step's budget has room for one whole response."""
    concurrency = default_concurrency(budget, 30)
    requests, steps = asked(lengths), 0
    model = Model(lambda uid, _: lengths[uid])
    while requests:
        stop = generate(requests, model, budget=budget, concurrency=concurrency, ranks=ranks, version=steps)
        finished = [key for keys in stop.ended for key in keys]
        oldest = sorted((r.prompt.uid, r.sample) for r in requests)[:concurrency]
        assert set(oldest) <= set(finished)
        left = {key: r for key, r in stop.responses.items() if r.stop == "unfinished"}
        requests = [
            replace(r, prefix=prefix if prefix.length else None)
            for r in requests
            if (prefix := left.get((r.prompt.uid, r.sample))) is not None
        ]
        steps += 1
    assert steps <= -(-len(lengths) // concurrency)


def test_the_default_without_a_budget_and_below_one_response():
    assert rollout_concurrency(RolloutConfig()) is None
    assert default_concurrency(4096, 512) == 8
    assert default_concurrency(100, 512) == 1


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_budget_is_passed_by_less_than_one_round(concurrency):
    for budget in range(1, 40):
        stop = generate(asked(range(6)), Model(lambda *_: 7), budget=budget, concurrency=concurrency)
        assert min(budget, 42) <= sum(stop.active) < budget + concurrency

"""Generation in rounds, under a token budget that data-parallel ranks share: a schedule that no layout changes.

The requests of all ranks form one queue, by (prompt uid, sample): the oldest prompts come first. ``concurrency`` of
them are admitted at first, and each that ends admits the next. In a round every admitted sequence that has not ended
gains one token: those admitted in this round by being read, the others by decoding. After a round the ranks add up
what they produced and how many ended; generation stops after the first round that reaches the budget.

So the tokens at the stop depend on the requests, the model, the budget and ``concurrency`` alone. Pure
bookkeeping, as in ``scheduler``. Invariants (one test each): the same tokens whatever the number of ranks and
the size of a pass; never more than ``concurrency`` sequences in slots, summed over ranks, and no table larger
than what its rank held at once; with a budget of ``concurrency`` whole responses at least ``concurrency`` end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_ring.rl.rollout.protocol import Request, SamplingParams
from megatron_ring.rl.rollout.scheduler import ScheduledBatch, Scheduler, is_complete
from megatron_ring.rl.types import Response


def queue_places(keys_of: Sequence[Iterable[Sequence[int]]]) -> list[list[int]]:
    """Each request's place in the job's queue, from 0. ``keys_of[r]`` has rank r's (prompt uid, sample).

    Example: ``queue_places([[(4, 0), (2, 1)], [(3, 0), (2, 0)]])`` is ``[[3, 1], [2, 0]]``.
    """
    keys = [
        (*key, rank, index)
        for rank, keys_of_rank in enumerate(keys_of)
        for index, key in enumerate(keys_of_rank)
    ]
    places: list[dict[int, int]] = [{} for _ in keys_of]
    for place, (*_, rank, index) in enumerate(sorted(keys)):
        places[rank][index] = place
    return [[of_rank[index] for index in range(len(of_rank))] for of_rank in places]


class RoundScheduler(Scheduler):
    """One rank's requests of a budgeted call. Slots are added as sequences need them.

    A request whose prefix already has the maximum length is complete at once; its place counts as ended after
    the round in which it was admitted.

    Args:
        requests: what this rank is asked.
        sampling: limits, stop tokens and seed.
        places: of each request, its place in the queue of all ranks (:func:`queue_places`).
        concurrency: sequences decoded at the same time, summed over data-parallel ranks.
        version: policy version that new tokens are marked with.
        prefill_tokens: tokens that one pass reads of new sequences at most; a longer one goes alone.

    Example, alone, with 4 requests whose responses will be 3, 1, 5 and 2 tokens long, ``concurrency=2`` and a budget
    of 7: round 1 decodes the first two (2 tokens), rounds 2 and 3 the first and the third (4, 6), round 4 the third
    and the fourth (8, stop). 3, 1, 3 and 1 tokens are there.

    Raises:
        RolloutError: a prompt is empty.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        places: Sequence[int],
        concurrency: int,
        version: int,
        prefill_tokens: int,
    ):
        queue = sorted(zip(places, requests, strict=True), key=lambda entry: entry[0])
        super().__init__(
            [request for _, request in queue],
            sampling,
            num_slots=0,
            version=version,
            prefill_tokens=prefill_tokens,
        )
        self.concurrency, self.admitted = concurrency, 0
        self.places = [place for place, _ in queue]
        self.waiting_places = deque(place for place, request in queue if not is_complete(request, sampling))
        self.most_slots = min(concurrency, len(self.waiting))
        self.entering: deque[Request] = deque()
        self.decoding_W = np.zeros(0, np.int64)

    @property
    def busy(self) -> bool:
        """Something is left to do, in this round or a later one."""
        return bool(self.entering) or super().busy

    @property
    def in_round(self) -> bool:
        """Passes of this round are left."""
        return bool(self.entering) or len(self.decoding_W) > 0

    @property
    def ended(self) -> int:
        """Requests of this rank that were admitted and need nothing more."""
        return bisect_left(self.places, self.admitted) - len(self.entering) - int(self.active_S.sum())

    def begin_round(self, ended: int) -> None:
        """Admit what ``ended`` (summed over data-parallel ranks) makes room for."""
        assert not self.in_round, "a round is not over"
        self.admitted = self.concurrency + ended
        while self.waiting and self.waiting_places[0] < self.admitted:
            self.waiting_places.popleft()
            self.entering.append(self.waiting.popleft())
        # sequences that are read in this round gain their token by it
        self.decoding_W = np.flatnonzero(self.active_S)
        self._have_slots(len(self.decoding_W) + len(self.entering))

    def next_pass(self) -> ScheduledBatch | None:
        """The round's next pass: new sequences as long as there are any, then one token of each other one.

        None where this rank is done with the round.
        """
        if self.entering:
            return self._read(self.entering)
        slots_W, self.decoding_W = self.decoding_W, self.decoding_W[:0]
        return self._decode(slots_W) if len(slots_W) else None

    def _have_slots(self, needed: int) -> None:
        if needed <= self.num_slots:
            return
        # half as many more, so that growing one by one copies each row a few times at most
        S = min(max(needed, self.num_slots + self.num_slots // 2), self.most_slots)
        more, self.num_slots = S - self.num_slots, S
        self.request_of += [None] * more
        self.active_S = _longer(self.active_S, more)
        self.length_S = _longer(self.length_S, more)
        self.count_S = _longer(self.count_S, more)
        self.last_S = _longer(self.last_S, more)
        self.stream_S = _longer(self.stream_S, more)
        self.tokens_SR = _longer(self.tokens_SR, more)
        self.logprobs_SR = _longer(self.logprobs_SR, more)
        self.versions_SR = _longer(self.versions_SR, more)
        if self.routes_SPLK is not None:
            self.routes_SPLK = _longer(self.routes_SPLK, more)


def in_queue_order(responses: Iterable[Response]) -> list[Response]:
    """The responses that ended in one round, in the order of their places."""
    return sorted(responses, key=lambda response: response.key)


def _longer(values_S: np.ndarray, more: int) -> np.ndarray:
    return np.concatenate([values_S, np.zeros((more, *values_S.shape[1:]), values_S.dtype)])

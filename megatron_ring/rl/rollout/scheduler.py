"""Which sequence is in which slot, what the model reads next, and which responses that finishes.

Legend: S slots, R response tokens, N tokens of a pass, W sequences whose next token a pass samples, L layers with
experts, K experts per token. Pure bookkeeping on the host: no tensor, no collective; every rank of a model-parallel
group keeps the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_ring.errors import RolloutError
from megatron_ring.rl.rollout import counter_rng
from megatron_ring.rl.rollout.protocol import Request, SamplingParams
from megatron_ring.rl.types import Response, StopReason


@dataclass(frozen=True, kw_only=True)
class ScheduledBatch:
    """What one forward pass reads: whole sequences (``lengths`` given) or one token of each.

    ``rows_W`` are the tokens after which one is sampled, for the slots ``slots_W``, at ``uniforms_W``.

    Example, two sequences of 3 and 2 tokens to read: ``ScheduledBatch(tokens_N=[5, 6, 7, 5, 6], slots_N=[4, 4, 4, 9, 9],
    positions_N=[0, 1, 2, 0, 1], lengths=(3, 2), rows_W=[2, 4], slots_W=[4, 9], uniforms_W=[.3, .8])``.
    """

    tokens_N: np.ndarray
    slots_N: np.ndarray
    positions_N: np.ndarray
    lengths: tuple[int, ...] | None
    rows_W: np.ndarray
    slots_W: np.ndarray
    uniforms_W: np.ndarray


class Scheduler:
    """All requests of one call: waiting, in a slot, or done. Each slot is given out again as it becomes free.

    :class:`~megatron_ring.rl.rollout.rounds.RoundScheduler` is the one that keeps time with other ranks.

    Args:
        requests: what is wanted, in the order in which slots are given out.
        sampling: limits, stop tokens and seed.
        num_slots: sequences decoded at the same time.
        version: policy version that new tokens are marked with.
        prefill_tokens: tokens that one pass reads of new sequences at most; a longer one goes alone.

    Raises:
        RolloutError: a prompt is empty.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        num_slots: int,
        version: int,
        prefill_tokens: int,
    ):
        self.sampling, self.version, self.prefill_tokens = sampling, version, prefill_tokens
        self.stop_ids = np.asarray(sampling.stop_ids, np.int64)
        self.waiting: deque[Request] = deque()
        self.complete: list[Response] = []
        for request in requests:
            if not request.prompt.tokens:
                raise RolloutError(f"prompt {request.prompt.uid} has no tokens; leave it out")
            prefix = request.prefix
            if prefix is not None and is_complete(request, sampling):
                self.complete.append(replace(prefix, stop="length"))
            else:
                self.waiting.append(request)
        S = self.num_slots = min(num_slots, len(self.waiting))
        self.request_of: list[Request | None] = [None] * S
        self.active_S = np.zeros(S, bool)
        self.length_S = np.zeros(S, np.int64)
        self.count_S = np.zeros(S, np.int64)
        self.last_S = np.zeros(S, np.int64)
        self.stream_S = np.zeros(S, np.uint64)
        self.tokens_SR = np.zeros((S, sampling.max_response_length), np.int32)
        self.logprobs_SR = np.zeros((S, sampling.max_response_length), np.float32)
        self.versions_SR = np.zeros((S, sampling.max_response_length), np.int32)
        self.routes_SPLK: np.ndarray | None = None
        self.produced = 0

    @property
    def busy(self) -> bool:
        """Something is left to do."""
        return bool(self.waiting) or bool(self.active_S.any())

    @property
    def longest(self) -> int:
        """Positions of the longest sequence in a slot."""
        return int(self.length_S.max(initial=0))

    def next_pass(self) -> ScheduledBatch | None:
        """New sequences if many slots are free, else one token of every sequence.

        None where nothing is left to do.
        """
        if not self.busy:
            return None
        free = self.num_slots - int(self.active_S.sum())
        enough = min(len(self.waiting), max(1, self.num_slots // 16))
        if self.waiting and free >= enough:
            return self._read(self.waiting)
        return self._decode(np.flatnonzero(self.active_S))

    def _read(self, queue: deque[Request]) -> ScheduledBatch:
        """As many of ``queue`` as free slots and ``prefill_tokens`` allow; they are removed from it."""
        entered: list[int] = []
        total = 0
        for slot in np.flatnonzero(~self.active_S):
            if not queue:
                break
            size = len(queue[0].prompt.tokens) + _prefix_length(queue[0])
            if entered and total + size > self.prefill_tokens:
                break
            self._enter(int(slot), queue.popleft())
            entered.append(int(slot))
            total += size
        # neighbours of equal length are read by one attention call
        slots_W = np.array(sorted(entered, key=lambda slot: self.length_S[slot]))
        lengths_W = self.length_S[slots_W]
        ends_W = lengths_W.cumsum()
        return ScheduledBatch(
            tokens_N=np.concatenate([self._sequence(int(slot)) for slot in slots_W]),
            slots_N=slots_W.repeat(lengths_W),
            positions_N=np.arange(total) - (ends_W - lengths_W).repeat(lengths_W),
            lengths=tuple(lengths_W.tolist()),
            rows_W=ends_W - 1,
            slots_W=slots_W,
            uniforms_W=self._uniforms(slots_W),
        )

    def _decode(self, slots_W: np.ndarray) -> ScheduledBatch:
        return ScheduledBatch(
            tokens_N=self.last_S[slots_W],
            slots_N=slots_W,
            positions_N=self.length_S[slots_W] - 1,
            lengths=None,
            rows_W=np.arange(len(slots_W)),
            slots_W=slots_W,
            uniforms_W=self._uniforms(slots_W),
        )

    def _uniforms(self, slots_W: np.ndarray) -> np.ndarray:
        return counter_rng.uniforms(self.stream_S[slots_W], self.count_S[slots_W])

    def _enter(self, slot: int, request: Request) -> None:
        prompt, count = request.prompt, _prefix_length(request)
        if request.prefix is not None:
            self.tokens_SR[slot, :count] = request.prefix.tokens_R
            self.logprobs_SR[slot, :count] = request.prefix.logprobs_R
            self.versions_SR[slot, :count] = request.prefix.versions_R
        self.request_of[slot] = request
        self.active_S[slot] = True
        self.count_S[slot] = count
        self.length_S[slot] = len(prompt.tokens) + count
        self.stream_S[slot] = counter_rng.stream(self.sampling.seed, prompt.uid, request.sample)

    def _sequence(self, slot: int) -> np.ndarray:
        request = self.request_of[slot]
        assert request is not None
        response = self.tokens_SR[slot, : self.count_S[slot]]
        return np.concatenate([np.asarray(request.prompt.tokens, np.int64), response])

    def accept(
        self,
        done: ScheduledBatch,
        tokens_W: np.ndarray,
        logprobs_W: np.ndarray,
        routes_NLK: np.ndarray | None,
    ) -> list[Response]:
        """Record a pass's sampled tokens and the routes of what it read; returns the responses that this
        finishes."""
        slots_W = done.slots_W
        if routes_NLK is not None:
            self._keep_routes(done, routes_NLK)
        count_W = self.count_S[slots_W]
        self.tokens_SR[slots_W, count_W] = tokens_W
        self.logprobs_SR[slots_W, count_W] = logprobs_W
        self.versions_SR[slots_W, count_W] = self.version
        self.last_S[slots_W] = tokens_W
        self.count_S[slots_W] += 1
        self.length_S[slots_W] += 1
        self.produced += len(slots_W)
        ended_W = (tokens_W[:, None] == self.stop_ids).any(1)
        full_W = count_W + 1 >= self.sampling.max_response_length
        finished = [(int(slots_W[i]), bool(ended_W[i])) for i in np.flatnonzero(ended_W | full_W)]
        return [self._leave(slot, "eos" if ended else "length") for slot, ended in finished]

    def unfinished(self) -> Iterator[Response]:
        """Unfinished responses: sequences in their slots, then requests that never had one."""
        for slot in np.flatnonzero(self.active_S):
            yield self._leave(int(slot), "unfinished")
        while self.waiting:
            request = self.waiting.popleft()
            if request.prefix is not None:
                yield replace(request.prefix, stop="unfinished")
                continue
            yield Response(
                prompt_uid=request.prompt.uid,
                sample=request.sample,
                tokens_R=np.zeros(0, np.int32),
                logprobs_R=np.zeros(0, np.float32),
                versions_R=np.zeros(0, np.int32),
                stop="unfinished",
            )

    def _leave(self, slot: int, stop: StopReason) -> Response:
        request, count = self.request_of[slot], int(self.count_S[slot])
        assert request is not None
        read = int(self.length_S[slot]) - 1
        routes = None if self.routes_SPLK is None else self.routes_SPLK[slot, :read].copy()
        self.request_of[slot] = None
        self.active_S[slot] = False
        self.length_S[slot] = 0
        return Response(
            prompt_uid=request.prompt.uid,
            sample=request.sample,
            tokens_R=self.tokens_SR[slot, :count].copy(),
            logprobs_R=self.logprobs_SR[slot, :count].copy(),
            versions_R=self.versions_SR[slot, :count].copy(),
            stop=stop,
            routes_SLK=routes,
        )

    def _keep_routes(self, done: ScheduledBatch, routes_NLK: np.ndarray) -> None:
        needed = int(done.positions_N.max(initial=0)) + 1
        old = self.routes_SPLK
        have = 0 if old is None else old.shape[1]
        if old is None or needed > have:
            grown = np.zeros(
                (self.num_slots, max(needed + 64, have * 4 // 3), *routes_NLK.shape[1:]), np.int16
            )
            if old is not None:
                grown[:, :have] = old
            self.routes_SPLK = old = grown
        old[done.slots_N, done.positions_N] = routes_NLK
        if done.lengths is None:
            return
        for slot in map(int, done.slots_W):
            request = self.request_of[slot]
            prefix = None if request is None else request.prefix
            if prefix is not None and prefix.routes_SLK is not None:
                # a token's route is the one that it was sampled through, under its own policy version
                old[slot, : len(prefix.routes_SLK)] = prefix.routes_SLK


def is_complete(request: Request, sampling: SamplingParams) -> bool:
    """The prefix already has the maximum length: there is nothing to decode."""
    return request.prefix is not None and request.prefix.length >= sampling.max_response_length


def _prefix_length(request: Request) -> int:
    return 0 if request.prefix is None else request.prefix.length

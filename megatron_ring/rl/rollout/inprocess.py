"""Generation on the training weights themselves: no copy, no second model, any layout."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from megatron_ring.config.rl import RolloutConfig
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RolloutError
from megatron_ring.model.head import NormHead
from megatron_ring.model.kv_cache import KvCache, cache_shape
from megatron_ring.rl.rollout.model_runner import ModelRunner
from megatron_ring.rl.rollout.protocol import Guarantees, Request, RolloutBudget, SamplingParams
from megatron_ring.rl.rollout.rounds import RoundScheduler, in_queue_order, queue_places
from megatron_ring.rl.rollout.scheduler import Scheduler
from megatron_ring.rl.types import Response
from megatron_ring.runtime.collectives import gather_json
from megatron_ring.train.inference import InferenceEngine


class InProcessEngine:
    """Decodes with the trainer's own modules over a cache of keys and values.

    All ranks of one model-parallel group are given the same requests and yield the same responses in the same
    order; data-parallel ranks are given different ones. Where experts are spread over data-parallel ranks, those
    step together, pass by pass; where a token budget is shared by them, round by round. Each rank must exhaust
    its iterator, with no other collective over data-parallel ranks in between.

    Args:
        engine: the trainer, whose weights are sampled from.
        slots: sequences that this data-parallel rank decodes at the same time where no token budget is given.
        prefill_tokens: tokens of new sequences that one pass reads at most (one sequence at least).

    Example::

        rollout = InProcessEngine(engine, slots=256)
        rollout.publish(version=5)
        for response in rollout.generate(requests, SamplingParams(max_response_length=512, stop_ids=(2,))):
            ...
    """

    guarantees = Guarantees(exact_seeds=True, logprobs=True, routes=True, token_budget=True)
    on_every_rank = True

    def __init__(self, engine: InferenceEngine, *, slots: int, prefill_tokens: int = 8192):
        self.engine, self.slots, self.prefill_tokens = engine, slots, prefill_tokens
        self.version = 0
        layers = [layer for model in engine.models for layer in model.decoder.layers]
        session, dtype = engine.session, engine.models[0].config.params_dtype
        self.cache = KvCache(cache_shape(layers), dtype, session.device)
        self.runner = ModelRunner(engine.models, engine.config.model, session, self.cache)

    @classmethod
    def open(cls, trainer: InferenceEngine, config: RolloutConfig) -> InProcessEngine:
        """The engine of a run's settings."""
        return cls(trainer, slots=config.rollout_slots)

    def publish(self, version: int) -> None:
        """Sample from the current weights from now on. Collective over data-parallel ranks."""
        self.engine.gather_parameters()
        self.version = version

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, budget: RolloutBudget | None = None
    ) -> Iterator[Response]:
        """Each request's response as it finishes, unfinished ones last; see :class:`RolloutEngine`.

        The weights must not change before the iterator is exhausted or closed. With a budget its begin, and
        always its end, is collective over data-parallel ranks.

        Raises:
            RolloutError: logits were not finite, on this rank or on another: every rank raises.
        """
        for model in self.engine.models:
            model.eval()
        table = self._table(requests, sampling, budget)
        yield from table.complete
        with ExitStack() as stack:
            for model in self.engine.models:
                if isinstance(head := getattr(model, "output_layer", None), NormHead):
                    stack.enter_context(head.held())
            if isinstance(table, RoundScheduler):
                assert budget is not None
                broken = yield from self._in_rounds(table, sampling, budget.tokens)
            else:
                broken = yield from self._freely(table, sampling)
        self._refuse_broken(broken)
        yield from table.unfinished()

    def _table(
        self, requests: Sequence[Request], sampling: SamplingParams, budget: RolloutBudget | None
    ) -> Scheduler:
        """Communicates over the data-parallel group if its ranks share a budget."""
        shared = {"version": self.version, "prefill_tokens": self.prefill_tokens}
        if budget is None:
            return Scheduler(requests, sampling, num_slots=self.slots, **shared)
        group = self.engine.topology.groups.dp
        keys = [(request.prompt.uid, request.sample) for request in requests]
        places = queue_places(gather_json(keys, group, self.engine.session.device))[group.rank()]
        return RoundScheduler(requests, sampling, places=places, concurrency=budget.concurrency, **shared)

    @property
    def _steps_together(self) -> bool:
        """Are experts spread over data-parallel ranks, so that these must run the same number of passes?"""
        return self.engine.topology.dp_size > 1 and self.engine.topology.ep_size > 1

    def _freely(self, table: Scheduler, sampling: SamplingParams) -> Generator[Response, None, int]:
        """Decodes every request to its end; returns the number of sequences whose logits were not finite.

        Communicates over the data-parallel group where its ranks step together.
        """
        broken = 0
        while self._goes_on(table.busy, broken):
            responses, broken = self._advance(table, sampling)
            yield from responses
        return broken

    def _goes_on(self, busy: int, broken: int) -> bool:
        """Is anything left to do, and all logits finite, here and on the ranks that this one steps with?"""
        if self._steps_together:
            busy, broken = self._summed(busy, broken)
        return busy > 0 and not broken

    def _in_rounds(
        self, table: RoundScheduler, sampling: SamplingParams, token_budget: int
    ) -> Generator[Response, None, int]:
        """Decodes rounds up to the budget; returns the number of this rank's sequences whose logits were not
        finite.

        Communicates over the data-parallel group: after each pass where its ranks step together, else after each
        round.
        """
        broken = produced = ended = faulty = 0
        (busy,) = self._summed(table.busy)
        while busy and produced < token_budget and not faulty:
            table.begin_round(ended)
            responses: list[Response] = []
            in_round = 1
            while in_round and not faulty:
                found, broken = self._advance(table, sampling)
                responses += found
                in_round = table.in_round
                if self._steps_together or broken or not in_round:
                    in_round, busy, produced, ended, faulty = self._summed(
                        in_round, table.busy, table.produced, table.ended, broken
                    )
            yield from in_queue_order(responses)
        return broken

    def _advance(self, table: Scheduler, sampling: SamplingParams) -> tuple[list[Response], int]:
        """One pass: the responses that it finishes, and the number of sequences whose logits were not finite.

        A rank with nothing to do takes part in the pass of the ranks that it steps with.
        """
        work = table.next_pass()
        if work is None and not self._steps_together:
            return [], 0
        self.cache.reserve(table.num_slots, max(table.longest, 1))
        tokens_W, logprobs_W, routes_NLK = self.runner(work, sampling)
        if work is None:
            return [], 0
        broken = self._broken(tokens_W, logprobs_W)
        return ([] if broken else table.accept(work, tokens_W, logprobs_W, routes_NLK)), broken

    def _summed(self, *numbers: int) -> Sequence[int]:
        """Each number's sum over the data-parallel group. Collective over it."""
        return [
            int(value) for value in self.engine.session.summed(*numbers, group=self.engine.topology.groups.dp)
        ]

    def _broken(self, tokens_W: np.ndarray, logprobs_W: np.ndarray) -> int:
        """Number of sequences whose logits were not finite: then log p is not finite either, whichever token
        was sampled."""
        inside_W = (tokens_W >= 0) & (tokens_W < self.engine.config.model.vocab_size)
        return int((~(np.isfinite(logprobs_W) & inside_W)).sum())

    def _refuse_broken(self, broken: int) -> None:
        """Raises on every rank if any rank has met such logits. Communicates over the data-parallel group."""
        (broken,) = self._summed(broken)
        if broken:
            raise RolloutError(
                f"logits of {broken} sequences are not finite at policy version {self.version}; the weights are "
                "broken: load an earlier checkpoint or lower --lr"
            )

    def close(self) -> None:
        """Give the cache's memory back; a later call allocates it again."""
        self.cache.release()


def continue_tokens(
    trainer: InferenceEngine, tokens: Sequence[int], limit: int, seed: int, stop_ids: Sequence[int]
) -> list[int]:
    """Up to ``limit`` tokens that continue ``tokens``, sampled at temperature 0.8 without a stop token: a
    sample for the report. Collective over the world.
    """
    if limit < 1:
        return []
    prompt = Prompt(uid=0, domain="", text="", tokens=tuple(tokens), reference={})
    sampling = SamplingParams(temperature=0.8, max_response_length=limit, stop_ids=tuple(stop_ids), seed=seed)
    engine = InProcessEngine(trainer, slots=1)
    engine.publish(version=0)
    (response,) = engine.generate([Request(prompt=prompt, sample=0)], sampling)
    engine.close()
    return [token for token in response.tokens_R.tolist() if token not in stop_ids]

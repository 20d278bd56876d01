"""Generation on the training weights themselves: no copy, no second model, any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from megatron_ring.errors import RolloutError
from megatron_ring.model.head import NormHead
from megatron_ring.model.kv_cache import KvCache, cache_shape
from megatron_ring.rl.rollout.forward import Runner
from megatron_ring.rl.rollout.protocol import Request, SamplingParams
from megatron_ring.rl.rollout.slots import SlotTable
from megatron_ring.rl.types import Response
from megatron_ring.train.engine import Engine


class InProcessEngine:
    """Decodes with the trainer's own modules over a cache of keys and values.

    All ranks of one model-parallel group are given the same requests and yield the same responses in the same
    order; data-parallel ranks are given different ones. Where experts are spread over data-parallel ranks, or
    a token budget is shared by them, those ranks step together. Each rank must exhaust its iterator, with no
    other collective over data-parallel ranks in between.

    Args:
        engine: whose weights.
        slots: sequences that this data-parallel rank decodes at the same time.
        prefill_tokens: tokens of new sequences that one pass reads at most (one sequence at least).

    Example::

        rollout = InProcessEngine(engine, slots=256)
        rollout.load_weights(version=5)
        for response in rollout.generate(requests, SamplingParams(max_response_length=512, stop_ids=(2,))):
            ...
    """

    def __init__(self, engine: Engine, *, slots: int, prefill_tokens: int = 8192):
        self.engine, self.slots, self.prefill_tokens = engine, slots, prefill_tokens
        self.version = 0
        layers = [layer for model in engine.models for layer in model.decoder.layers]
        session, dtype = engine.session, engine.models[0].config.params_dtype
        self.cache = KvCache(cache_shape(layers), dtype, session.device)
        self.runner = Runner(engine.models, engine.config.model, session, self.cache)

    def load_weights(self, version: int) -> None:
        """Sample from the present weights from here on. Collective over data-parallel ranks."""
        self.engine.gather_parameters()
        self.version = version

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, token_budget: int | None = None
    ) -> Iterator[Response]:
        """Each request's response as it finishes, unfinished ones last; see :class:`RolloutEngine`.

        The weights must not change before the iterator is exhausted or closed. Its end is collective over
        data-parallel ranks.

        Raises:
            RolloutError: logits were not finite, on this rank or on another; every rank raises.
        """
        for model in self.engine.models:
            model.eval()
        table = SlotTable(
            requests,
            sampling,
            num_slots=self.slots,
            version=self.version,
            prefill_tokens=self.prefill_tokens,
        )
        yield from table.complete
        with ExitStack() as stack:
            for model in self.engine.models:
                if isinstance(head := getattr(model, "output_layer", None), NormHead):
                    stack.enter_context(head.held())
            broken = 0
            while self._goes_on(table, token_budget, broken):
                work = table.next_pass() if table.busy else None
                self.cache.reserve(table.num_slots, max(table.longest, 1))
                tokens_W, logprobs_W, routes_NLK = self.runner(work, sampling)
                broken = 0 if work is None else self._broken(tokens_W, logprobs_W)
                if work is not None and not broken:
                    yield from table.accept(work, tokens_W, logprobs_W, routes_NLK)
        self._refuse_broken(broken)
        yield from table.unfinished()

    def _goes_on(self, table: SlotTable, token_budget: int | None, broken: int) -> bool:
        """Is anything left to do, here or on a rank that this one has to step with, and all logits finite?

        Communicates over the data-parallel group where its ranks step together.
        """
        topology = self.engine.topology
        busy, produced = table.busy, table.produced
        if topology.dp_size > 1 and (topology.ep_size > 1 or token_budget is not None):
            busy, produced, broken = self._summed(busy, produced, broken)
        return not broken and busy > 0 and (token_budget is None or produced < token_budget)

    def _summed(self, *numbers: int) -> list[int]:
        """Each number's sum over the data-parallel group."""
        sums = torch.tensor(numbers, dtype=torch.float64).to(self.engine.session.device)
        torch.distributed.all_reduce(sums, group=self.engine.topology.groups.dp)
        return [int(value) for value in sums.tolist()]

    def _broken(self, tokens_W: np.ndarray, logprobs_W: np.ndarray) -> int:
        """Of how many sequences the logits were not finite: their log p is not, whatever token was taken."""
        inside_W = (tokens_W >= 0) & (tokens_W < self.engine.config.model.vocab_size)
        return int((~(np.isfinite(logprobs_W) & inside_W)).sum())

    def _refuse_broken(self, broken: int) -> None:
        """Raises on every rank if any has met such logits. Communicates over the data-parallel group."""
        if self.engine.topology.dp_size > 1:
            (broken,) = self._summed(broken)
        if broken:
            raise RolloutError(
                f"logits of {broken} sequences are not finite at policy version {self.version}; the weights are "
                "broken: load an earlier checkpoint, lower --lr"
            )

    def close(self) -> None:
        """Give the cache's memory back; a later call allocates it again."""
        self.cache.release()

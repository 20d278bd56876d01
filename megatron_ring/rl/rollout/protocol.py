"""The rollout engine's interface: requests, sampling parameters, guarantees; in this process or on a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RolloutError
from megatron_ring.rl.types import Response


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How responses are sampled, for all requests of one call.

    ``temperature`` 0 takes the most likely token. ``max_response_length`` counts tokens, the stop token and a
    resumed prefix included. ``stop_ids`` end a response, and the stop token stays in it.

    With an engine of exact seeds (:class:`Guarantees`) a token's random number follows from ``seed``, its prompt's uid,
    its sample and its position alone, whatever else is decoded with it. Its logits still change with that by rounding,
    since a batch of another size is summed in another order: in float32 the same tokens come out up to ties at
    rounding; in bfloat16 1 of 24 responses was seen to change with the number of slots.

    Example: ``SamplingParams(temperature=1.0, max_response_length=512, stop_ids=(2,), seed=7)``.

    Raises:
        RolloutError: a value is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_response_length: int
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    record_routes: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise RolloutError(f"temperature={self.temperature} must be >= 0; 0 takes the most likely token")
        if not 0 < self.top_p <= 1:
            raise RolloutError(f"top_p={self.top_p} must lie in (0, 1]; 1 allows every token")
        if self.top_k < 0:
            raise RolloutError(f"top_k={self.top_k} must be >= 0; 0 allows every token")
        if self.max_response_length < 1:
            raise RolloutError(f"max_response_length={self.max_response_length} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One requested response: the ``sample``-th to ``prompt``, continued from ``prefix`` if there is one.

    Example: ``Request(prompt=prompt, sample=3)``; next step, ``Request(prompt=prompt, sample=3,
    prefix=unfinished)``.
    """

    prompt: Prompt
    sample: int
    prefix: Response | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBudget:
    """How much one call generates, summed over data-parallel ranks (C3PO++).

    ``tokens`` are new ones; ``concurrency`` sequences are decoded at the same time. What is decoded when depends on the
    job, not on the layout: the requests of all ranks are one queue by (prompt uid, sample), of which ``concurrency`` are
    admitted at first, and each that ends admits the next. In a round every admitted sequence gains one token;
    generation stops after the first round that reaches ``tokens``, so by less than ``concurrency`` tokens beyond it.

    Raises:
        RolloutError: a value is below 1.
    """

    tokens: int
    concurrency: int

    def __post_init__(self) -> None:
        for name in ("tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise RolloutError(f"a rollout budget's {name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Guarantees:
    """What an engine guarantees of its responses; a setting that needs more is refused before the first step.

    ``exact_seeds``: the same seed gives the same responses at every layout and after every resume. ``logprobs``: log p
    of each sampled token under the policy that sampled it; without it ``logprobs_R`` may hold anything and is not read.
    ``routes``: the experts of each token, where asked for. ``token_budget``: a call stops at a number of new
    tokens, and continues prefixes.
    """

    exact_seeds: bool
    logprobs: bool
    routes: bool
    token_budget: bool


class RolloutEngine(Protocol):
    """Turns requests into responses under the policy version that was published last.

    ``--rollout-engine`` names a class whose classmethod ``open(trainer, config)`` makes the engine of a run that trains
    ``trainer`` (:class:`~megatron_ring.train.engine.Engine`; ``config`` is its RolloutConfig), collective over the world.
    Every rank opens one, publishes to it and closes it. ``generate`` is called on every rank where ``on_every_rank`` is
    set: the ranks of a model-parallel group decode together. Otherwise it is called on the first rank of each
    such group alone, and the others receive its responses (:class:`~megatron_ring.rl.rollout.relay.Relay`).
    """

    @property
    def guarantees(self) -> Guarantees: ...

    @property
    def on_every_rank(self) -> bool: ...

    @property
    def version(self) -> int: ...

    def publish(self, version: int) -> None:
        """Sample from the trainer's current weights from now on, and mark tokens with ``version``. Collective
        over the world.
        """
        ...

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, budget: RolloutBudget | None = None
    ) -> Iterator[Response]:
        """Each request's response as it finishes; a data-parallel rank asks for its own.

        With a ``budget`` responses come round by round, those of one round in the queue's order; what remains comes last
        with ``stop="unfinished"``, possibly without any token. A request whose prefix already has the maximum length is
        returned first, without a new token; it keeps its place in the queue, which counts as ended after the round in
        which it was admitted.
        """
        ...

    def close(self) -> None:
        """Release memory, connections and processes."""
        ...

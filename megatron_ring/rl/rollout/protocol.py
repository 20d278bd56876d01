"""What a generation engine is asked and what it answers, in this process or behind a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ring.data.prompts import Prompt
from megatron_ring.errors import RolloutError
from megatron_ring.rl.types import Response


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How answers are drawn, for all requests of one call.

    ``temperature`` 0 takes the most likely token. ``max_response_length`` counts tokens, the stop token and a
    resumed prefix included. ``stop_ids`` end a response, which keeps the one it met. A token's random number
    follows from ``seed``, its prompt's uid, its sample and its place alone, so the same response comes out
    whatever else is decoded with it.

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
    """One response wanted: the ``sample``-th to ``prompt``, gone on with from ``prefix`` where there is one.

    Example: ``Request(prompt=prompt, sample=3)``; next step, ``Request(prompt=prompt, sample=3,
    prefix=unfinished)``.
    """

    prompt: Prompt
    sample: int
    prefix: Response | None = None


class RolloutEngine(Protocol):
    """Turns requests into responses under the policy version that it was last given."""

    version: int

    def load_weights(self, version: int) -> None:
        """Sample from the trainer's present weights, and call them ``version``."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, *, token_budget: int | None = None
    ) -> Iterator[Response]:
        """Each request's response as it finishes; where ``token_budget`` new tokens (summed over data-parallel
        ranks) are reached first, what remains comes last as it stands, with ``stop="unfinished"`` and maybe
        no token at all.
        """
        ...

    def close(self) -> None:
        """Give memory, connections and processes back."""
        ...

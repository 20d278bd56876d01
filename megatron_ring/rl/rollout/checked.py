"""A user's rollout engine, checked against the contract of
:class:`~megatron_ring.rl.rollout.protocol.RolloutEngine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn, get_args

import numpy as np

from megatron_ring.errors import RolloutError
from megatron_ring.rl.own_code import own_code
from megatron_ring.rl.rollout.protocol import Request, RolloutEngine, SamplingParams
from megatron_ring.rl.types import Response, StopReason


class Checked:
    """Passes on the responses of ``engine`` after checking them; an exception of it becomes one line.

    If the engine does not guarantee log p, log p of its responses is set to NaN.

    Args:
        name: the value of ``rollout_engine``.
        vocab_size: token ids are below it.
    """

    def __init__(self, engine: RolloutEngine, *, name: str, vocab_size: int):
        self.engine, self.name, self.vocab_size = engine, name, vocab_size
        self.guarantees, self.on_every_rank = engine.guarantees, engine.on_every_rank
        self.version = 0

    def publish(self, version: int) -> None:
        """Collective over the world."""
        with own_code("rollout_engine", self.name, RolloutError):
            self.engine.publish(version)
        self.version = version

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        token_budget: int | None = None,
        concurrency: int | None = None,
    ) -> Iterator[Response]:
        """See :class:`RolloutEngine`.

        Raises:
            RolloutError: a response breaks the contract or is missing, or the engine raised an exception.
        """
        missing = {(request.prompt.uid, request.sample): request for request in requests}
        with own_code("rollout_engine", self.name, RolloutError):
            for response in self.engine.generate(
                requests, sampling, token_budget=token_budget, concurrency=concurrency
            ):
                if not isinstance(response, Response):
                    self._refuse(f"gave {type(response).__name__}, not a Response")
                request = missing.pop(response.key, None)
                if request is None:
                    self._refuse(
                        f"answered {_words(response.key)}, which was not asked for or is answered already"
                    )
                why = self._problem(response, request, sampling, may_stop=token_budget is not None)
                if why is not None:
                    self._refuse(f"gave a response to {_words(response.key)} {why}")
                yield response if self.guarantees.logprobs else _without_logprobs(response)
        if missing:
            self._refuse(
                f"left {len(missing)} of {len(requests)} requests without a response, first {_words(next(iter(missing)))}"
            )

    def _refuse(self, what: str) -> NoReturn:
        rule = "each request gets one response as megatron_ring.rl.types.Response says; correct the engine"
        raise RolloutError(f"rollout_engine={self.name} {what}; {rule}")

    def _problem(
        self, response: Response, request: Request, sampling: SamplingParams, *, may_stop: bool
    ) -> str | None:
        """What is wrong with a response that was asked for; None if nothing is."""
        tokens_R, length = response.tokens_R, sampling.max_response_length
        rows = {"tokens_R": tokens_R, "logprobs_R": response.logprobs_R, "versions_R": response.versions_R}
        for name, row_R in rows.items():
            kind = "f" if name == "logprobs_R" else "iu"
            if not isinstance(row_R, np.ndarray) or row_R.ndim != 1 or row_R.dtype.kind not in kind:
                return f"whose {name} is no row of {'floats' if kind == 'f' else 'integers'} (numpy)"
            if len(row_R) != len(tokens_R):
                return f"with {len(row_R)} {name} for {len(tokens_R)} tokens"
        if response.stop not in get_args(StopReason) or (response.stop == "unfinished" and not may_stop):
            known = "eos, length" + (", unfinished" if may_stop else "")
            return f"that says stop={response.stop!r}, which must be one of {known}"
        least = 0 if response.stop == "unfinished" else 1
        if not least <= len(tokens_R) <= length:
            return f"of {len(tokens_R)} tokens, which must be from {least} to max_response_length={length}"
        if len(tokens_R) and not 0 <= tokens_R.min() <= tokens_R.max() < self.vocab_size:
            ids = f"token ids from {tokens_R.min()} to {tokens_R.max()}"
            return f"with {ids}, which must be from 0 to below vocab_size={self.vocab_size}"
        if self.guarantees.logprobs and not np.isfinite(response.logprobs_R).all():
            return "whose log p is not finite, although it guarantees log p"
        prefix = request.prefix
        if prefix is not None and not np.array_equal(tokens_R[: prefix.length], prefix.tokens_R):
            return "that does not begin with the prefix it was asked to continue"
        return None

    def close(self) -> None:
        with own_code("rollout_engine", self.name, RolloutError):
            self.engine.close()


def _without_logprobs(response: Response) -> Response:
    return replace(response, logprobs_R=np.full(response.length, np.nan, np.float32))


def _words(key: tuple[int, int]) -> str:
    return f"sample {key[1]} of prompt {key[0]}"

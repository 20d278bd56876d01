"""A user's rollout engine, checked against the contract of
:class:`~megatron_ring.rl.rollout.protocol.RolloutEngine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NoReturn, get_args

import numpy as np

from megatron_ring.config.model import ModelConfig
from megatron_ring.errors import RolloutError
from megatron_ring.rl.own_code import own_code
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget, RolloutEngine, SamplingParams
from megatron_ring.rl.types import Response, StopReason
from megatron_ring.runtime.collectives import gather_json
from megatron_ring.runtime.session import Session


class Checked:
    """Passes on the responses of ``engine`` after checking them; an exception of it becomes one line.

    A response that is passed on is a copy with the types of :class:`Response`: the engine may use its arrays again, and
    its integers may be numpy's. If the engine does not guarantee log p, log p of its responses is set to NaN.

    Args:
        name: the value of ``rollout_engine``.
        model: what is sampled from; its sizes bound token and expert ids.
    """

    def __init__(self, engine: RolloutEngine, session: Session, *, name: str, model: ModelConfig):
        self.engine, self.session, self.name, self.model = engine, session, name, model
        self.guarantees, self.on_every_rank = engine.guarantees, engine.on_every_rank
        self.version = 0

    def publish(self, version: int) -> None:
        """Collective over the world."""
        with own_code("rollout_engine", self.name, RolloutError):
            self.engine.publish(version)
        self.version = version

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, budget: RolloutBudget | None = None
    ) -> Iterator[Response]:
        """See :class:`RolloutEngine`. Called on every rank, its end is collective over the model-parallel group.

        Raises:
            RolloutError: a response breaks the contract or is missing, or the engine raised an exception.
        """
        seen = sha256()
        missing = {(request.prompt.uid, request.sample): request for request in requests}
        with own_code("rollout_engine", self.name, RolloutError):
            for response in self.engine.generate(requests, sampling, budget):
                if not isinstance(response, Response):
                    self._refuse(f"gave {type(response).__name__}, not a Response")
                request = missing.pop(response.key, None)
                if request is None:
                    self._refuse(
                        f"answered {_words(response.key)}, which was not asked for or is answered already"
                    )
                why = self._problem(response, request, sampling, may_stop=budget is not None)
                if why is not None:
                    self._refuse(f"gave a response to {_words(response.key)} {why}")
                own = self._copy(response, request)
                seen.update(repr((own.key, own.stop)).encode())
                for array in (own.tokens_R, own.logprobs_R, own.versions_R, own.routes_SLK):
                    seen.update(b"" if array is None else array.tobytes())
                yield own
        if missing:
            self._refuse(
                f"left {len(missing)} of {len(requests)} requests without a response, first {_words(next(iter(missing)))}"
            )

        self._require_the_same(seen.hexdigest())

    def _require_the_same(self, seen: str) -> None:
        """All ranks of a model-parallel group train on the same responses. Collective over that group."""
        group = self.session.topology.groups.mp
        if not self.on_every_rank or group.size() == 1:
            return
        if len(set(gather_json(seen, group, self.session.device))) > 1:
            self._refuse("gave other responses, or another order, on other ranks of one model-parallel group")

    def _refuse(self, what: str) -> NoReturn:
        rule = "each request gets one response as megatron_ring.rl.types.Response says; correct the engine"
        raise RolloutError(f"rollout_engine={self.name} {what}; {rule}")

    def _problem(
        self, response: Response, request: Request, sampling: SamplingParams, *, may_stop: bool
    ) -> str | None:
        """What is wrong with a response that was asked for; None if nothing is."""
        tokens_R, length = response.tokens_R, sampling.max_response_length
        rows = {"tokens_R": tokens_R, "versions_R": response.versions_R}
        if self.guarantees.logprobs:
            rows["logprobs_R"] = response.logprobs_R
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
        if not _within(tokens_R, self.model.vocab_size - 1):
            ids = f"token ids from {tokens_R.min()} to {tokens_R.max()}"
            return f"with {ids}, which must be from 0 to below vocab_size={self.model.vocab_size}"
        versions_R = response.versions_R
        if not _within(versions_R, self.version):
            those = f"policy versions from {versions_R.min()} to {versions_R.max()}"
            return f"with {those}, which must be from 0 to {self.version}, the last that was published"
        if self.guarantees.logprobs and not np.isfinite(_row(response.logprobs_R, np.float32)).all():
            return "whose log p is not finite, although it guarantees log p"
        prefix = request.prefix
        if prefix is not None and not np.array_equal(tokens_R[: prefix.length], prefix.tokens_R):
            return "that does not begin with the prefix it was asked to continue"
        if sampling.record_routes and response.stop != "unfinished":
            return self._problem_of_routes(response, len(request.prompt.tokens))
        return None

    def _problem_of_routes(self, response: Response, prompt_tokens: int) -> str | None:
        model, found = self.model, response.routes_SLK
        shape = (prompt_tokens + response.length - 1, model.num_moe_layers, model.moe_router_topk)
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.shape != shape:
            return f"whose routes_SLK is no array of integers of shape {list(shape)} (numpy)"
        if not _within(found, model.num_experts - 1):
            ids = f"expert ids from {found.min()} to {found.max()}"
            return f"with {ids}, which must be from 0 to below num_experts={model.num_experts}"
        return None

    def _copy(self, response: Response, request: Request) -> Response:
        logprobs_R, routes_SLK = response.logprobs_R, response.routes_SLK
        if not self.guarantees.logprobs:
            logprobs_R = np.full(response.length, np.nan)
        return Response(
            prompt_uid=request.prompt.uid,
            sample=request.sample,
            tokens_R=_row(response.tokens_R, np.int32),
            logprobs_R=_row(logprobs_R, np.float32),
            versions_R=_row(response.versions_R, np.int32),
            stop=response.stop,
            routes_SLK=None if routes_SLK is None else _row(routes_SLK, np.int16),
        )

    def close(self) -> None:
        with own_code("rollout_engine", self.name, RolloutError):
            self.engine.close()


def _within(numbers: np.ndarray, most: int) -> bool:
    return not numbers.size or bool(numbers.min() >= 0 and numbers.max() <= most)


def _row(numbers: np.ndarray, kind: type) -> np.ndarray:
    """A copy that nobody else writes to; a number that is too large for ``kind`` becomes infinite."""
    with np.errstate(over="ignore"):
        return np.array(numbers, dtype=kind)


def _words(key: tuple[int, int]) -> str:
    return f"sample {key[1]} of prompt {key[0]}"

"""An engine, verifiers and prompts for tests of the collector: real interfaces, no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from megatron_ring.config.rl import RolloutConfig
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RolloutError
from megatron_ring.rl.collect.collector import Collector
from megatron_ring.rl.collect.sampler import RolloutSampler
from megatron_ring.rl.collect.state import RolloutState
from megatron_ring.rl.rollout.protocol import Guarantees, Request, RolloutBudget, SamplingParams
from megatron_ring.rl.types import Response, RewardResult


class Alone:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def session(dp_size: int = 1, dp_rank: int = 0) -> SimpleNamespace:
    groups = SimpleNamespace(dp=Alone(), mp=Alone())
    topology = SimpleNamespace(
        dp_size=dp_size,
        dp_rank=dp_rank,
        pp_size=1,
        vpp_size=1,
        is_last_stage=True,
        groups=groups,
        owns=lambda index: index % dp_size == dp_rank,
    )
    return SimpleNamespace(
        topology=topology,
        device=torch.device("cpu"),
        world_size=1,
        rank=0,
        summed=lambda *numbers, group=None: list(numbers),
    )


def prompt(uid: int) -> Prompt:
    return Prompt(
        uid=uid, domain="math", text=f"{uid}?", tokens=(3, uid % 50, 4), reference={"answer": str(uid)}
    )


class Stream:
    """Prompts 0, 1, 2, ..."""

    def __init__(self):
        self.drawn = 0

    def next(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [prompt(uid) for uid in range(self.drawn - count, self.drawn)]

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def wanted_length(uid: int, sample: int) -> int:
    """How long a response will be when nothing interrupts it: 2 to 9 tokens."""
    return 2 + (5 * uid + 3 * sample) % 8


class ScriptedEngine:
    """Decodes two responses at a time, a token each in turn; a response's tokens are its places."""

    guarantees = Guarantees(exact_seeds=True, logprobs=True, routes=False, token_budget=True)
    on_every_rank = False

    def __init__(self, length: Callable[[int, int], int] = wanted_length, slots: int = 2):
        self.length, self.slots, self.version = length, slots, 0
        self.calls: list[list[Request]] = []
        self.budgets: list[RolloutBudget | None] = []
        self.log: list[str] = []
        self.fails_after: int | None = None

    def publish(self, version: int) -> None:
        self.version = version

    def close(self) -> None: ...

    def generate(
        self, requests: Sequence[Request], sampling: SamplingParams, budget: RolloutBudget | None = None
    ) -> Iterator[Response]:
        self.calls.append(list(requests))
        self.budgets.append(budget)
        waiting = [self._begin(request) for request in requests]
        busy: list[Response] = []
        produced = ended = 0
        while (waiting or busy) and (budget is None or produced < budget.tokens):
            while waiting and len(busy) < self.slots:
                busy.append(waiting.pop(0))
            going = []
            for response in busy:
                if response.length < self.length(*response.key):
                    response = self._longer(response)
                    produced += 1
                if response.length < self.length(*response.key):
                    going.append(response)
                    continue
                if self.fails_after == ended:
                    raise RolloutError("the server went away; start it again")
                ended += 1
                self.log.append("yield")
                yield replace(response, stop="eos")
            busy = going
        self.log.append("end")
        yield from (replace(response, stop="unfinished") for response in [*busy, *waiting])

    def _begin(self, request: Request) -> Response:
        if request.prefix is not None:
            return request.prefix
        empty = np.zeros(0, np.int32)
        return Response(
            prompt_uid=request.prompt.uid,
            sample=request.sample,
            tokens_R=empty,
            logprobs_R=empty.astype(np.float32),
            versions_R=empty,
            stop="unfinished",
        )

    def _longer(self, r: Response) -> Response:
        return replace(
            r,
            tokens_R=np.append(r.tokens_R, np.int32(r.length)),
            logprobs_R=np.append(r.logprobs_R, np.float32(-0.5)),
            versions_R=np.append(r.versions_R, np.int32(self.version)),
        )


class Verifiers:
    """Judge by ``score(prompt, text)``; the last verdicts come in the wrong order."""

    def __init__(self, score: Callable[[Prompt, str], float], log: list[str] | None = None):
        self.score, self.log = score, [] if log is None else log
        self.seen: list[tuple[int, str]] = []

    def submit(self, prompt: Prompt, text: str) -> Future[RewardResult]:
        self.log.append("submit")
        self.seen.append((prompt.uid, text))
        future: Future[RewardResult] = Future()
        value = self.score(prompt, text)
        future.set_result(RewardResult(score=value, status="correct" if value else "wrong"))
        return future


class Places:
    """A tokenizer whose text is the tokens in words."""

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


def by_length(prompt: Prompt, text: str) -> float:
    return float(len(text.split()) % 2)


def collector(
    engine: ScriptedEngine,
    score: Callable[[Prompt, str], float] = by_length,
    where: SimpleNamespace | None = None,
    **settings,
) -> Collector:
    where = where or session()
    verifiers = Verifiers(score, engine.log)
    settings = {"prompts_per_step": 4, "group_size": 3, "max_response_length": 16} | settings
    sampler = RolloutSampler(where, engine=engine, rewards=verifiers, tokenizer=Places())
    config = RolloutConfig(**settings)
    return Collector(
        config,
        where,
        state=RolloutState(Stream(), config.group_size),
        sampler=sampler,
        sampling=SamplingParams(max_response_length=16),
    )


def keys(groups) -> list[list[tuple[int, int]]]:
    return [[rollout.response.key for rollout in group] for group in groups]


def saved(collectors: Sequence[Collector]) -> tuple[dict, Callable[[str], bytes]]:
    """What a checkpoint of ``collectors``, one per data-parallel rank, holds: the shared state and its files by name."""
    files: dict[str, bytes] = {}
    for rank, each in enumerate(collectors):
        files |= each.state.files(rank)
    return collectors[0].state.state_dict(len(collectors)), files.__getitem__

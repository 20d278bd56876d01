"""Responses with their rewards: verifiers run while generation continues."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.data.text.tokenizer import Tokenizer
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget, RolloutEngine, SamplingParams
from megatron_ring.rl.types import Response, RewardResult, Rollout
from megatron_ring.runtime.collectives import broadcast_json
from megatron_ring.runtime.session import Session


class Rewards(Protocol):
    """Where rewards come from: :class:`megatron_ring.rl.reward.workers.pool.RewardPool` is one."""

    def submit(self, prompt: Prompt, text: str) -> Future[RewardResult]: ...


class RolloutSampler:
    """Turns requests into responses with rewards; verifiers run beside generation."""

    def __init__(
        self, session: Session, *, engine: RolloutEngine, rewards: Rewards | None, tokenizer: Tokenizer
    ):
        """``rewards`` is needed on the reward rank of a model-parallel group only (:func:`is_reward_rank`)."""
        self.session, self.engine, self.rewards, self.tokenizer = session, engine, rewards, tokenizer

    def __call__(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        budget: RolloutBudget | None = None,
    ) -> tuple[list[Rollout], list[Response]]:
        """(rewarded responses in the order in which they ended, responses that a budget interrupted).

        Collective over the model-parallel group, and over all ranks where the engine's ranks step together.
        """
        prompts = {request.prompt.uid: request.prompt for request in requests}
        ended: list[tuple[Response, Future[RewardResult] | None]] = []
        unfinished: list[Response] = []
        for response in self.engine.generate(requests, sampling, budget):
            if response.stop == "unfinished":
                unfinished.append(response)
            else:
                ended.append((response, self._submit(prompts[response.prompt_uid], response)))
        rollouts = [
            Rollout(prompt=prompts[response.prompt_uid], response=response, reward=reward)
            for (response, _), reward in zip(ended, self._rewards_of(ended), strict=True)
        ]
        return rollouts, unfinished

    def _submit(self, prompt: Prompt, response: Response) -> Future[RewardResult] | None:
        if self.rewards is None:
            return None
        return self.rewards.submit(prompt, self.tokenizer.decode(response.tokens_R.tolist()))

    def _rewards_of(self, ended: list[tuple[Response, Future[RewardResult] | None]]) -> list[RewardResult]:
        """Each response's reward, once all verifiers are done."""
        values = None
        if self.rewards is not None:
            rewards = [future.result() for _, future in ended if future is not None]
            values = [(r.score, r.status, r.detail) for r in rewards]
        group, device = self.session.topology.groups.mp, self.session.device
        values = broadcast_json(values, 0, group, device)
        return [RewardResult(score=score, status=status, detail=detail) for score, status, detail in values]


def is_reward_rank(session: Session) -> bool:
    """True on the one rank of a model-parallel group that runs verifiers."""
    return session.topology.groups.mp.rank() == 0

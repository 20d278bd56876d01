"""From prompts to judged groups: generation, with verifiers at work beside it.

Lines 1 to 3 of an RL step. The stream of prompts is the same on every rank; each data-parallel rank answers
its own share (prompt ``uid`` belongs to rank ``uid % dp``), and all ranks of one model-parallel group hold the
same responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from megatron_ring.config.rl import RolloutConfig, rollout_concurrency
from megatron_ring.data.json_text import count_in, counts_in
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.data.text.tokenizer import Tokenizer
from megatron_ring.errors import RolloutError
from megatron_ring.rl.collect.pending import PendingGroups, is_informative
from megatron_ring.rl.rollout.protocol import Request, RolloutEngine, SamplingParams
from megatron_ring.rl.rollout_io import (
    prompt_from_json,
    prompt_to_json,
    responses_to_bytes,
    rollouts_from_bytes,
    rollouts_to_bytes,
)
from megatron_ring.rl.types import Response, RewardResult, Rollout
from megatron_ring.runtime.collectives import broadcast_json, gather_json
from megatron_ring.runtime.session import Session


class Prompts(Protocol):
    """Where prompts come from: :class:`megatron_ring.data.prompts.stream.PromptStream` is one."""

    def next(self, count: int) -> list[Prompt]: ...


class Rewards(Protocol):
    """Who judges: :class:`megatron_ring.rl.reward.workers.pool.RewardPool` is one."""

    def submit(self, prompt: Prompt, text: str) -> Future[RewardResult]: ...


class RolloutSampler:
    """Has requests answered and the answers judged, verifiers at work beside generation."""

    def __init__(
        self, session: Session, *, engine: RolloutEngine, rewards: Rewards | None, tokenizer: Tokenizer
    ):
        """``rewards`` is needed on the judging rank of a model-parallel group only (:func:`is_reward_rank`)."""
        self.session, self.engine, self.rewards, self.tokenizer = session, engine, rewards, tokenizer

    def __call__(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        token_budget: int | None = None,
        concurrency: int | None = None,
    ) -> tuple[list[Rollout], list[Response]]:
        """(judged responses in the order in which they ended, responses that a budget interrupted).

        Collective over the model-parallel group, and over all ranks where the engine's ranks step together.
        """
        prompts = {request.prompt.uid: request.prompt for request in requests}
        ended: list[tuple[Response, Future[RewardResult] | None]] = []
        unfinished: list[Response] = []
        stream = self.engine.generate(requests, sampling, token_budget=token_budget, concurrency=concurrency)
        for response in stream:
            if response.stop == "unfinished":
                unfinished.append(response)
            else:
                ended.append((response, self._submit(prompts[response.prompt_uid], response)))
        rollouts = [
            Rollout(prompt=prompts[response.prompt_uid], response=response, reward=reward)
            for (response, _), reward in zip(ended, self._verdicts(ended), strict=True)
        ]
        return rollouts, unfinished

    def _submit(self, prompt: Prompt, response: Response) -> Future[RewardResult] | None:
        if self.rewards is None:
            return None
        return self.rewards.submit(prompt, self.tokenizer.decode(response.tokens_R.tolist()))

    def _verdicts(self, ended: list[tuple[Response, Future[RewardResult] | None]]) -> list[RewardResult]:
        """Each response's reward, once all are judged."""
        values = None
        if self.rewards is not None:
            rewards = [future.result() for _, future in ended if future is not None]
            values = [(r.score, r.status, r.detail) for r in rewards]
        group, device = self.session.topology.groups.mp, self.session.device
        values = broadcast_json(values, 0, group, device)
        return [RewardResult(score=score, status=status, detail=detail) for score, status, detail in values]


@dataclass(kw_only=True)
class StepRollouts:
    """One step's rollouts of this data-parallel rank, and what happened on the way.

    Response tokens: ``open_before`` and ``open_after`` are those of groups that wait for a member, before and after
    the step; ``stale_tokens`` were given up for their age, ``excluded_tokens`` belong to uninformative groups that
    dynamic sampling replaced. Example: ``StepRollouts(version=5, groups=[[...], [...]], generated_tokens=4012)``.
    """

    version: int
    groups: list[list[Rollout]] = field(default_factory=list)
    generated_tokens: int = 0
    open_before: int = 0
    open_after: int = 0
    stale_tokens: int = 0
    excluded_tokens: int = 0
    uninformative_groups: int = 0
    stale_responses: int = 0
    rounds: int = 0
    prompts_drawn: int = 0
    """Of the whole job."""

    @property
    def rollouts(self) -> list[Rollout]:
        """All of them, in the order of their prompts and samples."""
        return [rollout for group in self.groups for rollout in group]

    @property
    def num_tokens(self) -> int:
        """Response tokens of the groups."""
        return sum(rollout.response.length for rollout in self.rollouts)


class Collector:
    """Draws prompts, has them answered and judged. Its methods are collective over the world."""

    def __init__(
        self,
        config: RolloutConfig,
        session: Session,
        *,
        prompts: Prompts,
        answer: RolloutSampler,
        sampling: SamplingParams,
    ):
        self.config, self.session = config, session
        self.prompts, self.answer, self.sampling = prompts, answer, sampling
        self.book = PendingGroups(config.group_size)
        # steps in a row whose complete groups were all uninformative: with C3PO++ a step ends without refilling
        self.steps_without_signal = 0

    def collect(self, version: int) -> StepRollouts:
        """The judged groups of one step, in the order of their prompts.

        Without C3PO++ that is every prompt drawn; with it, what was finished when the step's tokens had been
        generated. With dynamic sampling, groups whose rewards are all equal are replaced by new prompts, as long
        as C3PO++ has tokens left; what is missing then is drawn in the next step.

        Raises:
            RolloutError: refilling found too little to learn from in ``dynamic_sampling_max_rounds`` rounds, or,
                with C3PO++, as many steps in a row nothing at all.
        """
        found = StepRollouts(version=version, open_before=self.book.num_tokens)
        stale = self.book.drop_stale(version - self.config.rollout_max_staleness)
        found.stale_responses = len(stale)
        found.stale_tokens = sum(response.length for response in stale)
        missing = self.config.prompts_per_step - self._total(len(self.book.open))
        while True:
            self._draw(found, max(missing, 0))
            self._answer(found, self._tokens_left(found))
            if not self.config.dynamic_sampling:
                return found
            # with C3PO++ groups in the making will come by themselves
            have = self._total(len(found.groups)) + self._total(len(self.book.open))
            missing = self.config.prompts_per_step - have
            if missing <= 0 or self._tokens_left(found) == 0:
                self._count_barren(found)
                return found
            if found.rounds >= self.config.dynamic_sampling_max_rounds:
                self._give_up(self._total(len(found.groups)), f"{found.rounds} rounds")

    def _count_barren(self, found: StepRollouts) -> None:
        if self._total(len(found.groups)):
            self.steps_without_signal = 0
        elif self._total(found.uninformative_groups):
            self.steps_without_signal += 1
        if self.steps_without_signal >= self.config.dynamic_sampling_max_rounds:
            self._give_up(0, f"each of {self.steps_without_signal} steps")

    def _give_up(self, groups: int, where: str) -> None:
        raise RolloutError(
            f"dynamic_sampling found {groups} of prompts_per_step={self.config.prompts_per_step} groups with "
            f"different rewards in {where}; use easier or harder prompts, or raise dynamic_sampling_max_rounds"
        )

    def refill(self, found: StepRollouts, count: int) -> None:
        """Draw ``count`` prompts more for a step that lacks tokens, into ``found``.

        With C3PO++ this is one more round of ``rollout_token_budget`` tokens, and groups in the making are counted
        among the ``count``.
        """
        if self.config.rollout_token_budget:
            count = max(count - self._total(len(self.book.open)), 0)
        self._draw(found, count)
        self._answer(found, self.config.rollout_token_budget or None)
        if self._total(len(found.groups)):
            self.steps_without_signal = 0

    def _draw(self, found: StepRollouts, count: int) -> None:
        found.prompts_drawn += count
        topology = self.session.topology
        own = [p for p in self.prompts.next(count) if p.uid % topology.dp_size == topology.dp_rank]
        self.book.draw(own)

    def _tokens_left(self, found: StepRollouts) -> int | None:
        """Tokens that C3PO++ may still generate in this step; None without it."""
        if not self.config.rollout_token_budget:
            return None
        return max(self.config.rollout_token_budget - self._total(found.generated_tokens), 0)

    def _answer(self, found: StepRollouts, token_budget: int | None) -> None:
        found.rounds += 1
        requests = [
            Request(prompt=prompt, sample=sample, prefix=prefix)
            for prompt, sample, prefix in self.book.wanted()
        ]
        before = {
            (request.prompt.uid, request.sample): request.prefix.length
            for request in requests
            if request.prefix is not None
        }
        concurrency = rollout_concurrency(self.config)
        rollouts, unfinished = self.answer(requests, self.sampling, token_budget, concurrency)
        for response in unfinished:
            self.book.interrupt(response)
        for rollout in rollouts:
            new = rollout.response.length - before.get(rollout.response.key, 0)
            self.book.finish(replace(rollout, arrival=(found.version, found.rounds, new)))
        after = sum(r.response.length for r in rollouts) + sum(r.length for r in unfinished)
        found.generated_tokens += after - sum(before.values())
        groups, alone = self.book.take_complete()
        found.stale_tokens += sum(rollout.response.length for rollout in alone)
        for group in groups:
            if self.config.dynamic_sampling and not is_informative(group):
                found.uninformative_groups += 1
                found.excluded_tokens += sum(rollout.response.length for rollout in group)
            else:
                found.groups.append(group)
        found.open_after = self.book.num_tokens

    def _total(self, count: int) -> int:
        return sum(gather_json(count, self.session.topology.groups.dp, self.session.device))

    def state_bytes(self) -> dict[str, bytes]:
        """Open groups of this data-parallel rank, as files of a checkpoint."""
        prompts, finished, unfinished = self.book.contents()
        return {
            "finished": rollouts_to_bytes(finished),
            "unfinished": responses_to_bytes({p.uid: p for p in prompts}, unfinished),
        }

    def state_dict(self) -> dict[str, Any]:
        """Open prompts and what each waits for; JSON-able."""
        return {
            "prompts": [prompt_to_json(group.prompt) for group in self.book.open.values()],
            "waiting": [sorted(group.waiting) for group in self.book.open.values()],
            "steps_without_signal": self.steps_without_signal,
        }

    def restore(self, states: list[dict[str, Any]], files: list[dict[str, bytes]]) -> None:
        """Take this rank's share of what all ranks had open when a checkpoint was written."""
        topology = self.session.topology
        self.steps_without_signal = max(
            (count_in(state, "steps_without_signal") for state in states), default=0
        )

        def own(uid: int) -> bool:
            return uid % topology.dp_size == topology.dp_rank

        pairs = [
            (prompt_from_json(prompt), counts_in(state, "waiting", waiting))
            for state in states
            for prompt, waiting in zip(state["prompts"], state["waiting"], strict=True)
        ]
        pairs = sorted((pair for pair in pairs if own(pair[0].uid)), key=lambda pair: pair[0].uid)

        def mine(name: str) -> Iterator[Rollout]:
            for of_rank in files:
                yield from (r for r in rollouts_from_bytes(of_rank[name]) if own(r.prompt.uid))

        self.book.restore(
            [prompt for prompt, _ in pairs],
            [waiting for _, waiting in pairs],
            mine("finished"),
            [rollout.response for rollout in mine("unfinished")],
        )


def is_reward_rank(session: Session) -> bool:
    """True on the one rank of a model-parallel group that runs verifiers."""
    return session.topology.groups.mp.rank() == 0

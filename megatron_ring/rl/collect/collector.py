"""From prompts to groups of rewarded responses, one step at a time.

The stream of prompts is the same on every rank; each data-parallel rank generates for its own share
(:meth:`~megatron_ring.runtime.topology.Topology.owns`), and all ranks of one model-parallel group hold the same
responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_ring.config.rl import RolloutConfig, rollout_concurrency
from megatron_ring.errors import RolloutError
from megatron_ring.rl.collect.pending import is_informative
from megatron_ring.rl.collect.sampler import RolloutSampler
from megatron_ring.rl.collect.state import RolloutState
from megatron_ring.rl.rollout.protocol import Request, RolloutBudget, SamplingParams
from megatron_ring.rl.types import Rollout
from megatron_ring.runtime.session import Session


@dataclass(kw_only=True)
class StepRollouts:
    """One step's rollouts of this data-parallel rank, with counts.

    Response tokens: ``open_before`` and ``open_after`` are those of groups that wait for a member, before and after
    the step; ``stale_tokens`` were dropped for their age, ``excluded_tokens`` belong to uninformative groups
    that dynamic sampling replaced. Example: ``StepRollouts(version=5, groups=[[...], [...]],
    generated_tokens=4012)``.
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
    """Draws prompts and collects their rewarded responses. Its methods are collective over the world."""

    def __init__(
        self,
        config: RolloutConfig,
        session: Session,
        *,
        state: RolloutState,
        sampler: RolloutSampler,
        sampling: SamplingParams,
    ):
        self.config, self.session = config, session
        self.state, self.sampler, self.sampling = state, sampler, sampling

    def collect(self, version: int) -> StepRollouts:
        """The rewarded groups of one step, in the order of their prompts.

        Without C3PO++ these are the groups of all prompts drawn; with it, those that are complete once the
        step's tokens are generated. With dynamic sampling, groups whose rewards are all equal are replaced by
        new prompts, as long as C3PO++ has tokens left; the next step draws what is missing then.

        Raises:
            RolloutError: refilling found too little to learn from in ``dynamic_sampling_max_rounds`` rounds, or,
                with C3PO++, as many steps in a row nothing at all.
        """
        found = StepRollouts(version=version, open_before=self.state.pending.num_tokens)
        stale = self.state.pending.drop_stale(version - self.config.rollout_max_staleness)
        found.stale_responses = len(stale)
        found.stale_tokens = sum(response.length for response in stale)
        missing = self.config.prompts_per_step - self._total(len(self.state.pending.open))
        while True:
            self._draw(found, max(missing, 0))
            self._generate(found, self._tokens_left(found))
            if not self.config.dynamic_sampling:
                return found
            # with C3PO++ open groups will be completed without new prompts
            have = self._total(len(found.groups)) + self._total(len(self.state.pending.open))
            missing = self.config.prompts_per_step - have
            if missing <= 0 or self._tokens_left(found) == 0:
                self._count_without_signal(found)
                return found
            if found.rounds >= self.config.dynamic_sampling_max_rounds:
                self._give_up(self._total(len(found.groups)), f"{found.rounds} rounds")

    def _count_without_signal(self, found: StepRollouts) -> None:
        if self._total(len(found.groups)):
            self.state.steps_without_signal = 0
        elif self._total(found.uninformative_groups):
            self.state.steps_without_signal += 1
        if self.state.steps_without_signal >= self.config.dynamic_sampling_max_rounds:
            self._give_up(0, f"each of {self.state.steps_without_signal} steps")

    def _give_up(self, groups: int, where: str) -> None:
        raise RolloutError(
            f"dynamic_sampling found {groups} of prompts_per_step={self.config.prompts_per_step} groups with "
            f"different rewards in {where}; use easier or harder prompts, or raise dynamic_sampling_max_rounds"
        )

    def refill(self, found: StepRollouts, count: int) -> None:
        """Draw ``count`` more prompts for a step that lacks tokens, and add their groups to ``found``.

        With C3PO++ this is one more round of ``rollout_token_budget`` tokens, and open groups count towards
        ``count``.
        """
        if self.config.rollout_token_budget:
            count = max(count - self._total(len(self.state.pending.open)), 0)
        self._draw(found, count)
        self._generate(found, self.config.rollout_token_budget or None)
        if self._total(len(found.groups)):
            self.state.steps_without_signal = 0

    def _draw(self, found: StepRollouts, count: int) -> None:
        found.prompts_drawn += count
        prompts = self.state.prompts.next(count)
        self.state.pending.draw(prompt for prompt in prompts if self.session.topology.owns(prompt.uid))

    def _tokens_left(self, found: StepRollouts) -> int | None:
        """Tokens that C3PO++ may still generate in this step; None without it."""
        if not self.config.rollout_token_budget:
            return None
        return max(self.config.rollout_token_budget - self._total(found.generated_tokens), 0)

    def _generate(self, found: StepRollouts, token_budget: int | None) -> None:
        found.rounds += 1
        requests = [
            Request(prompt=prompt, sample=sample, prefix=prefix)
            for prompt, sample, prefix in self.state.pending.wanted()
        ]
        before = {
            (request.prompt.uid, request.sample): request.prefix.length
            for request in requests
            if request.prefix is not None
        }
        concurrency = rollout_concurrency(self.config)
        budget = None
        if token_budget is not None and concurrency is not None:
            budget = RolloutBudget(tokens=token_budget, concurrency=concurrency)
        rollouts, unfinished = self.sampler(requests, self.sampling, budget)
        for response in unfinished:
            self.state.pending.interrupt(response)
        for rollout in rollouts:
            new = rollout.response.length - before.get(rollout.response.key, 0)
            self.state.pending.finish(replace(rollout, arrival=(found.version, found.rounds, new)))
        after = sum(r.response.length for r in rollouts) + sum(r.length for r in unfinished)
        found.generated_tokens += after - sum(before.values())
        groups, alone = self.state.pending.take_complete()
        found.stale_tokens += sum(rollout.response.length for rollout in alone)
        for group in groups:
            if self.config.dynamic_sampling and not is_informative(group):
                found.uninformative_groups += 1
                found.excluded_tokens += sum(rollout.response.length for rollout in group)
            else:
                found.groups.append(group)
        found.open_after = self.state.pending.num_tokens

    def _total(self, count: int) -> int:
        """Collective over the data-parallel group: the sum over its ranks."""
        (total,) = self.session.summed(count, group=self.session.topology.groups.dp)
        return int(total)

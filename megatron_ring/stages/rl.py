"""Reinforcement learning with C3PO (Ring-lite, arXiv 2506.14731, 3.2): the page to read for a step.

A step draws prompts, samples groups of responses, judges them while others are sampled, assigns advantages,
fills the token budget, packs it into microbatches, scores them under the old and the reference policy, updates
once per minibatch, and publishes the weights to the rollout engine. ``train_iters`` counts such steps. A ledger
then accounts for every token.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.folder import CRITIC, critic_of, folder_of
from megatron_ring.checkpoint.format import TRAINER_STATE, read_attachment
from megatron_ring.checkpoint.origin import must_be_same, origin_of
from megatron_ring.config.run import RunConfig
from megatron_ring.config.stage_rules import Stage
from megatron_ring.data.json_text import count_in
from megatron_ring.data.prompts.stream import open_prompts
from megatron_ring.errors import CheckpointError
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.observe.responses import ResponseLog
from megatron_ring.rl.alarms import Alarms, say_held_out
from megatron_ring.rl.batch.microbatch import RLMicrobatch, with_column, with_routes
from megatron_ring.rl.batch.planner import CarryOver, MinibatchPlanner, Plan, must_fit
from megatron_ring.rl.collect.collector import Collector, RolloutSampler, StepRollouts, is_reward_rank
from megatron_ring.rl.evaluation import evaluate
from megatron_ring.rl.learn.advantage import assign, is_masked, moments, whiten
from megatron_ring.rl.learn.critic import Critic
from megatron_ring.rl.learn.objective import PolicyObjective
from megatron_ring.rl.learn.objective import metrics as objective_metrics
from megatron_ring.rl.learn.objective.policy_losses import StepFacts
from megatron_ring.rl.learn.reference_policy import ReferencePolicy
from megatron_ring.rl.ledger import Ledger, Update, account
from megatron_ring.rl.reward.references import check_sources
from megatron_ring.rl.reward.registry import parse_reward_functions
from megatron_ring.rl.reward.workers.pool import RewardPool
from megatron_ring.rl.rollout.inprocess import InProcessEngine
from megatron_ring.rl.rollout.protocol import SamplingParams
from megatron_ring.rl.rollout_io import rollouts_from_bytes, rollouts_to_bytes
from megatron_ring.rl.rollout_metrics import (
    add_up,
    response_rows,
    rollout_metrics,
    rollout_sums,
    router_metrics,
    value_metrics,
)
from megatron_ring.rl.types import Rollout
from megatron_ring.runtime.collectives import gather_json
from megatron_ring.runtime.session import Session
from megatron_ring.stages.run import StageRun, open_stage
from megatron_ring.train.engine import StepReport
from megatron_ring.train.schedule import learning_rate

log = logging.getLogger("megatron_ring")


def train_rl(config: RunConfig) -> None:
    """Run the whole stage on this process. Every rank of the world calls it with the same configuration.

    Raises:
        RingError: bad input (one line says what to do), nothing to learn from, or a loss that is not finite
            several steps running.
    """
    with open_stage(config) as session, contextlib.ExitStack() as stack:
        RlRun(config, session, stack).train()


class RlRun(StageRun):
    """The parts of one RL run and its step."""

    stage: ClassVar[Stage] = "rl"
    shown: ClassVar[tuple[str, ...]] = ("reward", "response_length", "entropy", "grad_norm")
    validates_at_start: ClassVar[bool] = True

    def __init__(self, config: RunConfig, session: Session, stack: contextlib.ExitStack):
        """``stack`` closes verifiers and engine when the run ends."""
        config = replace(config, model=config.model.with_still_bias())
        super().__init__(config, session)
        assert self.tokenizer is not None
        rollout, seed = config.rollout, config.train.seed
        own_domains = parse_reward_functions(config.reward.reward_functions)
        self.held_out, domains = [], frozenset[str]()
        if rollout.eval_prompt_data:
            held_out = open_prompts(rollout.eval_prompt_data, self.tokenizer, rollout, seed=0)
            check_sources(held_out.sources, own_domains)
            self.held_out, domains = held_out.each_once(rollout.eval_prompts), held_out.domains
            if len(self.held_out) < rollout.eval_prompts:
                said = "eval_prompts=%d, but eval_prompt_data has %d that may come: each is asked once"
                log.info(said, rollout.eval_prompts, len(self.held_out))
        self.prompts = open_prompts(
            rollout.prompt_data,
            self.tokenizer,
            rollout,
            seed=seed,
            excluded={prompt.asked for prompt in self.held_out},
        )
        check_sources(self.prompts.sources, own_domains)
        rewards = None
        if is_reward_rank(session):
            # before the model, so that verifiers load their libraries meanwhile
            pool = RewardPool.open(config.reward, self.prompts.domains | domains, speaks=session.is_main)
            rewards = stack.enter_context(pool)
        self.sampling = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_response_length=rollout.max_response_length,
            stop_ids=self.tokenizer.stop_ids,
            seed=seed,
            record_routes=config.objective.routing_replay == "R3",
        )
        self.planner = MinibatchPlanner(config, session)
        self.objective = PolicyObjective(
            config=config.objective,
            facts=StepFacts(
                token_budget=self.planner.token_budget,
                dp_size=session.topology.dp_size,
                max_response_length=rollout.max_response_length,
            ),
            temperature=rollout.temperature,
        )
        self.alarms = Alarms(session, config.objective.mismatch_alarm)
        self.carried: list[CarryOver] = []
        self.tokens_left: int | None = None
        """What the last step's ledger left for this one; None in a run's first step."""
        self.resumed: dict[str, Any] | None = None
        self.open_engine()
        self.critic = Critic(config, session, self.engine) if config.objective.critic else None
        self.critic_checkpointer = self._open_critic(self.critic) if self.critic else None
        self.rollout = InProcessEngine(self.engine, slots=rollout.rollout_slots)
        stack.callback(self.rollout.close)
        self.rollout.load_weights(self.step)
        self.answer = RolloutSampler(session, engine=self.rollout, rewards=rewards, tokenizer=self.tokenizer)
        self.collector = Collector(
            rollout, session, prompts=self.prompts, answer=self.answer, sampling=self.sampling
        )
        if self.resumed is not None:
            with self.foreign_state():
                self._restore_rollouts(self.resumed)
        every = config.logging.log_interval
        folder = self.run_dir() if session.is_writer else None
        self.samples = ResponseLog(folder, resume_step=self.step, every=every)

    def train_step(self, metrics: MetricsLogger) -> None:
        """Prompts, responses and rewards; the budget and its grid; old and reference log p; the updates."""
        begun = time.perf_counter()
        with metrics.phase("rollout"):
            collected = self._collect()
        with metrics.phase("budget"):
            rollouts = self._with_advantages(collected.rollouts)
            before = self._carried_tokens()
            plan = self.planner.plan(rollouts, self.carried, step=self.step)
            self.carried = plan.carried
        with metrics.phase("score"):
            grids = [self._score(grid) for grid in plan.grids]
        with metrics.phase("update"):
            lr = learning_rate(self.step, self.config.train)
            updates = [self._update(grid, lr) for grid in grids]
            value_reports = self._update_critic(plan.grids, updates)
        ledger = self._account(collected, rollouts, plan, updates, before)
        self.step += 1
        with metrics.phase("publish"):
            self.rollout.load_weights(self.step)
        reports = [update.report for update in updates]
        values = self._values(collected, plan, reports, ledger) | value_metrics(value_reports) | {"lr": lr}
        metrics.log(self.step, values, tokens=ledger.generated, seconds=time.perf_counter() - begun)
        self.alarms.check(self.step, values, collected.rollouts)
        if self.samples.is_due(self.step):
            self.samples.write(self.step, response_rows(collected.rollouts, self.tokenizer))

    def _collect(self) -> StepRollouts:
        """Judged groups; more prompts are drawn where tokens are missing and refilling is asked for."""
        rollout = self.config.rollout
        collected = self.collector.collect(self.step)
        if self.config.budget.budget_shortfall != "refill":
            return collected
        while collected.rounds < rollout.dynamic_sampling_max_rounds:
            there = self._trainable_tokens(collected)
            missing = self.planner.tokens_wanted - there
            if missing <= 0:
                break
            count = math.ceil(missing / max(there, 1) * max(collected.prompts_drawn, 1))
            # no more than a step's at once: what is there may be a poor sample of what comes
            self.collector.refill(collected, min(count, rollout.prompts_per_step))
        return collected

    def _trainable_tokens(self, collected: StepRollouts) -> int:
        """Response tokens of the job that may fill the budget. Collective over the data-parallel group."""
        objective, rollouts = self.config.objective, collected.rollouts
        if self.config.budget.zero_advantage == "aside":
            # group-relative advantages, which need no critic
            rollouts = [r for r in self._with_advantages(rollouts) if np.any(r.advantages_R)]
        own = sum(r.response.length for r in rollouts if not is_masked(r, objective))
        group, device = self.session.topology.groups.dp, self.session.device
        return sum(gather_json(own + self._carried_tokens(), group, device))

    def _carried_tokens(self) -> int:
        """This rank's response tokens that the last step's budget left."""
        return sum(c.rollout.response.length - c.start for c in self.carried)

    def _with_advantages(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Those that may be trained on, each with its advantages. Collective over the world with a critic."""
        objective = self.config.objective
        values = self.critic.values(rollouts) if self.critic else None
        judged = assign(rollouts, objective, self.config.rollout.max_response_length, values)
        if not objective.whiten_advantages:
            return judged
        everyone = gather_json(moments(judged), self.session.topology.groups.dp, self.session.device)
        return whiten(judged, [row for of_rank in everyone for row in of_rank])

    def _score(self, grid: list[RLMicrobatch]) -> list[RLMicrobatch]:
        """The minibatch with log p under the policy before this step and under the reference, and routes."""
        objective, temperature = self.config.objective, self.config.rollout.temperature
        if objective.routing_replay == "R2":
            scores, routes = self.engine.score_with_routes(grid, temperature)
            grid = with_routes(grid, routes)
        elif objective.old_logprobs == "recompute":
            scores = self.engine.score(grid, temperature)
        else:
            scores = []
        if objective.old_logprobs == "recompute":
            grid = with_column(grid, "old_logp_T", [logp_T for logp_T, _ in scores])
        if self.reference is not None:
            grid = with_column(grid, "ref_logp_T", self.reference.score(grid, temperature))
        return grid

    def _update(self, grid: list[RLMicrobatch], lr: float) -> Update:
        report = self.engine.accumulate(grid, self.objective)
        # without a token momentum alone would move the weights
        made = not self.refuses(report) and report.means["tokens"] > 0
        if made:
            self.engine.update(report, lr)
        else:
            self.engine.discard()
        return Update(report, made)

    def _update_critic(
        self, grids: Sequence[list[RLMicrobatch]], updates: Sequence[Update]
    ) -> list[StepReport]:
        """One update per minibatch that the policy was updated on."""
        if self.critic is None:
            return []
        pairs = zip(grids, updates, strict=True)
        reports = [self.critic.step(grid) for grid, update in pairs if update.made]
        if not all(report.finite for report in reports):
            log.warning("step %d: the critic's loss is not finite: its update refused", self.step + 1)
        return reports

    def _account(
        self,
        collected: StepRollouts,
        offered: Sequence[Rollout],
        plan: Plan,
        updates: Sequence[Update],
        before: int,
    ) -> Ledger:
        """The step's ledger, checked. ``before``: this rank's carried tokens at its start."""
        masked = collected.num_tokens - sum(rollout.response.length for rollout in offered)
        ledger = account(collected, plan, updates, carried=before, masked=masked, session=self.session)
        ledger.check(self.step + 1, self.tokens_left)
        self.tokens_left = ledger.carried
        return ledger

    def _values(
        self, collected: StepRollouts, plan: Plan, reports: Sequence[StepReport], ledger: Ledger
    ) -> dict[str, float]:
        """What is logged of a step. Collective over the data-parallel group."""
        own = rollout_sums(collected.rollouts) | {
            "uninformative_groups": float(collected.uninformative_groups),
            "stale_responses": float(collected.stale_responses),
        }
        sums = add_up(own, self.session.topology.groups.dp, self.session.device)
        found = rollout_metrics(sums) | objective_metrics(reports) | router_metrics(reports)
        found |= plan.metrics | ledger.metrics() | {"loss_tokens": float(ledger.trained)}
        if budget := self.planner.token_budget:
            found["c3po/utilisation"] = ledger.trained / (budget * len(reports))
        for name in ("uninformative_groups", "stale_responses"):
            found[name] = sums[name]
        return found | {
            "generated_tokens": float(ledger.generated),
            "rollout_rounds": float(collected.rounds),
        }

    def _validate(self, metrics: MetricsLogger) -> None:
        if self.held_out:
            super()._validate(metrics)

    def validate(self) -> dict[str, float]:
        """Mean reward and accuracy on held-out problems, sampled as in training. Collective over the world."""
        samples = self.config.rollout.eval_samples
        return evaluate(self.held_out, self.answer, self.sampling, self.session, samples=samples)

    def at_start_weights(self) -> None:
        """The reference is what the run starts from, so that a resumed run has the same."""
        self.reference = ReferencePolicy(self.engine) if self.config.objective.kl_loss_coef > 0 else None
        self.began_from: Any = origin_of(self.checkpointer.began_from, self.config.train.seed)

    def _open_critic(self, critic: Critic) -> Checkpointer:
        """The critic's own checkpoints; on a resume, the one of the policy's step.

        Raises:
            CheckpointError: there is none: a critic that begins anew would judge a policy that does not.
        """
        checkpointer = Checkpointer(critic.config, critic.engine, self.session, stage=CRITIC)
        if self.resumed is not None:
            policy = Path(self.checkpointer.loaded_folder or "")
            folder = critic_of(policy, self.step) or folder_of(policy.parent / CRITIC, self.step)
            if not (folder / TRAINER_STATE).exists():
                raise CheckpointError(
                    f"{folder}: holds no critic for the policy of step {self.step}; drop --critic, or start from the "
                    "policy's weights with --pretrained-checkpoint and another --save"
                )
            checkpointer.load(folder)
        return checkpointer

    def save_checkpoint(self) -> None:
        # the policy's pointer moves last: a step that it names has its critic
        if self.critic_checkpointer is not None:
            self.critic_checkpointer.save(self.step, {"step": self.step})
            self.critic_checkpointer.finish()
        super().save_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """Collective over the data-parallel group: one list entry per rank for what ranks hold by themselves."""
        group, device = self.session.topology.groups.dp, self.session.device
        return {
            "step": self.step,
            "began_from": self.began_from,
            "prompts": self.prompts.state_dict(),
            "open": gather_json(self.collector.state_dict(), group, device),
            "carried": gather_json([[c.start, c.steps] for c in self.carried], group, device),
            "tokens_left": self.tokens_left,
        }

    def attachments(self) -> dict[str, bytes]:
        if not is_reward_rank(self.session):
            return {}
        files = {
            **self.collector.state_bytes(),
            "carried": rollouts_to_bytes([c.rollout for c in self.carried]),
        }
        return {_file(name, self.session.topology.dp_rank): data for name, data in files.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.reference is not None:
            must_be_same(state.get("began_from"), self.began_from, self.checkpointer.loaded_folder)
        self.began_from = state.get("began_from")
        self.step = state["step"]
        self.prompts.load_state_dict(state["prompts"])
        self.tokens_left = count_in(state, "tokens_left")
        self.resumed = state

    def _restore_rollouts(self, state: dict[str, Any]) -> None:
        """Take this rank's share of the open groups and carried responses that all ranks had."""
        folder, topology = self.checkpointer.loaded_folder, self.session.topology
        assert folder is not None
        ranks = range(len(state["open"]))

        def read(name: str, rank: int) -> bytes:
            return read_attachment(folder, _file(name, rank))

        files = [{name: read(name, rank) for name in ("finished", "unfinished")} for rank in ranks]
        self.collector.restore(state["open"], files)
        self.carried = [
            CarryOver(rollout, start, steps)
            for rank in ranks
            for rollout, (start, steps) in zip(
                rollouts_from_bytes(read("carried", rank)), state["carried"][rank], strict=True
            )
            if rollout.prompt.uid % topology.dp_size == topology.dp_rank
        ]
        must_fit(self.config, self.collector.book, self.carried)
        begun = [group.prompt for group in self.collector.book.open.values()]
        say_held_out([*begun, *(c.rollout.prompt for c in self.carried)], self.held_out)


def _file(name: str, dp_rank: int) -> str:
    return f"rollouts-{name}-{dp_rank}.safetensors"

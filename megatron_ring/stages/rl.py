"""Reinforcement learning with C3PO (Ring-lite, arXiv 2506.14731, 3.2): the page to read for a step.

A step draws prompts, samples groups of responses, verifies them while others are sampled, assigns advantages,
fills the token budget, packs it into microbatches, scores them under the old and the reference policy, updates
once per minibatch, and publishes the weights to the rollout engine. ``train_iters`` counts such steps. A ledger
then accounts for every token.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from megatron_ring.checkpoint.checkpointer import Checkpointer
from megatron_ring.checkpoint.folder import CRITIC
from megatron_ring.checkpoint.format import read_attachment
from megatron_ring.checkpoint.origin import critic_folder, must_be_same, origin_of
from megatron_ring.config.run import RunConfig
from megatron_ring.data.prompts.stream import Prompt, PromptStream, open_prompts
from megatron_ring.errors import RolloutError
from megatron_ring.observe.metrics import MetricsLogger
from megatron_ring.observe.responses import ResponseLog
from megatron_ring.rl.alarms import Alarms, say_held_out
from megatron_ring.rl.batch.microbatch import RLMicrobatch, with_column, with_routes
from megatron_ring.rl.batch.planner import MinibatchPlanner, Plan
from megatron_ring.rl.collect.collector import Collector, StepRollouts
from megatron_ring.rl.collect.sampler import RolloutSampler, is_reward_rank
from megatron_ring.rl.collect.state import RolloutState
from megatron_ring.rl.evaluation import evaluate
from megatron_ring.rl.learn.advantage import assign, estimator_of, is_masked, moments, whiten
from megatron_ring.rl.learn.critic import Critic
from megatron_ring.rl.learn.objective import PolicyObjective, loss_tokens, mean_mismatch
from megatron_ring.rl.learn.objective import metrics as objective_metrics
from megatron_ring.rl.learn.objective.policy_losses import StepFacts
from megatron_ring.rl.learn.reference_policy import ReferencePolicy
from megatron_ring.rl.ledger import Ledger, Update, account
from megatron_ring.rl.reward.references import check_sources
from megatron_ring.rl.reward.registry import parse_reward_functions
from megatron_ring.rl.reward.workers.pool import RewardPool
from megatron_ring.rl.rollout.engines import logprob_settings, open_rollout_engine
from megatron_ring.rl.rollout.protocol import SamplingParams
from megatron_ring.rl.rollout_metrics import (
    add_up,
    response_rows,
    rollout_metrics,
    rollout_sums,
    router_metrics,
    status_shares,
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
    with open_stage(config) as session:
        RlRun(config, session).run()


class RlRun(StageRun):
    """The parts of one RL run and its step."""

    stage: ClassVar[str] = "rl"
    shown: ClassVar[tuple[str, ...]] = ("reward", "response_length", "entropy", "grad_norm")
    validates_at_start: ClassVar[bool] = True

    def __init__(self, config: RunConfig, session: Session):
        super().__init__(replace(config, model=config.model.with_still_bias()), session)

    def build(self, resources: ExitStack) -> None:
        config, session, rollout = self.config, self.session, self.config.rollout
        assert self.tokenizer is not None
        tokenizer = self.tokenizer
        # an estimator that cannot be imported ends the run before anything is built
        estimator_of(config.objective)
        prompts, self.held_out, rewards = self._open_problems(resources)
        self.rollouts = RolloutState(prompts, rollout.group_size)
        self.planner = MinibatchPlanner.of(config, session)
        self.objective = PolicyObjective(
            config=config.objective,
            facts=StepFacts(
                token_budget=self.planner.token_budget,
                dp_size=session.topology.dp_size,
                max_response_length=rollout.max_response_length,
            ),
            temperature=rollout.temperature,
        )
        super().build(resources)
        self.reference: ReferencePolicy | None = None
        self.began_from: Any = None
        self.critic = Critic(config, session) if config.objective.critic else None
        if self.critic is not None:
            self.critic_checkpointer = Checkpointer(
                self.critic.config, self.critic.engine, session, stage=CRITIC
            )
        self.rollout_engine = open_rollout_engine(config, self.engine)
        resources.push(self._close_rollout_engine)
        self.sampling = SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_response_length=rollout.max_response_length,
            stop_ids=tokenizer.stop_ids,
            seed=config.train.seed,
            record_routes=config.objective.routing_replay == "R3",
        )
        self.sampler = RolloutSampler(
            session, engine=self.rollout_engine, rewards=rewards, tokenizer=tokenizer
        )
        self.collector = Collector(
            rollout, session, state=self.rollouts, sampler=self.sampler, sampling=self.sampling
        )
        self.alarms = Alarms(session, config.objective.mismatch_alarm)
        folder = self.run_dir() if session.is_log_rank else None
        self.responses = ResponseLog(folder, every=config.logging.log_interval)

    def _close_rollout_engine(self, _kind: object, failure: BaseException | None, _trace: object) -> None:
        """If the run has failed already, an error of a user's ``close`` must not be taken for the cause."""
        try:
            self.rollout_engine.close()
        except RolloutError as error:
            if failure is None:
                raise
            log.warning("%s", error)

    def _open_problems(self, resources: ExitStack) -> tuple[PromptStream, list[Prompt], RewardPool | None]:
        """The stream of problems, the held-out problems and, on reward ranks, the verifiers."""
        rollout, tokenizer = self.config.rollout, self.tokenizer
        assert tokenizer is not None
        own_domains = parse_reward_functions(self.config.reward.reward_functions)
        held_out: list[Prompt] = []
        domains = frozenset[str]()
        if rollout.eval_prompt_data:
            stream = open_prompts(rollout.eval_prompt_data, tokenizer, rollout, seed=0)
            check_sources(stream.sources, own_domains)
            held_out, domains = stream.each_once(rollout.eval_prompts), stream.domains
            if len(held_out) < rollout.eval_prompts:
                log.info(
                    "eval_prompts=%d, but eval_prompt_data has only %d that can be used: each is used once",
                    rollout.eval_prompts,
                    len(held_out),
                )
        prompts = open_prompts(
            rollout.prompt_data,
            tokenizer,
            rollout,
            seed=self.config.train.seed,
            excluded={prompt.asked for prompt in held_out},
        )
        check_sources(prompts.sources, own_domains)
        if prompts.num_outside_solve_rates:
            log.info(
                "%d problems are left out: their solve rates are outside %g to %g",
                prompts.num_outside_solve_rates,
                rollout.solve_rate_min,
                rollout.solve_rate_max,
            )
        if not is_reward_rank(self.session):
            return prompts, held_out, None
        # before the model, so that verifiers load their libraries meanwhile
        pool = RewardPool.open(self.config.reward, prompts.domains | domains, warns=self.session.is_save_rank)
        return prompts, held_out, resources.enter_context(pool)

    def on_initial_weights(self) -> None:
        """The reference and the critic's layers are copies of the run's initial weights, also in a resumed
        run."""
        self.began_from = origin_of(self.checkpointer.began_from, self.config.train.seed)
        if self.config.objective.kl_loss_coef > 0:
            self.reference = ReferencePolicy(self.engine)
        if self.critic is not None:
            self.critic.start_from(self.engine)

    def restore(self) -> None:
        super().restore()
        self.rollout_engine.publish(self.step)
        self.responses.resume(self.step)

    def train_step(self, metrics: MetricsLogger) -> None:
        """Prompts, responses and rewards; the budget and its grid; old and reference log p; the updates."""
        begun = time.perf_counter()
        with metrics.phase("rollout"):
            collected = self._collect()
        with metrics.phase("budget"):
            rollouts = self._with_advantages(collected.rollouts)
            carried_before = self.rollouts.carried_tokens
            plan = self.planner.plan(rollouts, self.rollouts.carried, step=self.step)
            self.rollouts.carried = plan.carried
        with metrics.phase("score"):
            grids = [self._score(grid) for grid in plan.grids]
        with metrics.phase("update"):
            lr = learning_rate(self.step, self.config.train)
            updates = [self._update(grid, lr) for grid in grids]
            value_reports = self._update_critic(plan.grids, updates)
        ledger = self._account(collected, rollouts, plan, updates, carried_before)
        self.step += 1
        with metrics.phase("publish"):
            self.rollout_engine.publish(self.step)
        reports = [update.report for update in updates]
        sums = self._sums(collected)
        values = self._values(sums, collected, plan, reports, ledger)
        values |= value_metrics(value_reports) | {"lr": lr}
        metrics.log(self.step, values, tokens=ledger.generated, seconds=time.perf_counter() - begun)
        self.alarms.check(
            self.step,
            mismatch=mean_mismatch(reports),
            shortfall=plan.shortfall,
            status_shares=status_shares(sums),
            rollouts=collected.rollouts,
        )
        if self.responses.is_due(self.step):
            self.responses.write(self.step, response_rows(collected.rollouts, self.sampler.tokenizer))

    def _collect(self) -> StepRollouts:
        """The step's groups; with budget_shortfall=refill, more prompts are drawn while tokens are missing."""
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
            # at most one step's prompts at once: the tokens so far may be a poor estimate of what more prompts
            # give
            self.collector.refill(collected, min(count, rollout.prompts_per_step))
        return collected

    def _trainable_tokens(self, collected: StepRollouts) -> int:
        """Response tokens of the job that may fill the budget. Collective over the data-parallel group."""
        objective, rollouts = self.config.objective, collected.rollouts
        if self.config.budget.zero_advantage == "exclude":
            # group-relative advantages, which need no critic
            rollouts = [r for r in self._with_advantages(rollouts) if np.any(r.advantages_R)]
        own = sum(r.response.length for r in rollouts if not is_masked(r, objective))
        own += self.rollouts.carried_tokens
        (total,) = self.session.summed(own, group=self.session.topology.groups.dp)
        return int(total)

    def _with_advantages(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts that may be trained on, each with its advantages. Collective over the world with a
        critic."""
        objective = self.config.objective
        values = self.critic.values(rollouts) if self.critic else None
        assigned = assign(rollouts, objective, self.config.rollout.max_response_length, values)
        if not objective.whiten_advantages:
            return assigned
        everyone = gather_json(moments(assigned), self.session.topology.groups.dp, self.session.device)
        return whiten(assigned, [row for of_rank in everyone for row in of_rank])

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
        # in an update without tokens momentum alone would move the weights
        made = not self.skip_non_finite(report) and loss_tokens(report) > 0
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
            log.warning("step %d: the critic's loss is not finite: its update skipped", self.step + 1)
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
        ledger.check(self.step + 1, self.rollouts.tokens_left)
        self.rollouts.tokens_left = ledger.carried
        return ledger

    def _sums(self, collected: StepRollouts) -> dict[str, float]:
        """The step's sums over its responses. Collective over the data-parallel group."""
        own = rollout_sums(collected.rollouts) | {
            "uninformative_groups": float(collected.uninformative_groups),
            "stale_responses": float(collected.stale_responses),
        }
        return add_up(own, self.session.topology.groups.dp, self.session.device)

    def _values(
        self,
        sums: dict[str, float],
        collected: StepRollouts,
        plan: Plan,
        reports: Sequence[StepReport],
        ledger: Ledger,
    ) -> dict[str, float]:
        """What is logged of a step."""
        found = rollout_metrics(sums) | objective_metrics(reports) | router_metrics(reports)
        found |= plan.metrics | ledger.metrics() | {"loss_tokens": float(ledger.trained)}
        if budget := self.planner.token_budget:
            found["c3po/utilisation"] = ledger.trained / (budget * len(reports))
        return found | {
            "uninformative_groups": sums["uninformative_groups"],
            "stale_responses": sums["stale_responses"],
            "generated_tokens": float(ledger.generated),
            "rollout_rounds": float(collected.rounds),
        }

    def _validate(self, metrics: MetricsLogger) -> None:
        if self.held_out:
            super()._validate(metrics)

    def validate(self) -> dict[str, float]:
        """Mean reward and accuracy on held-out problems, sampled as in training. Collective over the world."""
        samples = self.config.rollout.eval_samples
        return evaluate(self.held_out, self.sampler, self.sampling, self.session, samples=samples)

    def save_checkpoint(self) -> None:
        # the policy's pointer moves last, so that every step it names has its critic
        if self.critic is not None:
            self.critic_checkpointer.save(self.step, {"step": self.step})
            self.critic_checkpointer.finish()
        super().save_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "began_from": self.began_from,
            "rollouts": self.rollouts.state_dict(self.session.topology.dp_size),
        }

    def attachments(self) -> dict[str, bytes]:
        if not is_reward_rank(self.session):
            return {}
        return self.rollouts.files(self.session.topology.dp_rank)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        folder = self.checkpointer.loaded_folder
        assert folder is not None
        if self.reference is not None:
            must_be_same(state.get("began_from"), self.began_from, folder)
        self.began_from = state.get("began_from")
        self.step = state["step"]
        self.rollouts.load_state_dict(
            state["rollouts"], partial(read_attachment, folder), self.session.topology
        )
        self.rollouts.require_fit(
            self.config.budget.microbatch_capacity, self.config.rollout.max_response_length
        )
        for setting in logprob_settings(self.config.objective):
            self.rollouts.require_logprobs(setting)
        say_held_out(self.rollouts.waiting_prompts(), self.held_out)
        if self.critic is not None:
            self.critic_checkpointer.load(critic_folder(folder, self.step))

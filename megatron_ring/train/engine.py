"""One optimizer step over Megatron's schedules: forward, backward, one reduction, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.build import Logits, RingModel
from megatron_ring.model.packed import RouterStepInfo
from megatron_ring.runtime.session import Session
from megatron_ring.train.inference import InferenceEngine
from megatron_ring.train.objective import LossTerms, Objective
from megatron_ring.train.optimizer import (
    build_optimizer,
    clip_and_step,
    set_learning_rate,
    wrap_data_parallel,
)
from megatron_ring.train.replay import ReplayReport, replay_report, routes_of


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step saw, equal on every rank.

    ``loss`` is the objective over its ``denominator``; ``balance_loss`` (1.0 when balanced), ``z_loss`` and
    ``max_violation`` (busiest expert over the mean, minus 1) are means over layers; ``valid`` are the tokens, prompts
    included, that those count; ``grad_norm`` is before clipping; ``peaks`` are maxima over the step; ``replay`` is
    there when routes were replayed.

    Example: ``StepReport(loss=6.21, means={"lm_loss": 6.21}, grad_norm=0.8, denominator=8192.0, ...)``
    """

    loss: float
    means: dict[str, float]
    denominator: float
    valid: float
    grad_norm: float
    balance_loss: float
    z_loss: float
    max_violation: float
    peaks: dict[str, float] = field(default_factory=dict)
    replay: ReplayReport | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class _Accumulated(NamedTuple):
    """What one backward pass has left for the update."""

    report: StepReport
    router_loads: list[tuple[Tensor, Tensor]]
    """Per router of this rank: tokens of each expert [E] and logit moments [3], of the whole step."""


class Engine(InferenceEngine):
    """Model chunks, their gradients and their optimizer on one rank."""

    chunks: list[DistributedDataParallel]

    def __init__(self, config: RunConfig, session: Session, kind: type[RingModel] = RingModel):
        super().__init__(config, session, kind)
        self.optimizer = build_optimizer(self.chunks, config.train, config.parallel, session.topology)
        self._accumulated: _Accumulated | None = None
        self._configure_schedule()

    def _prepare(self, models: list[RingModel]) -> list[DistributedDataParallel]:
        return wrap_data_parallel(models, self.config.parallel, self.topology)

    def _configure_schedule(self) -> None:
        megatron_config: Any = self.models[0].config
        megatron_config.finalize_model_grads_func = finalize_model_grads
        if self.config.parallel.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            if len(self.chunks) > 1:
                megatron_config.grad_sync_func = [chunk.start_grad_sync for chunk in self.chunks]
        if self.config.parallel.overlap_param_gather and len(self.chunks) > 1:
            megatron_config.param_sync_func = [chunk.start_param_sync for chunk in self.chunks]

    def step(
        self, microbatches: Sequence[Microbatch], objective: Objective, lr: float, warmup: float = 1.0
    ) -> StepReport:
        """One optimizer step; leaves the weights alone when loss or gradient is not finite."""
        report = self.accumulate(microbatches, objective, warmup)
        if report.finite:
            self.update(report, lr)
        else:
            self.discard()
        return report

    def accumulate(
        self, microbatches: Sequence[Microbatch], objective: Objective, warmup: float = 1.0
    ) -> StepReport:
        """Forward and backward of one step and its reduction. Collective over the world; no update yet.

        Args:
            microbatches: this data-parallel rank's microbatches; as many on every rank.
            objective: what to minimise.
            warmup: share of the true logits in stochastic routing warm-up.
        """
        self.discard()
        for chunk in self.chunks:
            chunk.train()
        denominator, valid = self.session.summed(
            objective.local_denominator(microbatches),
            sum(m.num_valid for m in microbatches),
            group=self.topology.groups.dp,
        )
        dp_size = self.topology.dp_size
        signal = RouterStepInfo(loss_scale=dp_size / max(valid, 1.0), warmup=warmup)
        # the schedule divides by the number of microbatches and DDP averages over data-parallel ranks
        scale = len(microbatches) * dp_size / max(denominator, 1e-20)
        terms = self._run(microbatches, partial(_training_loss, objective, scale), signal, forward_only=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        router_sums, router_loads = self._router_sums()
        report = self._report(terms, router_sums, objective, denominator, valid, grad_norm)
        if any(routes_of(microbatch) is not None for microbatch in microbatches):
            report = replace(
                report, replay=replay_report(self.routers, self.config.model, self.session.device)
            )
        self._accumulated = _Accumulated(report, router_loads)
        return report

    def update(self, report: StepReport, lr: float) -> None:
        """Clip and apply the gradients that ``report`` came with; then move expert biases and routing statistics."""
        accumulated = self._accumulated
        assert accumulated is not None and accumulated.report is report, "no gradients of this report"
        set_learning_rate(self.optimizer, lr)
        clip_and_step(self.optimizer, report.grad_norm)
        for router, (load_E, moments) in zip(self.routers, accumulated.router_loads, strict=True):
            router.update_after_step(load_E, moments)
        self.discard()

    def discard(self) -> None:
        """Forget the accumulated gradients and routing statistics."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in self.routers:
            router.clear_statistics()
        self._accumulated = None

    def gather_parameters(self) -> None:
        """Finish the parameter all-gather that ``overlap_param_gather`` leaves to the next forward pass.

        Collective over data-parallel ranks; whoever reads weights outside a forward pass calls it first.
        """
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def on_weights_changed(self) -> None:
        """Take the models' weights for the optimizer's main parameters."""
        self.optimizer.reload_model_params()

    def _report(
        self,
        terms: list[LossTerms],
        router_sums: list[Tensor],
        objective: Objective,
        denominator: float,
        valid: float,
        grad_norm: float,
    ) -> StepReport:
        values = self._world_sums(terms, objective, router_sums)
        count = 1 + len(objective.sum_names)
        balance, z, violation, layers = values[count:]
        layers = max(layers, 1.0)
        norm = max(denominator, 1e-20)
        return StepReport(
            loss=values[0] / norm,
            means={
                name: value / norm for name, value in zip(objective.sum_names, values[1:count], strict=True)
            },
            denominator=denominator,
            valid=valid,
            grad_norm=grad_norm,
            peaks=self._peaks(terms, objective),
            balance_loss=balance / layers / max(valid, 1.0),
            z_loss=z / layers / max(valid, 1.0),
            max_violation=violation / layers,
        )

    def _peaks(self, terms: list[LossTerms], objective: Objective) -> dict[str, float]:
        """The largest of each of the objective's peaks over the world, not below 0."""
        if not objective.peak_names:
            return {}
        peaks = torch.zeros(len(objective.peak_names), dtype=torch.float64, device=self.session.device)
        for term in terms:
            own = torch.stack([term.peaks[name].detach().double() for name in objective.peak_names])
            peaks = torch.maximum(peaks, own)
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        return dict(zip(objective.peak_names, peaks.tolist(), strict=True))

    def _router_sums(self) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Balance, z-loss, load violation and layer count of this rank, so that a sum over the world gives the step's;
        and what :class:`_Accumulated` keeps of each router.

        Communicates over the ranks of one pipeline stage (loads and logit moments of its layers).
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.session.device)
        if not self.routers:
            return [zero] * 4, []
        stacked = torch.stack([torch.cat((r.load_E, r.logit_moments)) for r in self.routers])
        torch.distributed.all_reduce(stacked, group=self.topology.groups.tp_dp_cp)
        router_loads = [(row[:-3], row[-3:]) for row in stacked]
        once = float(self.topology.tp_rank == 0 and self.topology.dp_rank == 0)
        loads_LE = stacked[:, :-3]
        violation = (loads_LE.max(1).values / loads_LE.mean(1).clamp(min=1e-20) - 1).sum() * once
        layers = zero + len(self.routers) * once
        return [
            torch.stack([r.balance_sum for r in self.routers]).sum(),
            torch.stack([r.z_sum for r in self.routers]).sum(),
            violation,
            layers,
        ], router_loads


def _training_loss(objective: Objective, scale: float, microbatch: Microbatch, logits: Logits):
    """What Megatron's schedule wants: scaled loss, a token count of 1 (ours is the only divisor), and the
    terms.
    """
    terms = objective(logits, microbatch)
    return terms.loss_sum * scale, torch.ones((), dtype=torch.int, device=terms.loss_sum.device), terms

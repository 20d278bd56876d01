"""One optimizer step over Megatron's schedules: forward, backward, one reduction, clip, update.

The engine has never heard of rewards or of files: it is given microbatches and an objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.build import Logits, RingModel, build_model
from megatron_ring.model.packed import RouterStepInfo, pack_inputs
from megatron_ring.runtime.session import Session
from megatron_ring.train.objective import LossTerms, Objective, logprob
from megatron_ring.train.optimizer import (
    build_optimizer,
    clip_and_step,
    set_learning_rate,
    wrap_data_parallel,
)
from megatron_ring.train.replay import ReplayReport, replay_report, routes_of, whole_routes


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step saw, equal on every rank.

    ``loss`` is the objective over its normaliser; ``balance_loss`` (1.0 when balanced), ``z_loss`` and
    ``max_violation`` (busiest expert over the mean, minus 1) are means over layers; ``valid`` are the tokens, prompts
    included, that those count; ``grad_norm`` is before clipping; ``peaks`` are maxima over the step; ``replay`` is
    there when routes were replayed.

    Example: ``StepReport(loss=6.21, means={"lm_loss": 6.21}, grad_norm=0.8, weight=8192.0, ...)``
    """

    loss: float
    means: dict[str, float]
    weight: float
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


class Engine:
    """Model chunks, their gradients and their optimizer on one rank."""

    def __init__(self, config: RunConfig, session: Session, kind: type[RingModel] = RingModel):
        self.config = config
        self.session = session
        self.topology = session.topology
        models = build_model(
            config.model, config.parallel, session.topology, session.device, config.train.seed, kind
        )
        self.chunks = wrap_data_parallel(models, config.parallel, session.topology)
        self.models = models
        self.optimizer = build_optimizer(self.chunks, config.train, config.parallel, session.topology)
        self.routers = [router for model in models for router in model.routers()]
        self._configure_schedule()

    def _configure_schedule(self) -> None:
        megatron_config = self.models[0].config
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
        weight, valid = self.session.summed(
            objective.local_denominator(microbatches),
            sum(m.num_valid for m in microbatches),
            group=self.topology.groups.dp,
        )
        dp_size = self.topology.dp_size
        signal = RouterStepInfo(loss_scale=dp_size / max(valid, 1.0), warmup=warmup)
        # the schedule divides by the number of microbatches and DDP averages over data-parallel ranks
        scale = len(microbatches) * dp_size / max(weight, 1e-20)
        terms = self._run(microbatches, partial(_training_loss, objective, scale), signal, forward_only=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        report = self._report(terms, objective, weight, valid, grad_norm)
        if any(routes_of(microbatch) is not None for microbatch in microbatches):
            report = replace(
                report, replay=replay_report(self.routers, self.config.model, self.session.device)
            )
        return report

    def update(self, report: StepReport, lr: float) -> None:
        """Clip and apply the accumulated gradients; then move expert biases and routing statistics."""
        set_learning_rate(self.optimizer, lr)
        clip_and_step(self.optimizer, report.grad_norm)
        for router, (load_E, moments) in zip(self.routers, self._loads, strict=True):
            router.update_after_step(load_E, moments)
        self.discard()

    def discard(self) -> None:
        """Forget the accumulated gradients and routing statistics."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in self.routers:
            router.clear_statistics()
        self._loads: list[tuple[Tensor, Tensor]] = []

    def gather_parameters(self) -> None:
        """Finish the parameter all-gather that ``overlap_param_gather`` leaves to the next forward pass.

        Collective over data-parallel ranks; whoever reads weights outside a forward pass calls it first.
        """
        if self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], objective: Objective) -> dict[str, float]:
        """Means of the objective's sums over every rank's microbatches, without gradients. Collective over
        the world.
        """
        (weight,) = self.session.summed(
            objective.local_denominator(microbatches), group=self.topology.groups.dp
        )
        terms = self.forward(microbatches, partial(_evaluation_loss, objective))
        sums = self._world_sums(terms, objective, [])
        return {
            name: value / max(weight, 1e-20) for name, value in zip(objective.sum_names, sums, strict=False)
        }

    def score(
        self, microbatches: Sequence[Microbatch], temperature: float = 1.0
    ) -> list[tuple[Tensor, Tensor]]:
        """log p of every label and entropy, each [T] fp32, per microbatch; empty except on the last
        pipeline stage.
        """
        return self.forward(microbatches, partial(_score, temperature))

    def score_with_routes(
        self, microbatches: Sequence[Microbatch], temperature: float = 1.0
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """What :meth:`score` says, and the experts that were visited: int16 [layers with experts, T, K] on
        the host, per microbatch, rows of other pipeline stages' layers unknown.
        """
        recorded: list[dict[int, Tensor]] = [{} for _ in microbatches]
        scores = self.forward(microbatches, partial(_score, temperature), recorded)
        routes = [
            whole_routes(rows, microbatch.num_slots, self.config, self.topology)
            for rows, microbatch in zip(recorded, microbatches, strict=True)
        ]
        return scores, routes

    @torch.no_grad()
    def forward(
        self,
        microbatches: Sequence[Microbatch],
        read: Callable[[Microbatch, Logits], tuple[Tensor, Any]],
        recorded: Sequence[dict[int, Tensor]] | None = None,
    ) -> list:
        """What ``read`` makes of each microbatch's logits on the last stage (empty elsewhere), without
        gradients.

        ``read`` returns a scalar tensor, which Megatron's schedule wants, and the result; ``recorded``, one
        per microbatch, is filled with this rank's routes. Collective over the world.
        """
        for chunk in self.chunks:
            chunk.eval()
        return self._run(microbatches, read, None, recorded, forward_only=True)

    def _run(self, microbatches, loss, signal: RouterStepInfo | None, recorded=None, *, forward_only: bool):
        device = self.session.device

        def forward_step(iterator, model):
            index, microbatch = next(iterator)
            microbatch = microbatch.to(device)
            packed = pack_inputs(
                microbatch,
                router=signal,
                routes_LTK=routes_of(microbatch),
                recorded=None if recorded is None else recorded[index],
            )
            return model(microbatch, packed), partial(loss, microbatch)

        schedule = get_forward_backward_func()
        iterators = [enumerate(microbatches) for _ in self.chunks]
        with torch.set_grad_enabled(not forward_only):
            return schedule(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(microbatches),
                seq_length=microbatches[0].num_slots,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _world_sums(self, terms: list[LossTerms], objective: Objective, extra: list[Tensor]) -> list[float]:
        """The objective's sums (known on the last stage, once per tensor group) and ``extra``, summed over
        the world.
        """
        counts = self.topology.is_last_stage and self.topology.tp_rank == 0
        names = ("loss", *objective.sum_names)
        zero = torch.zeros((), dtype=torch.float64, device=self.session.device)

        def total(name: str) -> Tensor:
            if not counts:
                return zero
            values = [t.loss_sum.detach() if name == "loss" else t.sums[name] for t in terms]
            return sum((value.double() for value in values), zero)

        sums = torch.stack([total(name) for name in names] + [value.double() for value in extra])
        torch.distributed.all_reduce(sums)
        values = sums.tolist()
        return values if extra else values[1:]

    def _report(
        self, terms: list[LossTerms], objective: Objective, weight: float, valid: float, grad_norm: float
    ) -> StepReport:
        extra = self._router_sums()
        values = self._world_sums(terms, objective, extra)
        count = 1 + len(objective.sum_names)
        balance, z, violation, layers = values[count:]
        layers = max(layers, 1.0)
        norm = max(weight, 1e-20)
        return StepReport(
            loss=values[0] / norm,
            means={
                name: value / norm for name, value in zip(objective.sum_names, values[1:count], strict=True)
            },
            weight=weight,
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

    def _router_sums(self) -> list[Tensor]:
        """Balance, z-loss, load violation and layer count of this rank, so that a sum over the world gives
        the step's.

        Communicates over the ranks of one pipeline stage (loads and logit moments of its layers).
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.session.device)
        if not self.routers:
            self._loads = []
            return [zero] * 4
        stacked = torch.stack([torch.cat((r.load_E, r.logit_moments)) for r in self.routers])
        torch.distributed.all_reduce(stacked, group=self.topology.groups.tp_dp_cp)
        self._loads = [(row[:-3], row[-3:]) for row in stacked]
        once = float(self.topology.tp_rank == 0 and self.topology.dp_rank == 0)
        loads_LE = stacked[:, :-3]
        violation = (loads_LE.max(1).values / loads_LE.mean(1).clamp(min=1e-20) - 1).sum() * once
        layers = zero + len(self.routers) * once
        return [
            torch.stack([r.balance_sum for r in self.routers]).sum(),
            torch.stack([r.z_sum for r in self.routers]).sum(),
            violation,
            layers,
        ]


def _training_loss(objective: Objective, scale: float, microbatch: Microbatch, logits: Logits):
    """What Megatron's schedule wants: scaled loss, a token count of 1 (ours is the only divisor), and the
    terms.
    """
    terms = objective(logits, microbatch)
    return terms.loss_sum * scale, torch.ones((), dtype=torch.int, device=terms.loss_sum.device), terms


def _evaluation_loss(objective: Objective, microbatch: Microbatch, logits: Logits):
    terms = objective(logits, microbatch)
    return terms.loss_sum, terms


def _score(temperature: float, microbatch: Microbatch, logits: Logits):
    logp_T, entropy_T = logprob(logits.main_TV, microbatch.labels_T, logits, temperature=temperature)
    return logp_T.sum(), (logp_T, entropy_T)

"""A model without gradients: forward passes with Megatron's schedules, for evaluation, scoring and choosing.

The engine is independent of rewards and files: its inputs are microbatches and functions that read the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.build import Logits, RingModel, build_model
from megatron_ring.model.packed import RouterStepInfo, pack_inputs
from megatron_ring.runtime.session import Session
from megatron_ring.train.objective import LossTerms, Objective, logprob
from megatron_ring.train.replay import routes_of, whole_routes


class InferenceEngine:
    """Model chunks on one rank, without gradient buffers and optimizer state.

    ``chunks`` are the modules that Megatron's schedules run; here they are the models themselves.
    """

    def __init__(self, config: RunConfig, session: Session, kind: type[RingModel] = RingModel):
        self.config = config
        self.session = session
        self.topology = session.topology
        self.models = build_model(
            config.model, config.parallel, session.topology, session.device, config.train.seed, kind
        )
        self.routers = [router for model in self.models for router in model.routers()]
        self.chunks: Sequence[torch.nn.Module] = self._prepare(self.models)

    def _prepare(self, models: list[RingModel]) -> Sequence[torch.nn.Module]:
        """The modules that the schedules run, made from the newly built models."""
        for model in models:
            model.requires_grad_(False)
        return models

    def gather_parameters(self) -> None:
        """Gather the whole weights on every data-parallel rank; call it before reading weights outside a forward pass."""

    def on_weights_changed(self) -> None:
        """Call it after writing weights from outside, such as a checkpoint's."""

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], objective: Objective) -> dict[str, float]:
        """Means of the objective's sums over all ranks' microbatches, without gradients. Collective over the world."""
        (denominator,) = self.session.summed(
            objective.local_denominator(microbatches), group=self.topology.groups.dp
        )
        terms = self.forward(microbatches, partial(_evaluation_loss, objective))
        sums = self._world_sums(terms, objective, [])
        return {
            name: value / max(denominator, 1e-20)
            for name, value in zip(objective.sum_names, sums, strict=False)
        }

    def score(
        self, microbatches: Sequence[Microbatch], temperature: float = 1.0
    ) -> list[tuple[Tensor, Tensor]]:
        """log p of every label and entropy, each [T] fp32, per microbatch; empty except on the last pipeline stage."""
        return self.forward(microbatches, partial(_score, temperature))

    def score_with_routes(
        self, microbatches: Sequence[Microbatch], temperature: float = 1.0
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """The result of :meth:`score`, and per microbatch the chosen experts: int16 [layers with experts, T, K] on the
        host; layers of other pipeline stages are unknown.
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
        read: Callable[[Any, Any], tuple[Tensor, Any]],
        recorded: Sequence[dict[int, Tensor]] | None = None,
    ) -> list:
        """The results of ``read`` for each microbatch's logits on the last stage (empty elsewhere), without gradients.

        ``read`` returns a scalar tensor, which Megatron's schedule requires, and the result. ``recorded``, one dict per
        microbatch, is filled with this rank's routes. Collective over the world.
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

        schedule: Callable[..., list[Any]] = get_forward_backward_func()
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
        """The objective's sums (counted on the last stage, once per tensor group) and ``extra``, summed over the world."""
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


def _evaluation_loss(objective: Objective, microbatch: Microbatch, logits: Logits):
    terms = objective(logits, microbatch)
    return terms.loss_sum, terms


def _score(temperature: float, microbatch: Microbatch, logits: Logits):
    logp_T, entropy_T = logprob(logits.main_TV, microbatch.labels_T, logits, temperature=temperature)
    return logp_T.sum(), (logp_T, entropy_T)

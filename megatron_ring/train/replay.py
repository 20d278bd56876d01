"""Routing replay for the engine: recorded routes of microbatches, and the rate at which routers would choose others.

Legend: L layers with experts, T token slots, t those of this tensor rank, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.router import NO_ROUTE, RingRouter
from megatron_ring.runtime.topology import Topology


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """How replayed routes differ from the routers' own choices, over valid tokens.

    Per layer with experts: replayed choices (``compared``), those of them that the router itself would not choose
    (``flipped``), and tokens without recorded routes, which the router routed (``missing``).

    Example: ``ReplayReport(flipped=(12.0, 24.0), compared=(1200.0, 1200.0), missing=(0.0, 0.0), topk=2)``.
    """

    flipped: tuple[float, ...]
    compared: tuple[float, ...]
    missing: tuple[float, ...]
    topk: int

    @property
    def flip_rates(self) -> tuple[float, ...]:
        """Share of the compared choices that were flipped, per layer."""
        return tuple(f / max(c, 1.0) for f, c in zip(self.flipped, self.compared, strict=True))

    @property
    def missing_share(self) -> float:
        """Share of (token, layer) pairs without recorded routes."""
        return sum(self.missing) / max(sum(self.compared) / self.topk + sum(self.missing), 1.0)

    def __add__(self, other: ReplayReport) -> ReplayReport:
        """The report over the tokens of both."""

        def added(one: tuple[float, ...], two: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(a + b for a, b in zip(one, two, strict=True))

        return ReplayReport(
            flipped=added(self.flipped, other.flipped),
            compared=added(self.compared, other.compared),
            missing=added(self.missing, other.missing),
            topk=self.topk,
        )


def routes_of(microbatch: Microbatch) -> Tensor | None:
    """The recorded routes of a microbatch, or None."""
    return getattr(microbatch, "routes_LTK", None)


def replay_report(routers: Sequence[RingRouter], model: ModelConfig, device: torch.device) -> ReplayReport:
    """Sum of the routers' counts. Collective over the world; ``device`` is where its collectives need tensors."""
    counts_L3 = torch.zeros(model.num_moe_layers, 3, dtype=torch.float64, device=device)
    for router in routers:
        # multi-token-prediction layers never replay: their counts are 0
        counts_L3[router.row] += router.flips
    torch.distributed.all_reduce(counts_L3)
    flipped, compared, missing = (tuple(row) for row in counts_L3.T.tolist())
    return ReplayReport(flipped=flipped, compared=compared, missing=missing, topk=model.moe_router_topk)


def whole_routes(
    recorded: dict[int, Tensor], num_slots: int, config: RunConfig, topology: Topology
) -> Tensor:
    """Routes that this rank's routers recorded for one microbatch: int16 [L, T, K] on the host.

    Communicates over the tensor-parallel group if tokens are split over it.
    """
    shape = (config.model.num_moe_layers, num_slots, config.model.moe_router_topk)
    routes_LTK = torch.full(shape, NO_ROUTE, dtype=torch.int16)
    if not recorded:
        # a pipeline stage with dense layers only
        return routes_LTK
    rows = sorted(recorded)
    whole_lTK = torch.stack([recorded[row] for row in rows]).to(torch.int16)
    if config.parallel.sequence_parallel and topology.tp_size > 1:
        # gloo does not support 16-bit integers
        own_bytes = whole_lTK.view(torch.uint8)
        parts = [torch.empty_like(own_bytes) for _ in range(topology.tp_size)]
        torch.distributed.all_gather(parts, own_bytes, group=topology.groups.tp)
        whole_lTK = torch.cat(parts, dim=1).view(torch.int16)
    routes_LTK[rows] = whole_lTK.cpu()
    return routes_LTK

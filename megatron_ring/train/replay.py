"""Routing replay seen from the engine: routes that travel with microbatches, and how far they are from own.

Legend: L layers with experts, T token slots, t those of this tensor rank, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ring.config.model import ModelConfig
from megatron_ring.config.run import RunConfig
from megatron_ring.data.microbatch import Microbatch
from megatron_ring.model.router import NO_ROUTE, RingRouter
from megatron_ring.runtime.topology import Topology


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """How replayed routes differed from what the routers would have chosen, over a step's valid tokens.

    ``flip_rates`` is, per layer with experts, the share of replayed choices that are not among the router's
    own. ``missing_share`` is the share of (token, layer) without recorded routes, which were routed anew.

    Example: ``ReplayReport(flip_rates=(0.01, 0.02), missing_share=0.0)``.
    """

    flip_rates: tuple[float, ...]
    missing_share: float


def routes_of(microbatch: Microbatch) -> Tensor | None:
    """The routes that a microbatch carries for replay; plain ones carry none."""
    return getattr(microbatch, "routes_LTK", None)


def replay_report(routers: Sequence[RingRouter], model: ModelConfig) -> ReplayReport:
    """Collective over the world."""
    counts_L3 = torch.zeros(model.num_moe_layers, 3, dtype=torch.float64, device=routers_device(routers))
    for router in routers:
        # multi-token-prediction layers never replay: theirs are 0
        counts_L3[router.row] += router.flips
    torch.distributed.all_reduce(counts_L3)
    flipped_L, compared_L, missing_L = counts_L3.unbind(1)
    known = compared_L.sum() / model.moe_router_topk
    return ReplayReport(
        flip_rates=tuple((flipped_L / compared_L.clamp(min=1.0)).tolist()),
        missing_share=float(missing_L.sum() / (known + missing_L.sum()).clamp(min=1.0)),
    )


def routers_device(routers: Sequence[RingRouter]) -> torch.device | None:
    """Where the routers' counts live; None (the default) on a stage without any."""
    return routers[0].flips.device if routers else None


def whole_routes(
    recorded: dict[int, Tensor], num_slots: int, config: RunConfig, topology: Topology
) -> Tensor:
    """int16 [L, T, K] on the host from what this rank's routers recorded of one microbatch.

    Communicates over the tensor-parallel group where tokens are split over it.
    """
    shape = (config.model.num_moe_layers, num_slots, config.model.moe_router_topk)
    routes_LTK = torch.full(shape, NO_ROUTE, dtype=torch.int16)
    if not recorded:
        # a stage of dense layers alone
        return routes_LTK
    rows = sorted(recorded)
    whole_lTK = torch.stack([recorded[row] for row in rows]).to(torch.int16)
    if config.parallel.sequence_parallel and topology.tp_size > 1:
        # gloo knows no 16-bit integers
        own_bytes = whole_lTK.view(torch.uint8)
        parts = [torch.empty_like(own_bytes) for _ in range(topology.tp_size)]
        torch.distributed.all_gather(parts, own_bytes, group=topology.groups.tp)
        whole_lTK = torch.cat(parts, dim=1).view(torch.int16)
    routes_LTK[rows] = whole_lTK.cpu()
    return routes_LTK

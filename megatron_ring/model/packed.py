"""What travels through the layers beside the hidden states: the packed batch in Megatron's ``thd`` words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.kv_cache import CacheView


@dataclass(frozen=True, kw_only=True)
class RouterStepInfo:
    """How the router takes part in this step; ``None`` in its place means scoring: no losses, no counting.

    ``loss_scale`` is dp_size / (valid tokens of the whole step): a microbatch's balance loss counts in
    proportion to its valid tokens, and DDP's averaging over data-parallel ranks is undone. ``warmup`` is a
    in the stochastic routing warm-up ``a*s + (1-a)*(mu + sigma*noise)`` (1.0 = no noise).

    Example: 2 microbatches on each of 4 ranks, 100 valid tokens each: ``RouterStepInfo(loss_scale=4 / 800)``.
    """

    loss_scale: float
    warmup: float = 1.0


@dataclass
class PackedInputs(PackedSeqParams):
    """Segments for attention, validity for the router, and, where asked, routes to replay or a cache to fill.

    ``routes_LTK`` (integer expert ids per layer with experts, token and rank) replays a recorded routing;
    rows of -1 are unknown and routed anew. ``recorded``, where given, is filled by the routers: experts [T, K]
    of this rank's tokens by layer with experts, counted from 0. ``cache`` makes the pass one of generation.
    """

    segment_lengths: tuple[int, ...] = ()
    valid_T: Tensor | None = None
    num_valid: int = 0
    router: RouterStepInfo | None = None
    routes_LTK: Tensor | None = None
    recorded: dict[int, Tensor] | None = None
    cache: CacheView | None = None


def pack_inputs(
    microbatch: Microbatch,
    *,
    router: RouterStepInfo | None = None,
    routes_LTK: Tensor | None = None,
    recorded: dict[int, Tensor] | None = None,
) -> PackedInputs:
    """The microbatch as the layers read it."""
    longest = max(microbatch.segment_lengths)
    return PackedInputs(
        qkv_format="thd",
        cu_seqlens_q=microbatch.cu_seqlens,
        cu_seqlens_kv=microbatch.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        segment_lengths=microbatch.segment_lengths,
        valid_T=microbatch.valid_T,
        num_valid=microbatch.num_valid,
        router=router,
        routes_LTK=routes_LTK,
        recorded=recorded,
    )


def rotary_table(positions_T: Tensor, kv_channels: int, rotary_percent: float, base: float) -> Tensor:
    """cos and sin of every position's angles, [2, T, R/2] in fp32, R = rotated channels (half-split form)."""
    rotated = int(kv_channels * rotary_percent)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=positions_T.device) / rotated
    angles = positions_T.float()[:, None] * base**-exponents
    return torch.stack((angles.cos(), angles.sin()))

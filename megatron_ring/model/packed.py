"""Inputs of the layers besides the hidden states: the packed batch in Megatron's ``thd`` format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_ring.data.batch.microbatch import Microbatch
from megatron_ring.model.kv_cache import CacheView


@dataclass(frozen=True, kw_only=True)
class RouterStepInfo:
    """The router's part in a training step; ``None`` instead of it means scoring, without losses and statistics.

    ``loss_scale`` is dp_size / (valid tokens of the whole step): a microbatch's balance loss is weighted by its valid
    tokens, and dp_size cancels DDP's averaging over data-parallel ranks. ``warmup`` is ``a`` in the stochastic routing
    warm-up ``a*s + (1-a)*(mu + sigma*noise)`` (1.0 = no noise).

    Example: 2 microbatches on each of 4 ranks, 100 valid tokens each: ``RouterStepInfo(loss_scale=4 / 800)``.
    """

    loss_scale: float
    warmup: float = 1.0


@dataclass
class PackedInputs(PackedSeqParams):
    """Segments for attention, valid tokens for the router, and optionally routes to replay or a KV cache.

    ``routes_LTK`` (integer expert ids for each layer with experts, token and choice) is a recorded routing to replay;
    rows of -1 are unknown, and the router routes them. ``recorded``, if given, is filled by the routers: index of the
    layer with experts, from 0 -> experts [T, K] of this rank's tokens. With ``cache`` the pass is part of generation.
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
    """The layers' inputs for a microbatch."""
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

"""Packed causal self-attention.

Legend: T tokens, H query heads, G key/value heads, C channels per head, D model width. ``hidden_T1D`` is Megatron's
[sequence, batch = 1, hidden]. Under sequence parallelism its T is this rank's share; the projections gather and
scatter it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megatron_ring.kernels import HeadNorms, decode_attention, qk_norm_rope
from megatron_ring.model.kv_cache import CacheView
from megatron_ring.model.linear import project
from megatron_ring.model.packed import PackedInputs

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


class RingSelfAttention(SelfAttention):
    """Megatron's projections, with head norms, rotary positions and packed core attention between them.

    Upstream's ``forward`` loops over segments on the host for rotary positions and contains every inference mode. This
    one gets a position per token, normalises and rotates in one kernel, and supports one cache for generation.
    """

    def forward(self, hidden_T1D: Tensor, packed: PackedInputs, rotary_2TR: Tensor) -> Tensor:
        """Attention output [T, 1, D] of one microbatch."""
        mixed_T1X = project(self.linear_qkv, hidden_T1D)
        groups, channels = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        mixed_TGMC = mixed_T1X.view(mixed_T1X.shape[0], groups, -1, channels)
        if packed.cache is not None and packed.cache.decoding:
            return self._decode(mixed_TGMC, packed.cache, rotary_2TR)
        q_THC, k_TGC, v_TGC = qk_norm_rope(mixed_TGMC, rotary_2TR, self._head_norms())
        if packed.cache is not None:
            packed.cache.write(self.layer_number, k_TGC, v_TGC)
        if self.checkpoint_core_attention and self.training:
            context = tensor_parallel.checkpoint(
                lambda *qkv: self._core(*qkv, packed), False, q_THC, k_TGC, v_TGC
            )
        else:
            context = self._core(q_THC, k_TGC, v_TGC, packed)
        output_T1D, _ = self.linear_proj(context.reshape(context.shape[0], 1, -1))
        return output_T1D

    def _head_norms(self) -> HeadNorms | None:
        if not self.config.qk_layernorm:
            return None
        return HeadNorms(self.q_layernorm.weight, self.k_layernorm.weight, self.config.layernorm_epsilon)

    def _decode(self, mixed_TGMC: Tensor, view: CacheView, rotary_2TR: Tensor) -> Tensor:
        """One new token per sequence; it attends over its slot's positions up to its own."""
        context_THC = decode_attention(
            mixed_TGMC,
            rotary_2TR,
            view.cache.keys[self.layer_number],
            view.cache.values[self.layer_number],
            view.slots_T,
            view.positions_T,
            self.config.kv_channels**-0.5,
            self._head_norms(),
        )
        return project(self.linear_proj, context_THC.view(context_THC.shape[0], 1, -1))

    def _core(self, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, packed: PackedInputs) -> Tensor:
        return self.core_attention(
            q_THC,
            k_TGC,
            v_TGC,
            None,
            attn_mask_type=AttnMaskType.padding_causal,
            attention_bias=None,
            packed_seq_params=packed,
        )


class PackedCoreAttention(nn.Module):
    """Causal attention inside each segment: variable-length flash attention on CUDA in half precision, else SDPA."""

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type: str, **_ignored: object):
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(
        self,
        q_THC: Tensor,
        k_TGC: Tensor,
        v_TGC: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedInputs,
        **_ignored: object,
    ) -> Tensor:
        """Context [T, H, C]; ``packed_seq_params`` gives the segments."""
        if q_THC.is_cuda and q_THC.dtype in _FLASH_DTYPES:
            return varlen_attention(q_THC, k_TGC, v_TGC, packed_seq_params, self.scale)
        return segment_attention(q_THC, k_TGC, v_TGC, packed_seq_params.segment_lengths, self.scale)


def segment_attention(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """One SDPA call per run of neighbouring segments of equal length."""
    repeats = q_THC.shape[1] // k_TGC.shape[1]
    if repeats > 1:
        k_TGC, v_TGC = k_TGC.repeat_interleave(repeats, dim=1), v_TGC.repeat_interleave(repeats, dim=1)
    runs: list[list[int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1][1] += 1
        else:
            runs.append([length, 1])
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), q, k, v in zip(
        runs, q_THC.split(sizes), k_TGC.split(sizes), v_TGC.split(sizes), strict=True
    ):
        q_BHLC, k_BHLC, v_BHLC = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        context = F.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, is_causal=True, scale=scale)
        outputs.append(context.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def varlen_attention(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, packed: PackedInputs, scale: float
) -> Tensor:
    """flash-attn if it is installed, else torch's variable-length kernel."""
    cu, longest = packed.cu_seqlens_q, packed.max_seqlen_q
    flash_attn = _flash_attn()
    if flash_attn is None:
        return torch_varlen()(q_THC, k_TGC, v_TGC, cu, cu, longest, longest, scale=scale)
    return flash_attn(
        q_THC,
        k_TGC,
        v_TGC,
        cu,
        cu,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        # torch's kernel reads this flag itself
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@functools.cache
def _flash_attn() -> Callable[..., Tensor] | None:
    """Cached: a failing import is retried each time, which takes a third of a millisecond."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def torch_varlen() -> Callable[..., Tensor]:
    """torch's variable-length kernel: causal, with fewer key heads than query heads."""
    from torch.nn.attention.varlen import varlen_attn

    # newer versions of torch require this argument for fewer key heads, older ones do not have it
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(varlen_attn, window_size=(-1, 0), **options)

"""``decode_attention``: from the projection of one new token per sequence to its context. No backward.

Legend: T tokens (one of each sequence), G key/value heads, R query heads that share one, M = R + 2, C channels per
head, S cache rows, L positions of the cache, H half of the rotated channels.
"""

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch
from megatron_ring.kernels.qk_norm_rope import HeadNorms


@torch.no_grad()
def decode_attention(
    mixed_TGMC: Tensor,
    rotary_2TH: Tensor,
    keys_SLGC: Tensor,
    values_SLGC: Tensor,
    rows_T: Tensor,
    positions_T: Tensor,
    scale: float,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Normalise, rotate, write key and value to the cache, attend: context [T, G * R, C] in mixed's dtype.

    ``mixed_TGMC`` contains the R queries, the key and the value of every group, in the layout of Megatron's
    ``linear_qkv``. Queries and keys are normalised (if ``norms`` are given), and their first 2 H channels are rotated by
    cos and sin ``rotary_2TH`` (fp32), channel i with i + H. Key and value are **written into** the cache at row
    ``rows[t]``, position ``positions[t]`` (int64). Then each query attends over its row's positions up to its own:
    ``softmax(scale * q k^T) v``, accumulated in fp32. Later positions of the cache are not read.

    Example, one head of one channel, no rotation, scale 1, at position 1 of a cache whose position 0 holds k = 0
    and v = 1: ``mixed = [[[[0.], [5.], [3.]]]]`` (q, k, v) gives ``[[[2.]]]`` and leaves k = 5, v = 3 at
    position 1.
    """
    kernels = dispatch.implementation(mixed_TGMC, "decode_attention")
    q_weight_C, k_weight_C, eps = norms if norms is not None else (None, None, 0.0)
    return kernels.decode_attention(
        mixed_TGMC,
        rotary_2TH,
        keys_SLGC,
        values_SLGC,
        rows_T,
        positions_T,
        scale,
        q_weight_C,
        k_weight_C,
        eps,
    )

"""``decode_attention``: one query token per sequence over that sequence's cached keys and values. No backward.

Legend: T query tokens, H query heads, G key/value heads (H / G query heads share one), C channels, S cache rows,
L positions of the cache.
"""

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch


@torch.no_grad()
def decode_attention(
    q_THC: Tensor, k_SLGC: Tensor, v_SLGC: Tensor, rows_T: Tensor, lengths_T: Tensor, scale: float
) -> Tensor:
    """``softmax(scale * q k^T) v`` of token t over the first ``lengths[t]`` positions of cache row ``rows[t]``.

    ``rows_T`` and ``lengths_T`` (>= 1) are int64; the result is [T, H, C] in q's dtype, computed in fp32.
    Positions beyond a length are not read into the result, whatever they hold (finite). Example, one head of one
    channel, scale 1::

        q = [[[0.]]], k = v = [[[[1.]], [[3.]], [[9.]]]], rows = [0], lengths = [2]   ->  [[[2.]]]
    """
    kernels = dispatch.implementation(q_THC, "decode_attention")
    return kernels.decode_attention(q_THC.contiguous(), k_SLGC, v_SLGC, rows_T, lengths_T, scale)

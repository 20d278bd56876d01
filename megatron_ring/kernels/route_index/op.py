"""``route_index``: the order that sorts the (token, k) slots by expert.

Legend: T tokens, E experts, K experts per token, N = T*K slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ring.kernels import dispatch


class RouteIndex(NamedTuple):
    """The position of each (token, k) slot after sorting the slots by expert, then token, then k.

    Example, experts_TK = [[1, 0], [2, 1]] of 2 experts (id 2: dropped)::

        offsets = [1, 3], gather = [0, 0, 1, 0], position = [[1, 0], [-1, 2]]
    """

    offsets_E: Tensor
    """int32 inclusive cumulative counts: expert i has sorted rows [offsets[i-1], offsets[i])"""
    gather_N: Tensor
    """int64 token of each sorted row; entries past offsets[-1] (dropped slots) are 0 and have no meaning"""
    position_TK: Tensor
    """int64 sorted row of each slot; -1 if dropped"""


@torch.no_grad()
def route_index(experts_TK: Tensor, num_experts: int) -> RouteIndex:
    """Stable sort of the slots by expert, without host synchronisation; ids outside [0, E) are dropped."""
    return RouteIndex(
        *dispatch.implementation(experts_TK, "route_index").route_index(experts_TK, num_experts)
    )

"""The sorted order of the slots, by a stable sort.

Legend: T tokens, E experts, K experts per token, N = T*K slots.
"""

import torch
from torch import Tensor


def route_index(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(offsets_E, gather_N, position_TK)``; see ``op.route_index``."""
    flat_N = experts_TK.reshape(-1)
    kept_N = (flat_N >= 0) & (flat_N < num_experts)
    flat_N = torch.where(kept_N, flat_N, num_experts)
    offsets_E = torch.bincount(flat_N, minlength=num_experts + 1)[:num_experts].cumsum(0).int()
    order_N = flat_N.argsort(stable=True)
    slots_N = torch.arange(flat_N.numel(), device=flat_N.device)
    position_N = torch.empty_like(slots_N).scatter_(0, order_N, slots_N).masked_fill(~kept_N, -1)
    gather_N = (order_N // max(experts_TK.shape[1], 1)).masked_fill(slots_N >= offsets_E[-1], 0)
    return offsets_E, gather_N, position_N.view(experts_TK.shape)

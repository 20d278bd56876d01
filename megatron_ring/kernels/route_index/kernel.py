"""The sorted order of the slots in Triton; the launcher has the name and signature of its reference.

Legend: T tokens, E experts, K experts per token, N = T*K slots.

No atomics and no host synchronisation, so the order is deterministic. One launch: the program of each expert reads
all ids (they stay in L2) and counts where its rows begin, without communication between programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# fused multiply-add is set explicitly because Triton's default is about to change
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# slots that a program holds at once, for many and for few slots: two binaries serve every decoding step
SLOTS, FEW_SLOTS = 4096, 512


@triton.jit(do_not_specialize=["slots"])
def route_index_kernel(
    experts_ptr, offsets_ptr, gather_ptr, position_ptr, slots, E, K: tl.constexpr, BS: tl.constexpr
):
    # program E places the dropped slots after all others
    mine = tl.program_id(0)
    lane = tl.arange(0, BS)
    begin = tl.zeros([], tl.int64)
    count = tl.zeros([], tl.int64)
    for start in range(0, slots, BS):
        i = start + lane
        expert = tl.load(experts_ptr + i, mask=i < slots, other=-1)
        expert = tl.where((expert >= 0) & (expert < E), expert, E)
        begin += tl.sum(((expert < mine) & (i < slots)).to(tl.int64), 0)
        count += tl.sum(((expert == mine) & (i < slots)).to(tl.int64), 0)
    tl.store(offsets_ptr + mine, (begin + count).to(tl.int32), mask=mine < E)
    for start in range(0, slots, BS):
        i = start + lane
        expert = tl.load(experts_ptr + i, mask=i < slots, other=-1)
        expert = tl.where((expert >= 0) & (expert < E), expert, E)
        hit = (expert == mine) & (i < slots)
        row = begin + tl.cumsum(hit.to(tl.int32), 0).to(tl.int64) - 1
        tl.store(position_ptr + i, tl.where(mine < E, row, -1), mask=hit)
        tl.store(gather_ptr + row, tl.where(mine < E, i // K, 0).to(tl.int64), mask=hit)
        begin += tl.sum(hit.to(tl.int64), 0)


def route_index(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts_TK = experts_TK.contiguous()
    slots = experts_TK.numel()
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=experts_TK.device)
    gather_N = torch.empty(slots, dtype=torch.int64, device=experts_TK.device)
    position_TK = torch.empty_like(experts_TK)
    route_index_kernel[(num_experts + 1,)](
        experts_TK,
        offsets_E,
        gather_N,
        position_TK,
        slots,
        num_experts,
        K=max(experts_TK.shape[1], 1),
        BS=SLOTS if slots > FEW_SLOTS else FEW_SLOTS,
        **OPTIONS,
    )
    return offsets_E, gather_N, position_TK

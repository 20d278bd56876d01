"""The mixture-of-experts layer: route, send rows to their experts, compute, return the results.

Legend: T tokens of this rank, N rows (a row is one token for one expert), D model width, F expert width per rank,
E experts, e experts of this rank, K experts per token.

With one rank in the expert group, rows are sorted, computed and summed locally. With more ranks, one all-to-all sends
each row to its expert's rank and another returns the result. Expert tensor parallelism needs no extra collective: a row
is sent to all ``etp`` ranks that have a slice of its expert, each returns a partial sum, and the sum over a token's rows
(``combine``) adds the slices together with the experts.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ring.config.model import ModelConfig
from megatron_ring.kernels import RouteIndex, Routing, combine, expert_mlp, permute, route_index
from megatron_ring.model.linear import swiglu_mlp
from megatron_ring.model.packed import PackedInputs
from megatron_ring.model.router import RingRouter
from megatron_ring.runtime import device


class RingExperts(MegatronModule):
    """This rank's experts: ``fc1_weight`` [e, 2, F, D] (gate, up) and ``fc2_weight`` [e, D, F].

    Both have ``allreduce = False`` at every expert-parallel size, so that Megatron keeps them in the expert optimizer at
    every layout and checkpoints can be resharded across expert parallelism.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config)
        self.pg_collection = pg_collection
        self.num_local = config.num_moe_experts // pg_collection.ep.size()
        F_local = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        D, e, dtype = config.hidden_size, self.num_local, config.params_dtype
        place = device.of_new_parameters()
        self.fc1_weight = nn.Parameter(torch.empty(e, 2, F_local, D, dtype=dtype, device=place))
        self.fc2_weight = nn.Parameter(torch.empty(e, D, F_local, dtype=dtype, device=place))
        for weight in (self.fc1_weight, self.fc2_weight):
            weight.allreduce = False
            set_tensor_model_parallel_attributes(weight, True, 2, 1)

    def forward(self, rows_ND: Tensor, offsets_e: Tensor, probs_N: Tensor) -> Tensor:
        """Weighted expert outputs of rows sorted by local expert; partial sums under expert tensor parallelism. If
        Megatron's DDP provides ``main_grad``, the backward pass adds the weight gradients directly into it.
        """
        weights = self.fc1_weight, self.fc2_weight
        main = None
        if self.training and all(weight.requires_grad and hasattr(weight, "main_grad") for weight in weights):
            main = self.fc1_weight.main_grad, self.fc2_weight.main_grad
        return expert_mlp(rows_ND, *weights, offsets_e, probs_N, main_grads=main)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Experts are sharded along the expert axis by ``ep`` and along F by ``etp``."""
        groups = self.pg_collection
        ahead = len(sharded_offsets)
        ep_cut = (ahead, groups.ep.rank(), groups.ep.size())
        etp = (groups.expt_tp.rank(), groups.expt_tp.size())

        def shard(name: str, tensor: Tensor) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                tensor,
                *sharded_offsets,
                ep_cut,
                (ahead + 2, *etp),
                replica_id=(0, 0, groups.expt_dp.rank()),
                prepend_axis_num=ahead,
            )

        weights = {"fc1_weight": self.fc1_weight, "fc2_weight": self.fc2_weight}
        return {f"{prefix}{name}": shard(name, weight) for name, weight in weights.items()}


class RingMoELayer(BaseMoELayer):
    """Router, routed experts and shared experts of one layer."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        shared_expert_linears: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        layer_number: int | None = None,
    ):
        super().__init__(config=config, layer_number=layer_number, pg_collection=pg_collection)
        self.model = model
        self.exchange_group = pg_collection.tp_ep
        self.etp_size = pg_collection.expt_tp.size()
        self.router = RingRouter(config, model, pg_collection)
        self.experts = RingExperts(config, pg_collection)
        if self.use_shared_expert:
            self.shared_experts = SharedExpertMLP(
                config, shared_expert_linears, gate=False, pg_collection=pg_collection
            )
        modules = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
        self.recompute = "moe" in modules
        # with "moe" the whole layer is recomputed, shared experts included
        self.recompute_shared_experts = "shared_experts" in modules and not self.recompute

    def forward(self, hidden_T1D: Tensor, packed: PackedInputs) -> Tensor:
        """Output [T, 1, D]: routed experts plus shared experts. Communicates over the expert and tensor groups."""
        if self.recompute and self.training:
            return tensor_parallel.checkpoint(lambda x: self._forward(x, packed), False, hidden_T1D)
        return self._forward(hidden_T1D, packed)

    def _forward(self, hidden_T1D: Tensor, packed: PackedInputs) -> Tensor:
        hidden_TD = hidden_T1D.reshape(-1, hidden_T1D.shape[-1])
        routing = self.router(hidden_TD, packed)
        local = self.exchange_group.size() == 1
        routed_TD = (
            self._compute_here(hidden_TD, routing) if local else self._compute_there(hidden_TD, routing)
        )
        output_T1D = routed_TD.view_as(hidden_T1D)
        return output_T1D + self._shared(hidden_T1D) if self.use_shared_expert else output_T1D

    def _shared(self, hidden_T1D: Tensor) -> Tensor:
        if self.recompute_shared_experts and self.training:
            return tensor_parallel.checkpoint(lambda x: swiglu_mlp(self.shared_experts, x), False, hidden_T1D)
        return swiglu_mlp(self.shared_experts, hidden_T1D)

    def _compute_here(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        index = route_index(routing.experts_TK, self.model.num_experts)
        rows_ND = permute(hidden_TD, index)
        probs_N = _in_slot_order(routing.probs_TK, index)
        return combine(self.experts(rows_ND, index.offsets_E, probs_N), index)

    def _compute_there(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """Sends rows to their experts' ranks, and results back. All-to-all over the expert (times expert tensor) group."""
        e, W = self.experts.num_local, self.exchange_group.size()
        slots_TS = self._slot_experts(routing.experts_TK)
        index = route_index(slots_TS, W * e)
        sent_We = torch.diff(index.offsets_E, prepend=index.offsets_E.new_zeros(1)).view(W, e)
        received_We = torch.empty_like(sent_We)
        torch.distributed.all_to_all_single(received_We, sent_We, group=self.exchange_group)
        # the collective takes its split sizes from the host: one wait per layer and pass
        sent, received = torch.stack((sent_We.sum(1), received_We.sum(1))).tolist()

        def send(rows_N: Tensor) -> Tensor:
            return all_to_all(self.exchange_group, rows_N[: sum(sent)].contiguous(), received, sent)

        probs_TS = routing.probs_TK.repeat_interleave(self.etp_size, dim=1)
        rows_RD = send(permute(hidden_TD, index))
        probs_R = send(_in_slot_order(probs_TS, index))
        expert_R1 = (
            torch.arange(e, device=rows_RD.device)
            .repeat(W)
            .repeat_interleave(received_We.flatten().long(), output_size=sum(received))[:, None]
        )
        by_expert = route_index(expert_R1, e)
        output_RD = self.experts(
            permute(rows_RD, by_expert), by_expert.offsets_E, _in_slot_order(probs_R[:, None], by_expert)
        )
        back_ND = all_to_all(self.exchange_group, combine(output_RD, by_expert), sent, received)
        return combine(back_ND, index)

    def _slot_experts(self, experts_TK: Tensor) -> Tensor:
        """Destination of every row as ``rank * e + local expert``; one per expert tensor rank, [T, K * etp].

        Ranks of the exchange group are numbered ``ep_rank * etp + etp_rank``. Dropped rows (expert id E) get the id after
        the last destination.
        """
        e, etp = self.experts.num_local, self.etp_size
        ranks_TK1 = (experts_TK // e).unsqueeze(-1) * etp
        ranks_TKR = ranks_TK1 + torch.arange(etp, device=experts_TK.device)
        slots_TKR = ranks_TKR * e + (experts_TK % e).unsqueeze(-1)
        dropped_TK1 = (experts_TK == self.model.num_experts).unsqueeze(-1)
        last = self.model.num_experts * etp
        return torch.where(dropped_TK1, last, slots_TKR).flatten(1)


def _in_slot_order(values_TK: Tensor, index: RouteIndex) -> Tensor:
    """One value per (token, choice) in the order of the sorted rows, [N]; dropped rows get 0."""
    position_N = index.position_TK.reshape(-1)
    N = position_N.numel()
    target_N = torch.where(position_N < 0, N, position_N)
    return values_TK.new_zeros(N + 1).scatter(0, target_N, values_TK.reshape(-1))[:N]

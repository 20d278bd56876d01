"""The router: the experts of each token, and their weights.

Legend: T tokens of this rank, E experts, K experts per token, D model width.

Balance loss of one microbatch, over its valid tokens on all tensor ranks (Ring-lite, arXiv 2506.14731, 3.2; on
Megatron's scale: 1 when balanced)::

    B = E * sum_e P_e * f_e,   P_e = mean probability of e,   f_e = share of the assignments that go to e

and z-loss ``Z = mean(logsumexp(logits)^2)``. Over a step the losses are ``a_balance * sum_m (n_m / N) B_m``
and ``a_z * sum_m (n_m / N) Z_m`` with n_m the microbatch's valid tokens and N their sum over microbatches
and data-parallel ranks. Both gradients are known in closed form at the end of the forward pass. They enter the
backward pass as constants, so that the coefficients have the same meaning at every layout. Padding is in none of the
sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ring.config.model import ModelConfig
from megatron_ring.kernels import Routing, route
from megatron_ring.model.packed import PackedInputs

NO_ROUTE = -1
"""Expert id in ``routes_LTK`` for a token without a recorded route; the router routes it."""

_MOMENTUM = 0.9
"""Decay per step of the running mean and variance of the logits (stochastic warm-up)."""


class _AttachGradients(torch.autograd.Function):
    """Identity on ``probs``; its backward pass adds constant gradients for the routing statistics."""

    @staticmethod
    def forward(ctx, probs_TK, prob_sum_E, z_sum, d_prob_sum_E, d_z_sum):
        ctx.save_for_backward(d_prob_sum_E, d_z_sum)
        return probs_TK.view_as(probs_TK)

    @staticmethod
    def backward(ctx, d_probs_TK):
        d_prob_sum_E, d_z_sum = ctx.saved_tensors
        return d_probs_TK, d_prob_sum_E, d_z_sum, None, None


class RingRouter(nn.Module):
    """Scores, top-k selection, balance and z-loss, expert bias, stochastic warm-up and replay for one layer.

    Buffers: ``expert_bias`` [E], if the model has one, is part of the checkpoint. The step statistics are sums over the
    step's microbatches on this rank, which the engine reduces and clears: ``load_E``, ``balance_sum``, ``z_sum``, logit
    moments, and with replay ``flips`` (choices that differ from the router's own, choices compared, tokens without
    recorded routes).
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, pg_collection: ProcessGroupCollection):
        super().__init__()
        self.config = config
        self.model = model
        self.tp_group = pg_collection.tp
        self.layer_number: int | None = None
        E = model.num_experts
        self.weight = nn.Parameter(torch.empty(E, model.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.weight.requires_grad_(not model.freeze_moe_router)
        self.dtype = torch.float64 if model.moe_router_dtype == "fp64" else torch.float32
        if model.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(E, dtype=torch.float32))
        else:
            self.expert_bias = None
        shapes = {"load_E": (E,), "balance_sum": (), "z_sum": (), "logit_moments": (3,), "flips": (3,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64), persistent=False)
        if model.moe_router_warmup_iters:
            self.register_buffer("logit_mean", torch.zeros(()))
            self.register_buffer("logit_std", torch.ones(()))

    def set_layer_number(self, layer_number: int) -> None:
        self.layer_number = layer_number

    @property
    def row(self) -> int:
        """This layer among those with experts, from 0, over all pipeline stages."""
        return self.layer_number - 1 - self.model.first_k_dense_replace

    def forward(self, hidden_TD: Tensor, packed: PackedInputs) -> Routing:
        """Route this rank's tokens. Communicates over the tensor-parallel group when losses are on."""
        valid_T = self._local(packed.valid_T)
        logits_TE = F.linear(hidden_TD.to(self.dtype), self.weight.to(self.dtype))
        learning = self.training and torch.is_grad_enabled() and packed.router is not None
        if self.training and packed.router is not None and packed.router.warmup < 1.0:
            logits_TE = self._warm_up(logits_TE, valid_T, packed.router.warmup, learning)
        if packed.routes_LTK is None:
            routing = self._route(logits_TE, valid_T)
        else:
            routing = self._replay(logits_TE, valid_T, self._local(packed.routes_LTK[self.row]), learning)
        if packed.recorded is not None:
            packed.recorded[self.row] = routing.experts_TK
        return self._with_losses(routing, packed) if learning else routing

    def _route(self, logits_TE: Tensor, valid_T: Tensor, replay_TK: Tensor | None = None) -> Routing:
        return route(
            logits_TE,
            topk=self.model.moe_router_topk,
            score_function=self.model.moe_router_score_function,
            renormalise=not self.model.moe_router_pre_softmax,
            expert_bias_E=self.expert_bias,
            num_groups=self.model.moe_router_num_groups,
            group_topk=self.model.moe_router_group_topk,
            scaling_factor=self.model.moe_router_topk_scaling_factor,
            valid_T=valid_T,
            replay_TK=replay_TK,
        )

    def _replay(self, logits_TE: Tensor, valid_T: Tensor, replay_TK: Tensor, learning: bool) -> Routing:
        """Route by the recorded choices, or by our own where there are none, and count the differences."""
        own_TK = self._route(logits_TE.detach(), valid_T).experts_TK
        replay_TK = replay_TK.long()
        known_T = (replay_TK != NO_ROUTE).all(-1)
        if learning:
            compared_T = known_T & valid_T
            flipped_TK = (replay_TK[:, :, None] != own_TK[:, None, :]).all(-1) & compared_T[:, None]
            counts = (flipped_TK.sum(), compared_T.sum() * own_TK.shape[1], (valid_T & ~known_T).sum())
            self.flips += torch.stack(counts)
        return self._route(logits_TE, valid_T, torch.where(known_T[:, None], replay_TK, own_TK))

    def _local(self, whole_T: Tensor) -> Tensor:
        """This tensor rank's share of a per-token row (all of it without sequence parallelism)."""
        if not self.config.sequence_parallel or self.tp_group.size() == 1:
            return whole_T
        return whole_T.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _with_losses(self, routing: Routing, packed: PackedInputs) -> Routing:
        """Attach the balance and z-loss gradients to the routing and add up the step's statistics."""
        n, E, K = max(packed.num_valid, 1), self.model.num_experts, self.model.moe_router_topk
        local_counts_E = routing.counts_E.to(torch.float64)
        counts_E = local_counts_E
        if self.config.sequence_parallel and self.tp_group.size() > 1:
            counts_E = local_counts_E.clone()
            torch.distributed.all_reduce(counts_E, group=self.tp_group)
        # dB / dprob_sum_e, times n_m: the microbatch's weight
        balance_E = counts_E * (E / (K * n))
        scale = packed.router.loss_scale
        with torch.no_grad():
            self.load_E += local_counts_E
            self.balance_sum += (balance_E * routing.prob_sum_E.double()).sum()
            self.z_sum += routing.z_sum.double()
        probs_TK = _AttachGradients.apply(
            routing.probs_TK,
            routing.prob_sum_E,
            routing.z_sum,
            (balance_E * (self.model.moe_aux_loss_coeff * scale)).to(routing.prob_sum_E.dtype),
            torch.full_like(routing.z_sum, self.model.moe_z_loss_coeff * scale),
        )
        return routing._replace(probs_TK=probs_TK)

    def _warm_up(self, logits_TE: Tensor, valid_T: Tensor, share: float, learning: bool) -> Tensor:
        """``a*s + (1-a)*(mu + sigma*noise)`` with the running statistics of earlier steps (Ling report)."""
        if learning:
            with torch.no_grad():
                # all rows, with padding as 0: selecting valid rows would make the host wait for their number
                kept_TE = torch.where(valid_T[:, None], logits_TE, 0).double()
                count = valid_T.sum().double() * logits_TE.shape[1]
                self.logit_moments += torch.stack((count, kept_TE.sum(), kept_TE.square().sum()))
        noise_TE = torch.randn_like(logits_TE)
        return share * logits_TE + (1 - share) * (self.logit_mean + self.logit_std * noise_TE)

    @torch.no_grad()
    def update_after_step(self, load_E: Tensor, moments: Tensor) -> None:
        """Move the expert bias towards balance and the running logit statistics towards this step's.

        Args:
            load_E: assignments per expert, summed over every rank that routed tokens of this layer.
            moments: count, sum and sum of squares of the logits, summed likewise.
        """
        if self.expert_bias is not None and not self.model.freeze_moe_router:
            error_E = load_E.mean() - load_E
            self.expert_bias += (torch.sign(error_E) * self.model.bias_update_rate).float()
        if self.model.moe_router_warmup_iters:
            count = moments[0].clamp(min=1)
            mean = moments[1] / count
            std = (moments[2] / count - mean**2).clamp(min=0).sqrt()
            # without counted logits the statistics stay; decided on the device, so that the host does not wait
            weight = (1 - _MOMENTUM) * (moments[0] > 0).float()
            self.logit_mean.lerp_(mean.float(), weight)
            self.logit_std.lerp_(std.float(), weight)

    @torch.no_grad()
    def clear_statistics(self) -> None:
        for buffer in (self.load_E, self.balance_sum, self.z_sum, self.logit_moments, self.flips):
            buffer.zero_()

"""One pass of generation at any layout: through the stages, over the cache, to sampled tokens on every rank.

Legend: N tokens of the pass, T the same padded for this layout, W sampled sequences, V vocabulary, D model width,
L layers with experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ring.config.model import ModelConfig
from megatron_ring.data.batch.microbatch import Microbatch, sent
from megatron_ring.kernels import sample_token
from megatron_ring.model.build import Logits, RingModel
from megatron_ring.model.kv_cache import CacheView, KvCache
from megatron_ring.model.packed import PackedInputs
from megatron_ring.rl.rollout.protocol import SamplingParams
from megatron_ring.rl.rollout.scheduler import ScheduledBatch
from megatron_ring.runtime.session import Session


class ModelRunner:
    """Runs passes on this rank's part of the model; every rank of its model-parallel group runs the same ones."""

    def __init__(self, models: Sequence[RingModel], model: ModelConfig, session: Session, cache: KvCache):
        self.models, self.model, self.cache = models, model, cache
        self.topology, self.device = session.topology, session.device
        config = models[0].config
        self.tp_size = self.topology.tp_size
        self.sequence_parallel = config.sequence_parallel and self.tp_size > 1
        self.hidden_size, self.dtype = config.hidden_size, config.params_dtype
        self._no_ends = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.num_expert_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))

    @torch.inference_mode()
    def __call__(
        self, work: ScheduledBatch | None, sampling: SamplingParams
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """``(tokens_W, logprobs_W, routes_NLK)`` of ``work``; None runs one row of padding.

        Communicates over the tensor-, pipeline- and expert-parallel groups.
        """
        microbatch, packed, uniforms_T = self._inputs(work, sampling.record_routes)
        logits = self._through_the_stages(microbatch, packed)
        if work is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32), None
        num_sampled = len(work.slots_W)
        drawn_2W = self._sample(logits, uniforms_T[:num_sampled], sampling) if logits is not None else None
        routes_NLK = self._routes(packed, len(work.tokens_N)) if sampling.record_routes else None
        tokens_W, logprobs_W = self._from_last_stage(drawn_2W, num_sampled).cpu().numpy()
        return tokens_W.astype(np.int64), logprobs_W.astype(np.float32), routes_NLK

    def _inputs(
        self, work: ScheduledBatch | None, record_routes: bool
    ) -> tuple[Microbatch, PackedInputs, Tensor]:
        """Padded to a multiple of the tensor-parallel size; padding writes to the cache's scratch row.

        Returns the tokens, how they are packed, and the uniforms of the sampled rows (first, then zeros up to
        [T]).
        """
        num = 0 if work is None else len(work.tokens_N)
        padding = max(num, 1) + (-max(num, 1)) % self.tp_size - num
        # one copy to the device for everything in a pass
        host_4T = np.zeros((4, num + padding), np.int64)
        host_4T[2] = self.cache.scratch
        if work is not None:
            host_4T[:3, :num] = work.tokens_N, work.positions_N, work.slots_N
            host_4T[3, : len(work.uniforms_W)] = work.uniforms_W.view(np.int64)
        device_4T = sent(torch.from_numpy(host_4T), self.device)
        tokens_T, positions_T, slots_T, uniforms_T = device_4T
        lengths = () if work is None or work.lengths is None else work.lengths
        valid_T = slots_T != self.cache.scratch
        view = CacheView(
            cache=self.cache,
            slots_T=slots_T,
            positions_T=positions_T,
            decoding=not lengths,
            rows_R=self._rows(work) if work is not None and lengths else None,
        )
        if lengths and padding:
            lengths = (*lengths, padding)
        ends = self._no_ends
        if lengths:
            ends = sent(torch.tensor((0, *np.cumsum(lengths)), dtype=torch.int32), self.device)
        longest = max(lengths, default=1)
        packed = PackedInputs(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            segment_lengths=lengths,
            valid_T=valid_T,
            num_valid=num,
            cache=view,
            recorded={} if record_routes else None,
        )
        microbatch = Microbatch(
            tokens_T=tokens_T,
            labels_T=tokens_T,
            loss_mask_T=valid_T,
            positions_T=positions_T,
            valid_T=valid_T,
            cu_seqlens=ends,
            segment_lengths=lengths,
            num_valid=num,
        )
        return microbatch, packed, uniforms_T.view(torch.float64)

    def _rows(self, work: ScheduledBatch) -> Tensor:
        multiple = self.tp_size if self.sequence_parallel else 1
        padding = -len(work.rows_W) % multiple
        rows = np.concatenate([work.rows_W, np.zeros(padding, np.int64)])
        return sent(torch.from_numpy(rows.astype(np.int64)), self.device)

    def _through_the_stages(self, microbatch: Microbatch, packed: PackedInputs) -> Logits | None:
        """The last stage's logits, None elsewhere. Sends hidden states along the pipeline group."""
        topology, group = self.topology, self.topology.groups.pp
        last = len(self.models) - 1
        output: Tensor | Logits | None = None
        for index, model in enumerate(self.models):
            if not (topology.is_first_stage and index == 0):
                model.set_input_tensor(self._receive(microbatch.num_slots, group))
            output = model(microbatch, packed)
            if not (topology.is_last_stage and index == last):
                assert isinstance(output, Tensor)
                target = (topology.pp_rank + 1) % topology.pp_size
                dist.send(output.contiguous(), dist.get_global_rank(group, target), group=group)
        return output if isinstance(output, Logits) else None

    def _receive(self, num_slots: int, group: dist.ProcessGroup) -> Tensor:
        rows = num_slots // self.tp_size if self.sequence_parallel else num_slots
        hidden = torch.empty(rows, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        source = (self.topology.pp_rank - 1) % self.topology.pp_size
        dist.recv(hidden, dist.get_global_rank(group, source), group=group)
        return hidden

    def _sample(self, logits: Logits, uniforms_W: Tensor, sampling: SamplingParams) -> Tensor:
        """Tokens and log p [2, W]. Gathers the vocabulary over the tensor-parallel group; its ranks then draw alike."""
        own_WV = logits.main_TV[: len(uniforms_W)]
        if self.tp_size > 1:
            own_WV = own_WV.contiguous()
            parts = [torch.empty_like(own_WV) for _ in range(self.tp_size)]
            dist.all_gather(parts, own_WV, group=logits.tp_group)
            own_WV = torch.cat(parts, dim=1)
        drawn = sample_token(
            own_WV[:, : logits.vocab_size],
            uniforms_W,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        # float64 holds every token id and every fp32 log p exactly
        return torch.stack([each.double() for each in drawn])

    def _from_last_stage(self, drawn_2W: Tensor | None, count: int) -> Tensor:
        """Broadcasts over the pipeline group."""
        topology, group = self.topology, self.topology.groups.pp
        if drawn_2W is None:
            drawn_2W = torch.empty(2, count, dtype=torch.float64, device=self.device)
        if topology.pp_size > 1:
            dist.broadcast(drawn_2W, dist.get_global_rank(group, topology.pp_size - 1), group=group)
        return drawn_2W

    def _routes(self, packed: PackedInputs, num_tokens: int) -> np.ndarray:
        """[N, L, K] on every rank. Communicates over the tensor- and pipeline-parallel groups."""
        topology = self.topology
        K = self.model.moe_router_topk
        assert packed.valid_T is not None and packed.recorded is not None
        T = packed.valid_T.numel()
        whole_LTK = torch.zeros(self.num_expert_layers, T, K, dtype=torch.int32, device=self.device)
        for layer, experts_TK in packed.recorded.items():
            own_TK = experts_TK.to(torch.int32).contiguous()
            if self.sequence_parallel:
                parts = [torch.empty_like(own_TK) for _ in range(self.tp_size)]
                dist.all_gather(parts, own_TK, group=topology.groups.tp)
                own_TK = torch.cat(parts)
            whole_LTK[layer] = own_TK
        if topology.pp_size > 1:
            dist.all_reduce(whole_LTK, group=topology.groups.pp)
        return whole_LTK[:, :num_tokens].transpose(0, 1).to(torch.int16).cpu().numpy()

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
from megatron_ring.data.microbatch import Microbatch
from megatron_ring.kernels import sample_token
from megatron_ring.model.build import Logits, RingModel
from megatron_ring.model.kv_cache import CacheView, KvCache
from megatron_ring.model.packed import PackedInputs
from megatron_ring.rl.rollout.protocol import SamplingParams
from megatron_ring.rl.rollout.slots import Pass
from megatron_ring.runtime.session import Session


class Runner:
    """Runs passes on this rank's part of the model; every rank of its model-parallel group runs the same ones."""

    def __init__(self, models: Sequence[RingModel], model: ModelConfig, session: Session, cache: KvCache):
        self.models, self.model, self.cache = models, model, cache
        self.topology, self.device = session.topology, session.device
        config = models[0].config
        self.tp_size = self.topology.tp_size
        self.sequence_parallel = config.sequence_parallel and self.tp_size > 1
        self.hidden_size, self.dtype = config.hidden_size, config.params_dtype
        self.num_expert_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))

    @torch.inference_mode()
    def __call__(
        self, work: Pass | None, sampling: SamplingParams
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """``(tokens_W, logprobs_W, routes_NLK)`` of ``work``; None runs one row of padding.

        Communicates over the tensor-, pipeline- and expert-parallel groups.
        """
        microbatch, packed = self._inputs(work, sampling.record_routes)
        logits = self._through_the_stages(microbatch, packed)
        if work is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32), None
        num_sampled = len(work.slots_W)
        tokens_W, logprobs_W = self._sample(logits, work, sampling) if logits is not None else (None, None)
        tokens_W, logprobs_W = self._from_last_stage(tokens_W, logprobs_W, num_sampled)
        routes_NLK = self._routes(packed, len(work.tokens_N)) if sampling.record_routes else None
        return tokens_W.cpu().numpy(), logprobs_W.float().cpu().numpy(), routes_NLK

    def _inputs(self, work: Pass | None, record_routes: bool) -> tuple[Microbatch, PackedInputs]:
        """Padded to a multiple of the tensor-parallel size; padding writes to the cache's scratch row."""
        num = 0 if work is None else len(work.tokens_N)
        padding = max(num, 1) + (-max(num, 1)) % self.tp_size - num
        nothing = np.zeros(0, np.int64)
        columns = (nothing,) * 3 if work is None else (work.tokens_N, work.positions_N, work.slots_N)
        tokens_T, positions_T, slots_T = (
            self._to_device(values, padding, fill)
            for values, fill in zip(columns, (0, 0, self.cache.scratch), strict=True)
        )
        decoding = work is None or work.lengths is None
        valid_T = torch.ones(num + padding, dtype=torch.bool, device=self.device)
        valid_T[num:] = False
        view = CacheView(
            cache=self.cache,
            slots_T=slots_T,
            positions_T=positions_T,
            decoding=decoding,
            rows_R=None if work is None or decoding else self._rows(work),
        )
        lengths = () if decoding else (*work.lengths, *((padding,) if padding else ()))
        ends = torch.tensor((0, *np.cumsum(lengths)), dtype=torch.int32, device=self.device)
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
        return microbatch, packed

    def _to_device(self, values: np.ndarray, padding: int, fill: int) -> Tensor:
        padded = np.concatenate([values, np.full(padding, fill, np.int64)]) if padding else values
        return torch.from_numpy(np.ascontiguousarray(padded, np.int64)).to(self.device)

    def _rows(self, work: Pass) -> Tensor:
        multiple = self.tp_size if self.sequence_parallel else 1
        padding = -len(work.rows_W) % multiple
        rows = np.concatenate([work.rows_W, np.zeros(padding, np.int64)])
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

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

    def _sample(self, logits: Logits, work: Pass, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
        """Gathers the vocabulary over the tensor-parallel group; its ranks then draw alike."""
        own_WV = logits.main_TV[: len(work.slots_W)]
        if self.tp_size > 1:
            own_WV = own_WV.contiguous()
            parts = [torch.empty_like(own_WV) for _ in range(self.tp_size)]
            dist.all_gather(parts, own_WV, group=logits.tp_group)
            own_WV = torch.cat(parts, dim=1)
        uniforms_W = torch.from_numpy(work.uniforms_W).to(self.device)
        return sample_token(
            own_WV[:, : logits.vocab_size],
            uniforms_W,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )

    def _from_last_stage(
        self, tokens_W: Tensor | None, logprobs_W: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """Broadcasts over the pipeline group."""
        topology, group = self.topology, self.topology.groups.pp
        if topology.pp_size == 1:
            return tokens_W, logprobs_W
        # float64 holds every token id and every fp32 log p exactly
        both_2W = torch.empty(2, count, dtype=torch.float64, device=self.device)
        if topology.is_last_stage:
            both_2W[0], both_2W[1] = tokens_W, logprobs_W
        dist.broadcast(both_2W, dist.get_global_rank(group, topology.pp_size - 1), group=group)
        return both_2W[0].long(), both_2W[1]

    def _routes(self, packed: PackedInputs, num_tokens: int) -> np.ndarray:
        """[N, L, K] on every rank. Communicates over the tensor- and pipeline-parallel groups."""
        topology = self.topology
        K = self.model.moe_router_topk
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

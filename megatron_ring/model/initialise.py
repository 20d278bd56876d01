"""Initial weights that depend on the seed and the tensor's name only: one seed gives one model at every
layout.

Megatron draws from one generator per rank in the order of construction, so the same seed gives other
weights at another layout. Its own initialisation still runs, for it also marks parameters as
tensor-parallel; here each tensor (and each expert) has a generator of its own, draws its whole, and keeps
its shard.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_ring.config.model import ModelConfig

_NORMS = ("layernorm.weight", ".enorm.weight", ".hnorm.weight", "layer_norm_weight")
_RESIDUAL = (".linear_proj.weight", ".linear_fc2.weight", ".fc2_weight")
_BUFFERS = ("expert_bias", "logit_mean", "logit_std", "_extra_state")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def initialise(chunk: torch.nn.Module, model: ModelConfig, seed: int, metadata: dict) -> None:
    """Fill ``chunk``'s parameters: norms 1, biases 0, matrices N(0, init_method_std).

    Matrices that write into the residual stream are scaled by ``1 / sqrt(2 * num_layers)`` (GPT-2,
    Megatron). Rows past the vocabulary are 0.
    """
    state = chunk.sharded_state_dict(metadata=metadata)
    apply_factories(state)
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor) and not shard.key.endswith(_BUFFERS):
            _fill(shard, model, seed)


def _fill(shard: ShardedTensor, model: ModelConfig, seed: int) -> None:
    key = shard.key
    if key.endswith(_NORMS):
        shard.data.fill_(1.0)
    elif key.endswith("bias"):
        shard.data.zero_()
    else:
        std = model.init_method_std
        if key.endswith(_RESIDUAL):
            std /= math.sqrt(2 * model.num_layers)
        shape, offset = list(shard.global_shape), shard.global_offset
        if key.endswith(_VOCABULARY):
            shape[0] = model.vocab_size
        if ".experts." in key:
            for local in range(shard.data.shape[0]):
                expert = offset[0] + local
                _draw(shard.data[local], f"{seed}/{key}/{expert}", shape[1:], offset[1:], std)
        else:
            _draw(shard.data, f"{seed}/{key}", shape, offset, std)


def _draw(out: torch.Tensor, name: str, shape: list[int], offset: tuple[int, ...], std: float) -> None:
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    generator = torch.Generator(device=out.device).manual_seed(int.from_bytes(digest, "little"))
    whole = torch.randn(shape, generator=generator, device=out.device, dtype=torch.float32) * std
    own = whole[tuple(slice(o, o + n) for o, n in zip(offset, out.shape, strict=True))]
    out.zero_()
    out[tuple(slice(n) for n in own.shape)].copy_(own)

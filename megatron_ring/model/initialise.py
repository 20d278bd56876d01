"""Initial weights that depend only on the seed and the tensor's name, so that a seed gives the same model at every
layout.

Megatron draws from one generator per rank in the order of construction, so its weights depend on the layout. Its
initialisation still runs, because it also marks parameters as tensor-parallel. Here each tensor (and each expert) has
its own generator; every rank draws the whole tensor and keeps its shard.
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

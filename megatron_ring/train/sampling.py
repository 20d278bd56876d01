"""Text from the training weights at any layout: one full forward pass per token, for a look at what the
model says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.model.build import Logits
from megatron_ring.train.engine import Engine


@torch.no_grad()
def sample_tokens(
    engine: Engine,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    num_slots: int,
    temperature: float = 0.8,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> list[int]:
    """Continue ``prompt``; returns the new tokens only, without a stop token. Collective over the world.

    ``num_slots`` bounds prompt plus continuation and must divide by the tensor-parallel size. There is no
    KV cache, so the cost grows with the square of the length: this is for samples in a report, not for
    rollouts.
    """
    generator = torch.Generator().manual_seed(seed)
    topology = engine.topology
    # Megatron's interleaved schedule takes no fewer microbatches than there are stages
    copies = topology.pp_size if topology.vpp_size > 1 else 1
    tokens = list(prompt)
    for _ in range(min(max_new_tokens, num_slots - len(prompt))):
        row = pack_microbatch([(tokens, tokens, [0.0] * len(tokens))], num_slots)
        results = engine.forward([row] * copies, partial(_column, len(tokens) - 1))
        logits_V = _on_every_rank(engine, results)
        probabilities = torch.softmax(logits_V.double() / temperature, dim=-1)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token in stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _column(position: int, _microbatch: Microbatch, logits: Logits) -> tuple[Tensor, Tensor]:
    """The whole vocabulary's logits at one position. Communicates over the tensor-parallel group."""
    own_V = logits.main_TV[position].float().contiguous()
    parts = [torch.empty_like(own_V) for _ in range(logits.tp_group.size())]
    torch.distributed.all_gather(parts, own_V, group=logits.tp_group)
    return logits.main_TV.sum(), torch.cat(parts)[: logits.vocab_size]


def _on_every_rank(engine: Engine, results: list[Tensor]) -> Tensor:
    """Send the last stage's logits to every rank, from the world's last rank. Collective over the world."""
    vocabulary = engine.config.model.vocab_size
    logits_V = results[0].cpu() if results else torch.empty(vocabulary)
    shared = logits_V.to(engine.session.device)
    torch.distributed.broadcast(shared, src=engine.session.world_size - 1)
    return shared.cpu()

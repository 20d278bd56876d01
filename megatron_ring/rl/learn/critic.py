"""PPO's critic: a separate model that learns the expected score after each token.

It has the policy's layout, starts from the policy's layers, and has its own optimizer. A step uses it twice:
for values of the sampled responses, from which advantages and returns are computed; then for one update per
minibatch, towards those returns. Legend: R response tokens, T token slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ring.checkpoint.folder import CRITIC
from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.bins import best_fit
from megatron_ring.data.batch.microbatch import Microbatch, pack_microbatch
from megatron_ring.model.value import ValueModel, Values
from megatron_ring.rl.batch.microbatch import RLMicrobatch
from megatron_ring.rl.types import Rollout
from megatron_ring.runtime.session import Session
from megatron_ring.train.engine import Engine, StepReport
from megatron_ring.train.objective import LossTerms

VALUE_CLIP = 0.2
"""How far a value may move in one update before its loss stops pulling (PPO's clipped value loss)."""


@dataclass(frozen=True, kw_only=True)
class ValueObjective:
    """``1/2 max((V - R)^2, (clip(V, V_old +- 0.2) - R)^2)``, a mean over the minibatch's loss tokens.

    V_old and R are those from which the advantages were computed.
    """

    sum_names: tuple[str, ...] = ("value_loss", "value_error", "value_mean", "return_mean")
    peak_names: tuple[str, ...] = ()

    def local_denominator(self, microbatches: Sequence[RLMicrobatch]) -> float:
        return float(sum(microbatch.num_loss_tokens for microbatch in microbatches))

    def __call__(self, answer: Values, microbatch: RLMicrobatch) -> LossTerms:
        assert microbatch.values_T is not None and microbatch.returns_T is not None
        mask_T = (microbatch.loss_mask_T > 0).float()
        values_T, old_T, returns_T = answer.values_T, microbatch.values_T, microbatch.returns_T
        near_T = torch.clamp(values_T, old_T - VALUE_CLIP, old_T + VALUE_CLIP)
        free_T, held_T = (values_T - returns_T).square(), (near_T - returns_T).square()
        loss = (0.5 * torch.maximum(free_T, held_T) * mask_T).sum()
        sums = {
            "value_loss": loss,
            "value_error": ((values_T - returns_T).abs() * mask_T).sum(),
            "value_mean": (values_T * mask_T).sum(),
            "return_mean": (returns_T * mask_T).sum(),
        }
        return LossTerms(loss_sum=loss, sums={name: value.detach() for name, value in sums.items()})


class Critic:
    """The value model and its optimizer.

    ``config`` and ``engine`` are what a :class:`~megatron_ring.checkpoint.checkpointer.Checkpointer` takes to
    save it: in a folder ``critic`` inside the policy's.
    """

    def __init__(self, config: RunConfig, session: Session):
        self.session = session
        save = config.checkpoint.save
        self.config = replace(
            config,
            train=replace(config.train, lr=config.objective.critic_lr, min_lr=0.0),
            # the policy's save prunes both: see folder.prune
            checkpoint=replace(
                config.checkpoint, save=None if save is None else f"{save}/{CRITIC}", keep_last_n=0
            ),
        )
        self.engine = Engine(self.config, session, ValueModel)
        self.objective = ValueObjective()

    @torch.no_grad()
    def start_from(self, policy: Engine) -> None:
        """Copy the policy's layers; the head starts at 0, so that the first values are 0. Collective over the world."""
        policy.gather_parameters()
        for own, theirs in zip(self.engine.models, policy.models, strict=True):
            source = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
            for name, value in [*own.named_parameters(), *own.named_buffers()]:
                if name == "output_layer.weight":
                    value.zero_()
                else:
                    value.copy_(source[name])
        self.engine.on_weights_changed()
        self.engine.discard()

    def values(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The value before each response token, fp64 [R] per rollout, on every rank of the pipeline.

        Collective over the world; each data-parallel rank gives its own rollouts.
        """
        capacity = self.config.budget.microbatch_capacity
        slots = [rollout.num_tokens - 1 for rollout in rollouts]
        groups = best_fit(slots, capacity, range(len(slots)), max_open=1)
        padding: list[list[int]] = [[]] * (self._most(len(groups)) - len(groups))
        microbatches = [_whole(rollouts, group, capacity) for group in groups + padding]
        rows = self._scored(microbatches)
        out: dict[int, np.ndarray] = {}
        # one copy for all microbatches, which have the same number of slots
        values_MT = torch.stack(rows).double().cpu().numpy()
        for group, row_T in zip(groups, values_MT, strict=False):
            place = 0
            for index in group:
                prompt, length = len(rollouts[index].prompt.tokens), rollouts[index].response.length
                first = place + prompt - 1
                out[index] = row_T[first : first + length].copy()
                place += prompt + length - 1
        return [out[index] for index in range(len(rollouts))]

    def step(self, microbatches: Sequence[RLMicrobatch], lr: float | None = None) -> StepReport:
        """One update; ``lr`` is critic_lr unless given. Collective over the world.

        Routes that the microbatches carry are the policy's: the critic routes by itself.
        """
        rate = self.config.train.lr if lr is None else lr
        return self.engine.step([replace(m, routes_LTK=None) for m in microbatches], self.objective, rate)

    def _scored(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Values [T] per microbatch on every pipeline stage: the last stage's, summed with zeros from the
        others."""
        rows = self.engine.forward(microbatches, _read)
        if self.session.topology.pp_size == 1:
            return rows
        shape = (len(microbatches), microbatches[0].num_slots)
        whole = torch.stack(rows) if rows else torch.zeros(shape, device=self.session.device)
        dist.all_reduce(whole, group=self.session.topology.groups.pp)
        return list(whole)

    def _most(self, count: int) -> int:
        """The largest count over data-parallel ranks, which exchange tokens with one another's experts."""
        topology = self.session.topology
        most = int(self.session.largest(count, topology.groups.dp))
        stages = topology.pp_size if topology.vpp_size > 1 else 1
        return -(-max(most, 1) // stages) * stages


def _read(microbatch: Microbatch, answer: Values) -> tuple[Tensor, Tensor]:
    return answer.values_T.sum(), answer.values_T.detach()


def _whole(rollouts: Sequence[Rollout], group: Sequence[int], capacity: int) -> Microbatch:
    """Prompts and whole responses, without labels: no loss is computed."""
    sequences = []
    for index in group:
        tokens = [*rollouts[index].prompt.tokens, *rollouts[index].response.tokens_R.tolist()][:-1]
        sequences.append((tokens, tokens, [0.0] * len(tokens)))
    return pack_microbatch(sequences, capacity)

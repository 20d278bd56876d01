"""Rollouts packed into sequences for the trainer, with a column for each quantity that the objective needs.

Legend: T token slots of a microbatch, R response tokens, L layers with experts, K experts per token. Columns
are aligned with labels: position p predicts token p + 1, so a response token's values are at the position that
predicts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ring.data.batch.microbatch import IGNORE, Microbatch, pack_microbatch
from megatron_ring.model.router import NO_ROUTE
from megatron_ring.rl.types import Pick, Rollout


@dataclass(frozen=True, kw_only=True)
class RLMicrobatch(Microbatch):
    """One microbatch of picked responses; every column is fp32 [T] and 0 where there is no loss.

    ``old_logp_T`` (the denominator of the ratio) and ``ref_logp_T`` are None until they are scored, and stay
    None on pipeline stages that compute no loss (:func:`with_column`). ``weights_T`` is 1/|y|, |y| the
    response's tokens in this minibatch; objectives that average over responses multiply by it. ``fresh_T`` is 1
    where the token was sampled by the policy that this step updates, 0 where by an older one; ``weights_moved``
    is set if an earlier minibatch of the step has updated it since. ``values_T`` and ``returns_T`` are set with
    a critic. ``routes_LTK`` (int16) replays expert choices, ``NO_ROUTE`` where they are unknown.

    Example: prompt (5, 6), response (7, 8, 2) of which tokens 1 and 2 carry loss, in T = 6 slots::

        tokens_T        [5, 6, 7, 8, 0, 0]          # the last token predicts nothing and is left out
        labels_T        [-100, -100, 8, 2, -100, -100]
        rollout_logp_T  [0., 0., -.7, -.01, 0., 0.]
        weights_T       [0., 0., .5, .5, 0., 0.]
    """

    advantages_T: Tensor
    rollout_logp_T: Tensor
    weights_T: Tensor
    fresh_T: Tensor
    num_responses: int
    weights_moved: bool = False
    old_logp_T: Tensor | None = None
    ref_logp_T: Tensor | None = None
    values_T: Tensor | None = None
    returns_T: Tensor | None = None
    routes_LTK: Tensor | None = None

    @property
    def num_loss_tokens(self) -> int:
        return int((self.loss_mask_T > 0).sum())


def sequence_slots(rollout: Rollout, pick: Pick) -> int:
    """Token slots that a pick takes: its prompt and response up to ``stop``, less the last token."""
    return len(rollout.prompt.tokens) + pick.stop - 1


def build_microbatch(
    rollouts: Mapping[int, Rollout] | Sequence[Rollout],
    picks: Sequence[Pick],
    num_slots: int,
    *,
    version: int = 0,
    weights_moved: bool = False,
    with_values: bool = False,
    pad_id: int = 0,
    replay_layers: tuple[int, int] | None = None,
) -> RLMicrobatch:
    """Pack the picked responses, whole, one attention segment each; no picks give a microbatch of padding.

    Args:
        rollouts: by the index that picks name; their advantages are assigned.
        version: of the policy that this step updates.
        weights_moved: this is not the step's first minibatch.
        with_values: a critic learns from the microbatch; the rollouts have values and returns.
        replay_layers: (layers with experts, experts per token) to fill ``routes_LTK`` from
            ``Response.routes_SLK``; None replays nothing.

    Raises:
        ValueError: the sequences do not fit into ``num_slots``, or a pick is empty.
    """
    sequences, rows = [], []
    for pick in picks:
        rollout = rollouts[pick.index]
        if not 0 <= pick.start < pick.stop <= rollout.response.length:
            raise ValueError(f"{pick} is not a part of a response of {rollout.response.length} tokens")
        sequences.append(_sequence(rollout, pick))
        rows.append(_columns(rollout, pick, version))
    packed = pack_microbatch(sequences, num_slots, pad_id=pad_id)

    def column(name: str) -> Tensor:
        out_T = np.zeros(num_slots, dtype=np.float32)
        filled = np.concatenate([row[name] for row in rows]) if rows else out_T
        out_T[: len(filled)] = filled
        return torch.from_numpy(out_T)

    routes_LTK = None
    if replay_layers is not None:
        routes_LTK = _routes(rollouts, picks, num_slots, *replay_layers)
    return RLMicrobatch(
        **vars(packed),
        advantages_T=column("advantages"),
        rollout_logp_T=column("rollout_logp"),
        weights_T=column("weights"),
        fresh_T=column("fresh"),
        num_responses=len(picks),
        weights_moved=weights_moved,
        values_T=column("values") if with_values else None,
        returns_T=column("returns") if with_values else None,
        routes_LTK=routes_LTK,
    )


def _sequence(rollout: Rollout, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask of one pick, prompt first."""
    prompt = np.asarray(rollout.prompt.tokens, dtype=np.int64)
    whole = np.concatenate([prompt, np.asarray(rollout.response.tokens_R[: pick.stop], dtype=np.int64)])
    mask = np.zeros(len(whole) - 1, dtype=np.float32)
    mask[len(prompt) - 1 + pick.start :] = 1.0
    return torch.from_numpy(whole[:-1]), torch.from_numpy(whole[1:]), torch.from_numpy(mask)


def _columns(rollout: Rollout, pick: Pick, version: int) -> dict[str, np.ndarray]:
    response, own = rollout.response, slice(pick.start, pick.stop)
    if rollout.advantages_R is None:
        raise ValueError(f"response {response.key} has no advantages: assign them before packing")
    before = np.zeros(len(rollout.prompt.tokens) - 1 + pick.start, dtype=np.float32)
    count = pick.num_tokens
    values = {
        "advantages": rollout.advantages_R[own],
        "rollout_logp": response.logprobs_R[own],
        "weights": np.full(count, 1.0 / count, dtype=np.float32),
        "fresh": response.versions_R[own] >= version,
    }
    if rollout.values_R is not None and rollout.returns_R is not None:
        values |= {"values": rollout.values_R[own], "returns": rollout.returns_R[own]}
    return {name: np.concatenate([before, row.astype(np.float32)]) for name, row in values.items()}


def _routes(
    rollouts: Mapping[int, Rollout] | Sequence[Rollout],
    picks: Sequence[Pick],
    num_slots: int,
    num_layers: int,
    topk: int,
) -> Tensor:
    """int16 [L, T, K]: the rollout engine's choices, ``NO_ROUTE`` for padding and where it gave none."""
    routes_TLK = np.full((num_slots, num_layers, topk), NO_ROUTE, dtype=np.int16)
    place = 0
    for pick in picks:
        rollout = rollouts[pick.index]
        slots = sequence_slots(rollout, pick)
        recorded_SLK = rollout.response.routes_SLK
        if recorded_SLK is not None:
            if recorded_SLK.shape[1:] != (num_layers, topk):
                raise ValueError(
                    f"response {rollout.response.key} has routes of {recorded_SLK.shape[1:]} layers and experts, "
                    f"the model has {(num_layers, topk)}"
                )
            known = min(slots, len(recorded_SLK))
            routes_TLK[place : place + known] = recorded_SLK[:known]
        place += slots
    return torch.from_numpy(routes_TLK).permute(1, 0, 2).contiguous()


def with_column(
    microbatches: Sequence[RLMicrobatch], name: str, columns: Sequence[Tensor]
) -> list[RLMicrobatch]:
    """The microbatches with column ``name`` (such as "ref_logp_T") set to the scores, 0 where there is no loss.

    ``columns`` is what the last pipeline stage scored, one [T] each; elsewhere it is empty and the
    microbatches come back as they are, because only the last stage computes the objective.
    """
    if not columns:
        return list(microbatches)
    # one copy for all microbatches
    on_host = torch.cat([column_T.float() for column_T in columns]).cpu().split([len(c) for c in columns])
    return [
        replace(microbatch, **{name: torch.where(microbatch.labels_T == IGNORE, 0.0, column_T)})
        for microbatch, column_T in zip(microbatches, on_host, strict=True)
    ]


def with_routes(microbatches: Sequence[RLMicrobatch], routes: Sequence[Tensor]) -> list[RLMicrobatch]:
    """The microbatches with ``routes_LTK`` as :meth:`Engine.score_with_routes` recorded them."""
    return [
        replace(microbatch, routes_LTK=routes_LTK)
        for microbatch, routes_LTK in zip(microbatches, routes, strict=True)
    ]

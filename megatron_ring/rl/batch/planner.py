"""From every rank's rollouts to this rank's microbatches: the budget, the grid, and who trains on what.

Lines 5 and 6 of an RL step. Lengths and rewards of all rollouts are known to every rank, so that each makes
the same choice by itself; tokens move once, from the rank that sampled them to the rank that trains on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from megatron_ring.config.rl import BudgetConfig, global_token_budget
from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.packing import Grid, pack
from megatron_ring.data.shuffle import Shuffle
from megatron_ring.errors import CheckpointError
from megatron_ring.rl.batch import Candidate, Selection, audit, select
from megatron_ring.rl.batch.exchange import send_rollouts
from megatron_ring.rl.batch.microbatch import RLMicrobatch, build_microbatch
from megatron_ring.rl.collect.pending import PendingGroups
from megatron_ring.rl.types import Pick, Rollout
from megatron_ring.runtime.collectives import gather_json
from megatron_ring.runtime.session import Session


class CarryOver(NamedTuple):
    """A rollout whose tokens from ``start`` on open the next step, offered for the ``steps``-th time."""

    rollout: Rollout
    start: int
    steps: int


def must_fit(config: RunConfig, book: PendingGroups, carried: Sequence[CarryOver]) -> None:
    """Raise CheckpointError where a response of an earlier run, as it is or may become, exceeds a microbatch."""
    capacity, longest = config.budget.microbatch_capacity, config.rollout.max_response_length
    slots = [carry.rollout.num_tokens - 1 for carry in carried]
    for group in book.open.values():
        lengths = [r.response.length for r in group.finished.values()] + [longest] * bool(group.waiting)
        slots += [len(group.prompt.tokens) + max(lengths, default=1) - 1]
    if max(slots, default=0) > capacity:
        raise CheckpointError(
            f"microbatch_capacity={capacity} is less than the {max(slots)} tokens of a prompt and response that the "
            f"checkpoint goes on with; set --microbatch-capacity {max(slots)} or more"
        )


class _Row(NamedTuple):
    """What every rank knows of one rollout: who has it, and a :class:`Candidate` in the making."""

    rank: int
    place: int
    uid: int
    sample: int
    arrival: tuple[int, int, int]
    prompt_tokens: int
    length: int
    zero_advantage: bool
    score: float
    start: int
    carried: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step's work for this rank.

    ``grids`` has one list of microbatches per optimizer step, as many on every rank. ``cut``, ``wasted``,
    ``excluded``, ``carried_tokens`` and ``stale`` are response tokens of the whole job (see
    :class:`~megatron_ring.rl.ledger.Ledger`).
    """

    grids: list[list[RLMicrobatch]]
    carried: list[CarryOver]
    metrics: dict[str, float]
    shortfall: int
    cut: int
    wasted: int
    excluded: int
    carried_tokens: int
    stale: int


class MinibatchPlanner:
    """Fills the budget and the grid. Collective over the data-parallel group."""

    def __init__(self, config: RunConfig, session: Session):
        self.config, self.session = config, session
        budget, topology = config.budget, session.topology
        self.dp_size = topology.dp_size
        self.token_budget = (
            global_token_budget(budget, self.dp_size, session.world_size) if budget.token_budget else 0
        )
        self._multiple_of = topology.pp_size if topology.vpp_size > 1 else 1
        n, longest = budget.minibatches_per_step, config.rollout.max_response_length
        between = 0 if budget.budget_overshoot == "carry" else (n - 1) * (longest - 1)
        self.tokens_wanted = n * self.token_budget + between
        """Response tokens that are sure to fill a step's minibatches, whatever is lost at a cut between two."""

    def plan(self, rollouts: Sequence[Rollout], carried: Sequence[CarryOver], step: int) -> Plan:
        """Choose this step's tokens from what this rank has, and all others have, and pack them.

        Args:
            rollouts: this rank's new ones, advantages assigned, in any order. One without any token has nothing
                to train on and is left out.
            carried: what :attr:`Plan.carried` said last time.
            step: of the run: it seeds the order, and it is the version of the policy that is now updated.
        """
        rollouts = [rollout for rollout in rollouts if rollout.response.length]
        own = [c.rollout for c in carried] + rollouts
        rows = self._everyones_rows(rollouts, carried)
        candidates = _candidates(rows)
        selection = self._select(candidates, step)
        minibatches, counts = selection.minibatches, selection.counts
        metrics = counts.metrics() if self.token_budget else {}
        # the next step's policy is one version on; an interrupted response was old before it was carried
        oldest = step + 1 - self.config.rollout.rollout_max_staleness
        fresh = [p for p in selection.carried if rows[p.index].version >= oldest]
        if self.token_budget:
            metrics["c3po/responses_carried"] = float(len(fresh))
        if any(minibatches):
            metrics |= audit(candidates, [row.score for row in rows], minibatches).metrics()
        grids = [self._grid(rows, picks) for picks in minibatches]
        metrics |= _packing_metrics(grids)
        microbatches = self._exchange(own, rows, minibatches, grids, step)
        kept = [
            CarryOver(own[rows[p.index].place], p.start, rows[p.index].carried + 1)
            for p in fresh
            if rows[p.index].rank == self.session.topology.dp_rank
        ]
        carried_tokens = sum(p.num_tokens for p in fresh)
        return Plan(
            grids=microbatches,
            carried=kept,
            metrics=metrics,
            shortfall=counts.shortfall,
            cut=counts.cut,
            wasted=counts.wasted,
            excluded=counts.excluded,
            carried_tokens=carried_tokens,
            stale=counts.carried - carried_tokens,
        )

    def _everyones_rows(self, rollouts: Sequence[Rollout], carried: Sequence[CarryOver]) -> list[_Row]:
        entries: list[tuple[Rollout, int, int]] = [
            *carried,
            *((rollout, 0, 0) for rollout in rollouts),
        ]
        own: list[Any] = [
            [
                rollout.prompt.uid,
                rollout.response.sample,
                list(rollout.arrival),
                len(rollout.prompt.tokens),
                rollout.response.length,
                not np.any(rollout.advantages_R),
                rollout.reward.score,
                start,
                steps,
                int(rollout.response.versions_R.min()),
            ]
            for rollout, start, steps in entries
        ]
        everyone = gather_json(own, self.session.topology.groups.dp, self.session.device)
        return [
            _Row(rank, place, *values)
            for rank, of_rank in enumerate(everyone)
            for place, values in enumerate(of_rank)
        ]

    def _select(self, candidates: Sequence[Candidate], step: int) -> Selection:
        budget = self.config.budget
        if not self.token_budget:
            return _everything(candidates, budget, step)
        return select(
            candidates,
            self.token_budget,
            num_minibatches=budget.minibatches_per_step,
            order=budget.budget_order,
            overshoot=budget.budget_overshoot,
            zero_advantage=budget.zero_advantage,
            seed=step,
        )

    def _grid(self, rows: Sequence[_Row], picks: Sequence[Pick]) -> Grid:
        """Where each pick goes, in as many microbatches as it takes."""
        return pack(
            [rows[pick.index].prompt_tokens + pick.stop - 1 for pick in picks],
            capacity=self.config.budget.microbatch_capacity,
            dp_size=self.dp_size,
            multiple_of=self._multiple_of,
        )

    def _exchange(
        self,
        own: Sequence[Rollout],
        rows: Sequence[_Row],
        minibatches: Sequence[Sequence[Pick]],
        grids: Sequence[Grid],
        step: int,
    ) -> list[list[RLMicrobatch]]:
        """Move rollouts to the ranks that train on them and build this rank's microbatches."""
        topology = self.session.topology
        wanted: list[dict[int, None]] = [{} for _ in range(self.dp_size)]
        for picks, grid in zip(minibatches, grids, strict=True):
            for rank, slots in enumerate(grid.placements):
                wanted[rank].update((picks[i].index, None) for items in slots for i in items)
        parcels = [
            [_bare(own[rows[index].place]) for index in of_rank if rows[index].rank == topology.dp_rank]
            for of_rank in wanted
        ]
        arrived = send_rollouts(parcels, topology.groups.dp, self.session.device)
        mine = {rollout.response.key: rollout for parcel in arrived for rollout in parcel}

        def microbatch(number: int, picks: Sequence[Pick], items: Sequence[int]) -> RLMicrobatch:
            chosen = [picks[i] for i in items]
            rollouts = [mine[rows[pick.index].uid, rows[pick.index].sample] for pick in chosen]
            local = [Pick(place, pick.start, pick.stop) for place, pick in enumerate(chosen)]
            return build_microbatch(
                rollouts,
                local,
                self.config.budget.microbatch_capacity,
                version=step,
                weights_moved=number > 0,
                with_values=self.config.objective.critic,
                replay_layers=self._replay_layers(),
            )

        return [
            [microbatch(number, picks, items) for items in grid.placements[topology.dp_rank]]
            for number, (picks, grid) in enumerate(zip(minibatches, grids, strict=True))
        ]

    def _replay_layers(self) -> tuple[int, int] | None:
        model = self.config.model
        if self.config.objective.routing_replay != "R3":
            return None
        return model.num_moe_layers, model.moe_router_topk


def _candidates(rows: Sequence[_Row]) -> list[Candidate]:
    """What the budget is told. ``arrival`` is a place in an order that no layout changes."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].arrival, rows[i].uid, rows[i].sample))
    place = {index: at for at, index in enumerate(order)}
    return [
        Candidate(
            group=row.uid,
            sample=row.sample,
            length=row.length,
            arrival=place[index],
            zero_advantage=row.zero_advantage,
            start=row.start,
            carried=row.carried,
        )
        for index, row in enumerate(rows)
    ]


def _everything(candidates: Sequence[Candidate], budget: BudgetConfig, seed: int) -> Selection:
    """Every response, in minibatches of equally many: the recipe without a token budget."""
    aside = budget.zero_advantage == "aside"
    used = [i for i, candidate in enumerate(candidates) if not (aside and candidate.zero_advantage)]
    order = sorted(used, key=lambda i: (candidates[i].group, candidates[i].sample))
    if order:
        shuffle = Shuffle(len(order), "minibatches", seed)
        order = [order[i] for i in shuffle.many(np.arange(len(order))).tolist()]
    parts = np.array_split(np.array(order, dtype=np.int64), budget.minibatches_per_step)
    return Selection.of_all(candidates, [part.tolist() for part in parts])


def _bare(rollout: Rollout) -> Rollout:
    """Without what only verifiers need: the tests of a problem in code can be larger than its answers."""
    return replace(rollout, prompt=replace(rollout.prompt, text="", reference={}))


def _packing_metrics(grids: Sequence[Grid]) -> dict[str, float]:
    """Means of the minibatches' shares, weighted by their slots, and the number of microbatches of a rank."""
    slots = [len(grid.placements[0]) for grid in grids]
    each = [grid.metrics() for grid in grids]
    means = {
        name: sum(n * metrics[name] for n, metrics in zip(slots, each, strict=True)) / sum(slots)
        for name in each[0]
    }
    return means | {"packing/microbatches": float(sum(slots))}

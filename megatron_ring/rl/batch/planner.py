"""From every rank's rollouts to this rank's microbatches, in five steps.

Gather metadata, select, pack, exchange, build. Lengths and rewards of all rollouts are known to every rank, so that
each makes the same choice by itself; tokens move once, from the rank that sampled them to the rank that trains on
them. A rollout has one index throughout: its place in the job's list of :class:`~megatron_ring.rl.types.RolloutMeta`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_ring.config.rl import BudgetConfig, global_token_budget
from megatron_ring.config.run import RunConfig
from megatron_ring.data.batch.packing import Grid, pack
from megatron_ring.data.shuffle import Shuffle
from megatron_ring.rl.batch.exchange import exchange_rollouts
from megatron_ring.rl.batch.microbatch import RLMicrobatch, build_microbatch
from megatron_ring.rl.batch.select import select
from megatron_ring.rl.batch.selection import Selection
from megatron_ring.rl.batch.selection_stats import selection_stats
from megatron_ring.rl.types import Pick, Rollout, RolloutMeta
from megatron_ring.runtime.collectives import gather_json
from megatron_ring.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step's work for this rank.

    ``grids`` has one list of microbatches per optimizer step, the same number on every rank. ``cut``,
    ``wasted``, ``excluded``, ``carried_tokens`` and ``stale`` are response tokens of the whole job (see
    :class:`~megatron_ring.rl.ledger.Ledger`).
    """

    grids: list[list[RLMicrobatch]]
    carried: list[Rollout]
    metrics: dict[str, float]
    shortfall: int
    cut: int
    wasted: int
    excluded: int
    carried_tokens: int
    stale: int


@dataclass(kw_only=True)
class MinibatchPlanner:
    """The five steps with a run's settings. Collective over ``group``, the data-parallel one, in which this rank is
    ``dp_rank`` of ``dp_size``.

    ``token_budget`` is Phi of the whole job, 0 for no budget. The number of a rank's microbatches is a multiple of
    ``multiple_of``. ``replay_layers`` are (layers with experts, experts per token) where routes are replayed.

    Example, alone: ``MinibatchPlanner(budget=BudgetConfig(token_budget=4096), token_budget=4096,
    max_response_length=512, max_staleness=4, dp_rank=0, dp_size=1, group=group, device=torch.device("cpu"))``.
    """

    budget: BudgetConfig
    token_budget: int
    max_response_length: int
    max_staleness: int
    dp_rank: int
    dp_size: int
    group: dist.ProcessGroup
    device: torch.device
    multiple_of: int = 1
    with_values: bool = False
    replay_layers: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: RunConfig, session: Session) -> MinibatchPlanner:
        """The planner of a run."""
        budget, topology, model = config.budget, session.topology, config.model
        replays = config.objective.routing_replay == "R3"
        phi = global_token_budget(budget, topology.dp_size, session.world_size) if budget.token_budget else 0
        return cls(
            budget=budget,
            token_budget=phi,
            max_response_length=config.rollout.max_response_length,
            max_staleness=config.rollout.rollout_max_staleness,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            group=topology.groups.dp,
            device=session.device,
            # the interleaved schedule takes as many microbatches as it has stages, or a multiple
            multiple_of=topology.pp_size if topology.vpp_size > 1 else 1,
            with_values=config.objective.critic,
            replay_layers=(model.num_moe_layers, model.moe_router_topk) if replays else None,
        )

    @property
    def tokens_wanted(self) -> int:
        """Response tokens that fill a step's minibatches even if as much as possible is lost at the cuts between them."""
        n, carries = self.budget.minibatches_per_step, self.budget.budget_overshoot == "carry"
        return n * self.token_budget + (0 if carries else (n - 1) * (self.max_response_length - 1))

    def plan(self, rollouts: Sequence[Rollout], carried: Sequence[Rollout], step: int) -> Plan:
        """Choose this step's tokens from what all ranks have, and build this rank's microbatches.

        Args:
            rollouts: this rank's new ones with their advantages, in any order. Empty responses are left out.
            carried: :attr:`Plan.carried` of the last step.
            step: the run's step. It seeds the order, and it is the version of the policy that is updated now.
        """
        offers = [*carried, *(rollout for rollout in rollouts if rollout.response.length)]
        metas = gather_metadata(offers, self.group, self.device)
        selection = self._select(metas, step)
        grids = [self._pack(metas, picks) for picks in selection.minibatches]
        wanted = wanted_by_rank(selection.minibatches, grids, self.dp_size)
        mine = self._exchange(offers, metas, wanted)
        microbatches = [
            self._build(mine, picks, grid, step, weights_moved=number > 0)
            for number, (picks, grid) in enumerate(zip(selection.minibatches, grids, strict=True))
        ]
        return self._plan_of(selection, metas, grids, microbatches, offers, step)

    def _select(self, metas: Sequence[RolloutMeta], step: int) -> Selection:
        budget = self.budget
        if not self.token_budget:
            return select_all(metas, budget, step)
        return select(
            metas,
            self.token_budget,
            num_minibatches=budget.minibatches_per_step,
            order=budget.budget_order,
            overshoot=budget.budget_overshoot,
            zero_advantage=budget.zero_advantage,
            seed=step,
        )

    def _pack(self, metas: Sequence[RolloutMeta], picks: Sequence[Pick]) -> Grid:
        """Which rank and microbatch each pick goes to, in as many microbatches as it takes."""
        return pack(
            [metas[pick.index].prompt_tokens + pick.stop - 1 for pick in picks],
            capacity=self.budget.microbatch_capacity,
            dp_size=self.dp_size,
            multiple_of=self.multiple_of,
        )

    def _exchange(
        self, own: Sequence[Rollout], metas: Sequence[RolloutMeta], wanted: Sequence[Sequence[int]]
    ) -> Mapping[int, Rollout]:
        return exchange_rollouts(own, metas, wanted, self.dp_rank, self.group, self.device)

    def _build(
        self,
        rollouts: Mapping[int, Rollout],
        picks: Sequence[Pick],
        grid: Grid,
        step: int,
        *,
        weights_moved: bool,
    ) -> list[RLMicrobatch]:
        """This rank's microbatches of one optimizer step."""
        return [
            build_microbatch(
                rollouts,
                [picks[i] for i in items],
                self.budget.microbatch_capacity,
                version=step,
                weights_moved=weights_moved,
                with_values=self.with_values,
                replay_layers=self.replay_layers,
            )
            for items in grid.placements[self.dp_rank]
        ]

    def _plan_of(
        self,
        selection: Selection,
        metas: Sequence[RolloutMeta],
        grids: Sequence[Grid],
        microbatches: list[list[RLMicrobatch]],
        offers: Sequence[Rollout],
        step: int,
    ) -> Plan:
        counts = selection.counts
        # the next step's policy has version step + 1; an interrupted response may already hold older tokens
        oldest = step + 1 - self.max_staleness
        kept = [pick for pick in selection.carried if metas[pick.index].version >= oldest]
        carried_tokens = sum(pick.num_tokens for pick in kept)
        metrics = _packing_metrics(grids)
        if self.token_budget:
            metrics |= counts.metrics() | {"c3po/responses_carried": float(len(kept))}
        if any(selection.minibatches):
            metrics |= selection_stats(metas, selection.minibatches).metrics()
        return Plan(
            grids=microbatches,
            carried=[
                replace(offers[meta.local_index], start=pick.start, carried=meta.carried + 1)
                for pick, meta in ((pick, metas[pick.index]) for pick in kept)
                if meta.rank == self.dp_rank
            ],
            metrics=metrics,
            shortfall=counts.shortfall,
            cut=counts.cut,
            wasted=counts.wasted,
            excluded=counts.excluded,
            carried_tokens=carried_tokens,
            stale=counts.carried - carried_tokens,
        )


def gather_metadata(
    offers: Sequence[Rollout], group: dist.ProcessGroup, device: torch.device
) -> list[RolloutMeta]:
    """Collective over ``group``: the offers of all ranks in rank order, the same list on every rank."""
    own = [
        RolloutMeta(
            uid=rollout.prompt.uid,
            sample=rollout.response.sample,
            length=rollout.response.length,
            arrival=rollout.arrival,
            zero_advantage=not np.any(rollout.advantages_R),
            start=rollout.start,
            carried=rollout.carried,
            prompt_tokens=len(rollout.prompt.tokens),
            score=rollout.reward.score,
            version=int(rollout.response.versions_R.min()),
            rank=group.rank(),
            local_index=index,
        )
        for index, rollout in enumerate(offers)
    ]
    return [RolloutMeta(*values) for of_rank in gather_json(own, group, device) for values in of_rank]


def select_all(metas: Sequence[RolloutMeta], budget: BudgetConfig, seed: int) -> Selection:
    """All responses, divided evenly among minibatches: the recipe without a token budget."""
    exclude = budget.zero_advantage == "exclude"
    used = [i for i, meta in enumerate(metas) if not (exclude and meta.zero_advantage)]
    order = sorted(used, key=lambda i: (metas[i].uid, metas[i].sample))
    if order:
        shuffle = Shuffle(len(order), "minibatches", seed)
        order = [order[i] for i in shuffle.many(np.arange(len(order))).tolist()]
    parts = np.array_split(np.array(order, dtype=np.int64), budget.minibatches_per_step)
    return Selection.of_all(metas, [part.tolist() for part in parts])


def wanted_by_rank(
    minibatches: Sequence[Sequence[Pick]], grids: Sequence[Grid], dp_size: int
) -> list[list[int]]:
    """Indices of the rollouts that each rank trains on, each once, in order of first use."""
    wanted: list[dict[int, None]] = [{} for _ in range(dp_size)]
    for picks, grid in zip(minibatches, grids, strict=True):
        for rank, slots in enumerate(grid.placements):
            wanted[rank].update((picks[i].index, None) for items in slots for i in items)
    return [list(of_rank) for of_rank in wanted]


def _packing_metrics(grids: Sequence[Grid]) -> dict[str, float]:
    """Packing metrics, averaged over minibatches by their microbatches, and the number of microbatches of a
    rank."""
    slots = [len(grid.placements[0]) for grid in grids]
    each = [grid.metrics() for grid in grids]
    means = {
        name: sum(n * metrics[name] for n, metrics in zip(slots, each, strict=True)) / sum(slots)
        for name in each[0]
    }
    return means | {"packing/microbatches": float(sum(slots))}

"""Input and output types of :func:`~megatron_ring.rl.batch.select.select`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_ring.rl.types import Pick, RolloutMeta


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetCounts:
    """Where every token on offer went: sampled = selected + cut + carried + wasted + excluded.

    ``cut`` is what remained of responses that were cut at the budget, ``wasted`` the tokens of responses that
    were not reached, ``excluded`` those of responses that were left out for having no advantage, ``shortfall``
    the tokens that minibatches lack to reach Phi, ``overshoot`` those beyond it. ``carried_in`` is the part of
    ``sampled`` that an earlier step had left.

    Example: responses of 5, 4 and 3 tokens, Phi = 7: ``BudgetCounts(token_budget=7, minibatches=1, sampled=12,
    carried_in=0, selected=7, cut=2, carried=0, wasted=3, excluded=0, shortfall=0, overshoot=0,
    responses_sampled=3, responses_used=2, responses_cut=1, responses_carried=0, responses_excluded=0)``.
    """

    token_budget: int
    minibatches: int
    sampled: int
    carried_in: int
    selected: int
    responses_sampled: int
    responses_used: int
    cut: int = 0
    carried: int = 0
    wasted: int = 0
    excluded: int = 0
    shortfall: int = 0
    overshoot: int = 0
    responses_cut: int = 0
    responses_carried: int = 0
    responses_excluded: int = 0

    def metrics(self) -> dict[str, float]:
        """Every count as ``c3po/...``."""
        return {f"c3po/{f.name}": float(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Psi, one tuple of picks per optimizer step, and what is left for the next rollout step.

    A carried pick names the tokens of a response that no minibatch has taken.

    Example: responses of 5, 4 and 3 tokens, Phi = 7, carry: ``Selection(minibatches=((Pick(0, 0, 5),
    Pick(1, 0, 2)),), carried=(Pick(1, 2, 4), Pick(2, 0, 3)), counts=...)``.
    """

    minibatches: tuple[tuple[Pick, ...], ...]
    carried: tuple[Pick, ...]
    counts: BudgetCounts

    @classmethod
    def of_all(cls, metas: Sequence[RolloutMeta], parts: Sequence[Sequence[int]]) -> Selection:
        """Every unused token of every response of a part, one minibatch per part; the others are excluded. No budget."""
        used = [index for part in parts for index in part]
        sampled, selected = sum(meta.unused for meta in metas), sum(metas[index].unused for index in used)
        counts = BudgetCounts(
            token_budget=0,
            minibatches=len(parts),
            sampled=sampled,
            carried_in=sum(meta.unused for meta in metas if meta.carried),
            selected=selected,
            excluded=sampled - selected,
            responses_sampled=len(metas),
            responses_used=len(used),
            responses_excluded=len(metas) - len(used),
        )
        picks = (tuple(Pick(i, metas[i].start, metas[i].length) for i in part) for part in parts)
        return cls(minibatches=tuple(picks), carried=(), counts=counts)

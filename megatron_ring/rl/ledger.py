"""Where every response token of a step went: one equation, true at every step of every run.

``sampled = trained + cut + carried + wasted + excluded + stale + masked``, in response tokens summed over
data-parallel ranks. ``sampled`` are the tokens generated in this step and those that an earlier one left
(``carried_in``); ``trained`` is counted in the loss masks of the updates that were made, so that the equation
compares what was done with what was planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megatron_ring.rl.batch.planner import Plan
from megatron_ring.rl.collect.collector import StepRollouts
from megatron_ring.rl.learn.objective import loss_tokens
from megatron_ring.rl.rollout_metrics import add_up
from megatron_ring.runtime.session import Session
from megatron_ring.train.engine import StepReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """One step's tokens.

    ``trained``: carried loss in an update that was made. ``cut``: the rest of a response that the budget cut.
    ``carried``: left for the next step: a cut response's rest, responses that were not reached
    (``budget_overshoot="carry"``), and whatever belongs to groups that still wait for a member (C3PO++).
    ``wasted``: not reached, or in an update that was refused. ``excluded``: without advantage
    (``zero_advantage="exclude"``), or of a group that dynamic sampling replaced. ``stale``: waited longer than
    ``rollout_max_staleness``, or of a group that lost its other members to that bound. ``masked``: responses
    cut at the maximum length (``overlong="mask"``).

    Example: 12 tokens generated, 3 left from the last step, Phi = 10: ``Ledger(generated=12, carried_in=3, trained=10,
    cut=2, carried=0, wasted=3, excluded=0, stale=0, masked=0)``.
    """

    generated: int
    carried_in: int
    trained: int
    cut: int
    carried: int
    wasted: int
    excluded: int
    stale: int
    masked: int

    @property
    def sampled(self) -> int:
        return self.generated + self.carried_in

    def check(self, step: int, carried_before: int | None) -> None:
        """Raise AssertionError (a bug, not a user's mistake) if a token is lost or counted twice.

        ``carried_before`` is the last step's ``carried``; None in a run's first step.
        """
        places = (self.trained, self.cut, self.carried, self.wasted, self.excluded, self.stale, self.masked)
        if sum(places) != self.sampled or min(places) < 0:
            raise AssertionError(
                f"step {step}: {self.sampled} tokens sampled, {sum(places)} accounted for: {self}"
            )
        if carried_before is not None and carried_before != self.carried_in:
            raise AssertionError(
                f"step {step}: {carried_before} tokens were left by the step before, {self.carried_in} found: {self}"
            )

    def metrics(self) -> dict[str, float]:
        """Every part as ``c3po/...``."""
        return {f"c3po/{name}": float(count) for name, count in asdict(self).items()} | {
            "c3po/sampled": float(self.sampled)
        }


class Update(NamedTuple):
    """One minibatch's forward and backward pass, and whether its update was made."""

    report: StepReport
    made: bool

    @property
    def tokens(self) -> int:
        """Loss tokens of the minibatch, over the whole job, as counted in its loss masks."""
        return round(loss_tokens(self.report))


def account(
    collected: StepRollouts,
    plan: Plan,
    updates: Sequence[Update],
    *,
    carried: int,
    masked: int,
    session: Session,
) -> Ledger:
    """The ledger of a step. Collective over the data-parallel group.

    Args:
        collected: this rank's rollouts.
        carried: response tokens that this rank had from an earlier step's budget.
        masked: response tokens of this rank's rollouts that overlong=mask took out.
    """
    own = {
        "generated": collected.generated_tokens,
        "carried_in": collected.open_before + carried,
        "open_after": collected.open_after,
        "excluded": collected.excluded_tokens,
        "stale": collected.stale_tokens,
        "masked": masked,
    }
    sums = {name: round(v) for name, v in add_up(own, session.topology.groups.dp, session.device).items()}
    return Ledger(
        generated=sums["generated"],
        carried_in=sums["carried_in"],
        trained=sum(update.tokens for update in updates if update.made),
        cut=plan.cut,
        carried=plan.carried_tokens + sums["open_after"],
        wasted=plan.wasted + sum(update.tokens for update in updates if not update.made),
        excluded=plan.excluded + sums["excluded"],
        stale=plan.stale + sums["stale"],
        masked=sums["masked"],
    )

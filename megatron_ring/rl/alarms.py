"""Warnings during a run: metrics that show a problem outside the policy."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from megatron_ring.data.prompts.same_problem import is_among
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.types import RewardStatus, Rollout
from megatron_ring.runtime.collectives import gather_json
from megatron_ring.runtime.session import Session

log = logging.getLogger("megatron_ring")

DOMINANT = 0.5
"""A status of :data:`REMEDIES` gives a warning above this share of a step's responses."""
AGAIN_AFTER = 100
"""Steps after which the warning is repeated."""
REMEDIES: dict[RewardStatus, str] = {
    "verifier_error": "the verifier fails on them, whatever the answer: look at the verifier and the problems' references",
    "parse_error": "no answer can be read in them: state the answer's format in the prompt (--prompt-suffix)",
}


class Alarms:
    """Logs a warning in the step in which a problem shows."""

    def __init__(self, session: Session, mismatch_alarm: float):
        self._session, self._mismatch_alarm = session, mismatch_alarm
        self._warned: dict[str, int] = {}

    def check(
        self,
        step: int,
        *,
        mismatch: float | None,
        shortfall: int,
        status_shares: Mapping[str, float],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Collective over the data-parallel group.

        Args:
            mismatch: mean difference of log p, None where nothing was compared.
            shortfall: tokens that the step's budgets lacked.
            status_shares: share of the step's responses by status of their verification.
            rollouts: this rank's.
        """
        self._check_verifiers(step, status_shares, rollouts)
        if not self._session.is_log_rank:
            return
        if mismatch is not None and mismatch > self._mismatch_alarm:
            log.warning(
                "step %d: rollout and trainer log p differ by %.4f on average, more than mismatch_alarm=%s",
                step,
                mismatch,
                self._mismatch_alarm,
            )
        if shortfall:
            log.warning(
                "step %d: %d of the token budget were missing; the loss is still divided by all of it",
                step,
                shortfall,
            )

    def _check_verifiers(
        self, step: int, status_shares: Mapping[str, float], rollouts: Sequence[Rollout]
    ) -> None:
        for status, remedy in REMEDIES.items():
            share = status_shares.get(status, 0.0)
            if share <= DOMINANT or step - self._warned.get(status, -AGAIN_AFTER) < AGAIN_AFTER:
                continue
            self._warned[status] = step
            own = Counter((r.prompt.domain, r.reward.detail) for r in rollouts if r.reward.status == status)
            counted = [[*key, number] for key, number in own.items()]
            total: Counter[tuple[str, str]] = Counter()
            for rows in gather_json(counted, self._session.topology.groups.dp, self._session.device):
                for domain, detail, number in rows:
                    total[domain, detail] += number
            (domain, detail), _ = min(total.items(), key=lambda item: (-item[1], item[0]))
            if self._session.is_log_rank:
                log.warning(
                    "step %d: %s in %.0f%% of the responses, most often in domain %s: %s; %s",
                    step,
                    status,
                    100 * share,
                    domain,
                    " ".join(detail.split())[:120] or "no detail",
                    remedy,
                )


def say_held_out(prompts: Iterable[Prompt], held_out: Iterable[Prompt]) -> None:
    """Warn if the checkpoint carries responses to problems that are held out now: they are still trained on."""
    problems = {prompt.asked for prompt in held_out}
    found = {prompt.uid: prompt for prompt in prompts if is_among(prompt.asked, problems)}
    if found:
        text = " ".join(next(iter(found.values())).text.split())
        log.warning(
            "the checkpoint carries responses to problems that --eval-prompt-data holds out now (%d, such as: %.60s); they "
            "are trained on, since they were begun before: start from its weights with --pretrained-checkpoint to avoid it",
            len(found),
            text,
        )

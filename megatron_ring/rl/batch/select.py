"""C3PO's token budget: which sampled tokens an optimizer step trains on (paper, 3.2, eq. 3 and figure 3).

Pure: whole numbers in, whole numbers out; every process that is given the same responses chooses the same.
It runs after rewards and advantages are known and before the backward pass.

Invariants (one test each), counted in response tokens summed over data-parallel ranks:

- a minibatch holds exactly Phi tokens, or all that there are: what is missing is counted as the shortfall,
  and the caller still divides by Phi (``overshoot="response"`` may hold more: up to one response);
- no token is in two minibatches, nor in two steps when its rest is carried over;
- every token on offer is accounted for: sampled = selected + cut + carried + wasted + excluded;
- the choice depends on the seed, never on the order in which responses are listed, and unless it is by
  arrival never on which response finished first;
- what was carried into this step comes before anything new, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from megatron_ring.data.shuffle import Shuffle
from megatron_ring.rl.batch.selection import BudgetCounts, Selection
from megatron_ring.rl.types import Pick, RolloutMeta

Order = Literal["shuffled", "arrival", "groups"]
Overshoot = Literal["token", "response", "carry"]
ZeroAdvantage = Literal["count", "exclude"]


def select(
    metas: Sequence[RolloutMeta],
    token_budget: int,
    *,
    num_minibatches: int = 1,
    order: Order = "shuffled",
    overshoot: Overshoot = "token",
    zero_advantage: ZeroAdvantage = "count",
    seed: int = 0,
) -> Selection:
    """Fill each minibatch with responses, in order, until it holds Phi tokens.

    Args:
        metas: every response on offer, in any order; picks index into it.
        token_budget: Phi, response tokens of one minibatch, summed over the whole job.
        num_minibatches: optimizer steps fed, one after the other, from the same order.
        order: ``shuffled`` by ``seed``; by ``arrival``, which favours short responses; or ``groups``: the
            responses of a prompt side by side, prompts as they were drawn.
        overshoot: what becomes of the response that passes Phi. ``token``: cut, its rest is lost. ``response``:
            kept whole, eq. 3 as printed. ``carry``: cut, and its rest opens the next minibatch; what no
            minibatch reaches is carried to the next step.
        zero_advantage: ``exclude`` leaves responses without advantage out before the budget is filled.
        seed: a new one for every step, the same on every process.

    Raises:
        ValueError: a number is not positive, two responses share a key, or one has no unused token.
    """
    if token_budget < 1 or num_minibatches < 1:
        raise ValueError(f"{token_budget=} and {num_minibatches=} must be positive")
    rows = [(m.length, m.start, m.carried, m.zero_advantage) for m in metas]
    length, start, carried, zero = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    if ((start < 0) | (start >= length)).any():
        raise ValueError("a response has no unused token: leave it out")
    left = length - start
    taken = _in_order(metas, start, carried, order, seed)
    without = zero[taken].astype(bool) & (zero_advantage == "exclude")
    excluded, taken = taken[without], taken[~without]

    parts, cut, at, start_at = _fill(left[taken], token_budget, num_minibatches, overshoot)
    # the last minibatch may have taken the head of the first response that is left
    rest = taken[at:]
    rest_start = start[rest]
    rest_start[:1] += start_at
    rest_tokens = int((length[rest] - rest_start).sum())
    keeps = overshoot == "carry"
    sizes = [int((stop - begin).sum()) for _, begin, stop in parts]
    counts = BudgetCounts(
        token_budget=token_budget,
        minibatches=num_minibatches,
        sampled=int(left.sum()),
        carried_in=int(left[carried > 0].sum()),
        selected=sum(sizes),
        cut=sum(cut),
        carried=rest_tokens if keeps else 0,
        wasted=0 if keeps else rest_tokens,
        excluded=int(left[excluded].sum()),
        shortfall=sum(max(token_budget - size, 0) for size in sizes),
        overshoot=sum(max(size - token_budget, 0) for size in sizes),
        responses_sampled=len(metas),
        responses_used=len(np.unique(np.concatenate([places for places, _, _ in parts]))),
        responses_cut=len(cut),
        responses_carried=len(rest) if keeps else 0,
        responses_excluded=len(excluded),
    )
    minibatches = tuple(
        _picks(taken[places], begin + start[taken[places]], stop + start[taken[places]])
        for places, begin, stop in parts
    )
    kept = _picks(rest, rest_start, length[rest]) if keeps else ()
    return Selection(minibatches=minibatches, carried=kept, counts=counts)


def _in_order(
    metas: Sequence[RolloutMeta], start: np.ndarray, carried: np.ndarray, order: Order, seed: int
) -> np.ndarray:
    """Indices of the responses in the order in which they fill the budget."""
    by_key = sorted(range(len(metas)), key=lambda i: (metas[i].uid, metas[i].sample))
    if any(metas[a][:2] == metas[b][:2] for a, b in pairwise(by_key)):
        raise ValueError("two responses share prompt and sample")
    if order == "arrival":
        by_key.sort(key=lambda i: metas[i].arrival)
    place = np.empty(len(metas), dtype=np.int64)
    place[by_key] = np.arange(len(metas))
    if order == "shuffled" and len(metas):
        place = Shuffle(len(metas), "token budget", seed).many(place)
    # the last key of lexsort is the first to decide; of those carried equally long, the one that was cut goes
    # first
    return np.lexsort((place, start == 0, -carried))


_Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def _fill(
    left: np.ndarray, token_budget: int, num_minibatches: int, overshoot: Overshoot
) -> tuple[list[_Part], list[int], int, int]:
    """Cut the row of responses into minibatches.

    ``left[i]`` are the unused tokens of the i-th response in order.

    Returns:
        per minibatch (places in the row, first token, last token + 1, both counted from the first unused one);
        the tokens lost at each cut; and the first place that was not used up, with its tokens that were.
    """
    ends = np.cumsum(left)
    parts: list[_Part] = []
    cut: list[int] = []
    at = start_at = 0
    for _ in range(num_minibatches):
        before = (int(ends[at - 1]) if at else 0) + start_at
        last = int(np.searchsorted(ends, before + token_budget))
        places = np.arange(at, min(last + 1, len(left)))
        begin, stop = np.zeros_like(places), left[places]
        begin[:1] = start_at
        at, start_at = len(left), 0
        if last < len(left):
            at = last + 1
            rest = int(ends[last]) - before - token_budget
            if rest and overshoot != "response":
                stop[-1] -= rest
                if overshoot == "carry":
                    at, start_at = last, int(left[last]) - rest
                else:
                    cut.append(rest)
        parts.append((places, begin, stop))
    return parts, cut, at, start_at


def _picks(indices: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[Pick, ...]:
    return tuple(map(Pick, indices.tolist(), start.tolist(), stop.tolist()))

"""The invariants of ``megatron_ring.rl.batch``, each on random candidates."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.config.rl import BudgetConfig, global_token_budget
from megatron_ring.errors import ConfigError
from megatron_ring.rl.batch.select import select
from megatron_ring.rl.batch.selection import Selection
from megatron_ring.rl.batch.selection_stats import selection_stats
from megatron_ring.rl.types import Pick, RolloutMeta

ORDERS = st.sampled_from(["shuffled", "arrival", "groups"])
OVERSHOOTS = st.sampled_from(["token", "response", "carry"])


@st.composite
def offers(draw: st.DrawFn, max_size: int = 30) -> list[RolloutMeta]:
    """New and carried candidates, in groups of up to 4, listed in any order."""
    lengths = draw(st.lists(st.integers(1, 40), max_size=max_size))
    arrivals = draw(st.permutations(range(len(lengths))))
    found = []
    for i, length in enumerate(lengths):
        carried = draw(st.integers(0, 2))
        start = draw(st.integers(0, length - 1)) if carried else 0
        found.append(
            RolloutMeta(i // 4, i % 4, length, arrivals[i], draw(st.booleans()), start=start, carried=carried)
        )
    return draw(st.permutations(found))


SETTINGS = st.fixed_dictionaries(
    {
        "token_budget": st.integers(1, 300),
        "num_minibatches": st.integers(1, 4),
        "order": ORDERS,
        "overshoot": OVERSHOOTS,
        "zero_advantage": st.sampled_from(["count", "exclude"]),
        "seed": st.integers(0, 2**40),
    }
)


def tokens_of(candidates: list[RolloutMeta], picks: tuple[Pick, ...]) -> list[tuple[int, int, int]]:
    """Every token as (group, sample, position)."""
    return [(*candidates[p.index][:2], t) for p in picks for t in range(p.start, p.stop)]


def sizes(selection: Selection) -> list[int]:
    return [sum(pick.num_tokens for pick in picks) for picks in selection.minibatches]


@given(candidates=offers(), settings=SETTINGS)
def test_each_minibatch_holds_exactly_phi_or_all_there_is(candidates: list[RolloutMeta], settings: dict):
    phi, exact = settings["token_budget"], settings["overshoot"] != "response"
    found = select(candidates, **settings)
    assert len(found.minibatches) == settings["num_minibatches"]
    for later, size in enumerate(sizes(found), start=1):
        if size < phi:
            # nothing was left for it: not in a later minibatch, not carried, not wasted
            assert not any(sizes(found)[later:]) and not found.carried and not found.counts.wasted
        elif exact:
            assert size == phi
    assert found.counts.shortfall == sum(max(phi - size, 0) for size in sizes(found))
    assert found.counts.overshoot == sum(max(size - phi, 0) for size in sizes(found))


@given(candidates=offers(), settings=SETTINGS)
def test_a_response_kept_whole_passes_phi_by_less_than_itself(candidates: list[RolloutMeta], settings: dict):
    found = select(candidates, **settings | {"overshoot": "response"})
    for picks, size in zip(found.minibatches, sizes(found), strict=True):
        assert all(pick.stop == candidates[pick.index].length for pick in picks)
        assert not picks or size - picks[-1].num_tokens < settings["token_budget"]


@given(candidates=offers(), settings=SETTINGS)
def test_no_token_is_taken_twice_or_before_its_start(candidates: list[RolloutMeta], settings: dict):
    found = select(candidates, **settings)
    picks = (*(pick for minibatch in found.minibatches for pick in minibatch), *found.carried)
    taken = tokens_of(candidates, picks)
    assert len(taken) == len(set(taken))
    for pick in picks:
        candidate = candidates[pick.index]
        assert candidate.start <= pick.start < pick.stop <= candidate.length


@given(candidates=offers(), settings=SETTINGS)
def test_every_token_on_offer_is_accounted_for(candidates: list[RolloutMeta], settings: dict):
    found = select(candidates, **settings)
    counts = found.counts
    assert counts.sampled == sum(c.length - c.start for c in candidates)
    assert counts.carried_in == sum(c.length - c.start for c in candidates if c.carried)
    assert counts.selected == sum(sizes(found))
    assert counts.carried == sum(pick.num_tokens for pick in found.carried)
    excluded = [c for c in candidates if c.zero_advantage and settings["zero_advantage"] == "exclude"]
    assert counts.excluded == sum(c.length - c.start for c in excluded)
    assert counts.responses_excluded == len(excluded)
    used = {pick.index for picks in found.minibatches for pick in picks}
    assert not any(candidates[i] in excluded for i in used | {pick.index for pick in found.carried})
    lost = counts.sampled - counts.selected - counts.carried - counts.excluded
    if settings["overshoot"] == "carry":
        assert counts.cut == counts.wasted == lost == 0
    else:
        unused = [c for i, c in enumerate(candidates) if i not in used and c not in excluded]
        assert counts.wasted == sum(c.length - c.start for c in unused)
        assert counts.cut + counts.wasted == lost and not found.carried
    assert counts.responses_used == len(used)


@given(candidates=offers(), settings=SETTINGS, data=st.data())
def test_the_choice_does_not_depend_on_how_candidates_are_listed(
    candidates: list[RolloutMeta], settings: dict, data: st.DataObject
):
    again = data.draw(st.permutations(candidates))
    one, other = select(candidates, **settings), select(again, **settings)
    for mine, theirs in zip(
        (*one.minibatches, one.carried), (*other.minibatches, other.carried), strict=True
    ):
        assert tokens_of(candidates, mine) == tokens_of(again, theirs)
    assert one.counts == other.counts


@given(candidates=offers(), settings=SETTINGS, order=st.sampled_from(["shuffled", "groups"]), data=st.data())
def test_who_finished_first_decides_only_in_order_of_arrival(
    candidates: list[RolloutMeta], settings: dict, order: str, data: st.DataObject
):
    arrivals = data.draw(st.permutations(range(len(candidates))))
    moved = [c._replace(arrival=a) for c, a in zip(candidates, arrivals, strict=True)]
    assert select(candidates, **settings | {"order": order}) == select(moved, **settings | {"order": order})


@given(candidates=offers(), settings=SETTINGS)
def test_what_was_carried_comes_first_and_oldest_first(candidates: list[RolloutMeta], settings: dict):
    found = select(candidates, **settings)
    row = [candidates[pick.index] for picks in (*found.minibatches, found.carried) for pick in picks]
    assert all(a.carried >= b.carried for a, b in pairwise(row))
    if settings["order"] == "arrival":
        fresh = [c.arrival for c in row if not c.carried]
        assert fresh == sorted(fresh)
    if settings["order"] == "groups":
        fresh_keys = [c[:2] for c in row if not c.carried]
        assert fresh_keys == sorted(fresh_keys)


@given(
    steps=st.lists(offers(max_size=8).map(lambda c: [x._replace(start=0, carried=0) for x in c]), max_size=5),
    settings=SETTINGS,
)
def test_over_steps_a_carried_token_carries_loss_exactly_once(steps: list[list[RolloutMeta]], settings: dict):
    settings = settings | {"overshoot": "carry", "zero_advantage": "count"}
    trained: Counter[tuple[int, int, int]] = Counter()
    offered: set[tuple[int, int, int]] = set()
    left: list[RolloutMeta] = []
    for step, new in enumerate(steps):
        new = [c._replace(uid=100 * step + c.uid) for c in new]
        offered |= {(*c[:2], t) for c in new for t in range(c.length)}
        candidates = left + new
        found = select(candidates, **settings | {"seed": step})
        trained.update(t for picks in found.minibatches for t in tokens_of(candidates, picks))
        left = [
            candidates[pick.index]._replace(start=pick.start, carried=candidates[pick.index].carried + 1)
            for pick in found.carried
        ]
    waiting = {(*c[:2], t) for c in left for t in range(c.start, c.length)}
    assert set(trained.values()) <= {1}
    assert set(trained) | waiting == offered and not set(trained) & waiting


def test_orders_and_overshoots_by_hand():
    row = [RolloutMeta(0, 0, 5, 2), RolloutMeta(0, 1, 4, 0), RolloutMeta(1, 0, 3, 1)]
    cases = {
        ("groups", "token"): (((0, 0, 5), (1, 0, 2)), ()),
        ("groups", "response"): (((0, 0, 5), (1, 0, 4)), ()),
        ("groups", "carry"): (((0, 0, 5), (1, 0, 2)), ((1, 2, 4), (2, 0, 3))),
        ("arrival", "token"): (((1, 0, 4), (2, 0, 3)), ()),
    }
    for (order, overshoot), (minibatch, carried) in cases.items():
        found = select(row, 7, order=order, overshoot=overshoot)
        assert (found.minibatches, found.carried) == ((minibatch,), carried)
    both = select(row, 6, num_minibatches=2, order="groups", overshoot="carry")
    assert both.minibatches == (((0, 0, 5), (1, 0, 1)), ((1, 1, 4), (2, 0, 3)))
    apart = select(row, 6, num_minibatches=2, order="groups")
    assert apart.minibatches == (((0, 0, 5), (1, 0, 1)), ((2, 0, 3),))
    assert (apart.counts.cut, apart.counts.shortfall) == (3, 3)


def test_seeds_shuffle_and_every_response_gets_its_chance():
    row = [RolloutMeta(0, i, 1, i) for i in range(8)]
    used = Counter(pick.index for seed in range(2000) for pick in select(row, 2, seed=seed).minibatches[0])
    # binomial: mean 500, standard deviation 19
    assert len(used) == 8 and all(abs(count - 500) < 100 for count in used.values())


def test_metrics_carry_every_count():
    metrics = select([RolloutMeta(0, 0, 5, 0), RolloutMeta(0, 1, 4, 1)], 10).counts.metrics()
    assert metrics["c3po/selected"] == 9
    assert metrics["c3po/shortfall"] == 1 and metrics["c3po/responses_used"] == 2
    assert all(name.startswith("c3po/") for name in metrics)


def test_the_scope_says_what_the_budget_counts():
    budgets = {
        scope: global_token_budget(BudgetConfig(token_budget=10, token_budget_scope=scope), 4, 16)
        for scope in ("global", "per_dp_rank", "per_gpu")
    }
    assert budgets == {"global": 10, "per_dp_rank": 40, "per_gpu": 160}
    # the paper's 512 x 16 responses of 12.8k tokens
    assert global_token_budget(BudgetConfig(token_budget_scope="per_gpu"), 64, 256) == 512 * 16 * 12800
    with pytest.raises(ConfigError, match=r"^token_budget=0 must be positive; .*409600"):
        global_token_budget(BudgetConfig(token_budget=0), 1, 1)


def test_an_order_of_arrival_is_seen_to_favour_short_responses():
    lengths = list(range(1, 101))
    row = [RolloutMeta(i, 0, length, arrival=i) for i, length in enumerate(lengths)]
    row = [meta._replace(score=float(meta.length <= 50)) for meta in row]
    found = selection_stats(row, select(row, 1275, order="arrival").minibatches)
    assert found.sampled_length == pytest.approx((50.5, 10.9, 50.5, 90.1))
    assert found.selected_length == pytest.approx((25.5, 5.9, 25.5, 45.1))
    assert (found.sampled_reward, found.selected_reward) == (0.5, 1.0)
    assert found.metrics()["c3po/selected_length_p50"] == 25.5
    whole = selection_stats(row, select(row, 5050).minibatches)
    assert whole.selected_length == whole.sampled_length


@pytest.mark.parametrize(
    ("row", "phi", "message"),
    [
        ([RolloutMeta(0, 0, 5, 0), RolloutMeta(0, 0, 4, 1)], 7, "share prompt and sample"),
        ([RolloutMeta(0, 0, 5, 0, start=5)], 7, "no unused token"),
        ([RolloutMeta(0, 0, 0, 0)], 7, "no unused token"),
        ([], 0, "must be positive"),
    ],
)
def test_impossible_candidates_are_refused(row: list[RolloutMeta], phi: int, message: str):
    with pytest.raises(ValueError, match=message):
        select(row, phi)


def test_no_candidates_give_empty_minibatches():
    found = select([], 7, num_minibatches=2)
    assert found.minibatches == ((), ()) and found.counts.shortfall == 14

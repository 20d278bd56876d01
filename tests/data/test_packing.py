"""The invariants of ``megatron_ring.data.packing``, each on random sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.bins import fill_bins
from megatron_ring.data.packing import Grid, _level, grid_shape, pack
from megatron_ring.errors import ConfigError

CAPACITY = 100
TOKENS = st.lists(st.integers(1, CAPACITY), max_size=60)
SHAPE = st.fixed_dictionaries(
    {"capacity": st.just(CAPACITY), "dp_size": st.integers(1, 6), "num_microbatches": st.integers(1, 8)}
)


def lognormal(seed: int, count: int, mean: float, longest: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(np.log(mean) - 0.45**2 / 2, 0.45, count)).astype(int).clip(1, longest)


def papers_grid(num_microbatches: int = 54) -> Grid:
    tokens = lognormal(7, 8192, 12_800, 24_576) + np.random.default_rng(8).integers(80, 401, 8192)
    return pack(tokens.tolist(), capacity=32_768, dp_size=64, num_microbatches=num_microbatches)


@given(tokens=TOKENS, shape=SHAPE)
def test_every_rank_has_the_same_number_of_microbatches(tokens: list[int], shape: dict):
    placements = pack(tokens, **shape).placements
    assert [len(rank) for rank in placements] == [shape["num_microbatches"]] * shape["dp_size"]


@given(tokens=TOKENS, shape=SHAPE)
def test_no_microbatch_holds_more_than_its_capacity(tokens: list[int], shape: dict):
    bins = [bin for rank in pack(tokens, **shape).placements for bin in rank]
    assert all(sum(tokens[i] for i in bin) <= CAPACITY for bin in bins)


@given(tokens=TOKENS, shape=SHAPE)
def test_every_item_lies_in_one_microbatch_or_is_dropped(tokens: list[int], shape: dict):
    grid = pack(tokens, **shape)
    placed = [i for rank in grid.placements for bin in rank for i in bin]
    assert sorted([*placed, *grid.dropped]) == list(range(len(tokens)))


@given(tokens=TOKENS, shape=SHAPE)
def test_nothing_is_dropped_that_fill_bins_can_fit(tokens: list[int], shape: dict):
    if len(fill_bins(tokens, CAPACITY)) <= shape["dp_size"] * shape["num_microbatches"]:
        assert not pack(tokens, **shape).dropped


@given(tokens=st.lists(st.integers(1, CAPACITY), min_size=10, max_size=60), slots=st.integers(1, 4))
def test_what_is_dropped_fits_into_no_gap(tokens: list[int], slots: int):
    grid = pack(tokens, capacity=CAPACITY, dp_size=1, num_microbatches=slots)
    free = [CAPACITY - sum(tokens[i] for i in bin) for bin in grid.placements[0]]
    assert all(tokens[i] > max(free) for i in grid.dropped)


@given(tokens=TOKENS, shape=SHAPE)
def test_the_same_items_give_the_same_grid(tokens: list[int], shape: dict):
    assert pack(tokens, **shape) == pack(list(tokens), **shape)


@given(tokens=TOKENS, shape=SHAPE)
def test_metrics_say_what_the_grid_holds(tokens: list[int], shape: dict):
    grid = pack(tokens, **shape)
    metrics, kept = grid.metrics(), sum(tokens) - sum(tokens[i] for i in grid.dropped)
    slots = CAPACITY * shape["dp_size"] * shape["num_microbatches"]
    assert metrics["packing/fill"] == kept / slots
    assert metrics["packing/dropped_tokens"] == sum(tokens) - kept
    assert sum(grid.tokens_per_rank()) == kept
    assert sum(grid.attention_per_rank()) == sum(t * t for i, t in enumerate(tokens) if i not in grid.dropped)


def test_too_many_items_drop_little_more_than_must_go():
    tokens = lognormal(1, 400, 12_800, 24_576)
    grid = pack(tokens.tolist(), capacity=32_768, dp_size=4, num_microbatches=30)
    must_go = int(tokens.sum()) - 120 * 32_768
    assert must_go > 0 and grid.metrics()["packing/fill"] > 0.98
    assert grid.metrics()["packing/dropped_tokens"] < must_go + 0.02 * 120 * 32_768


def test_ranks_are_even_in_attention_and_tokens_at_the_papers_scale():
    metrics = papers_grid().metrics()
    assert metrics["packing/bin_fill"] >= 0.993
    assert metrics["packing/attention_imbalance"] < 1.005
    assert metrics["packing/tokens_imbalance"] < 1.01
    assert metrics["packing/dropped_tokens"] == 0


def test_ranks_of_few_microbatches_trade_until_they_are_even():
    grid = pack(lognormal(3, 1000, 12_800, 24_576).tolist(), capacity=32_768, dp_size=64, num_microbatches=8)
    assert grid.metrics()["packing/attention_imbalance"] < 1.01


def test_an_uneven_round_stays_whole_where_its_items_do_not_fit_when_spread():
    triples = [(26, 30, 44), (44, 39, 17), (43, 41, 16), (33, 29, 38), (29, 32, 39), (43, 45, 12)]
    sizes = [size for bin in (*triples, (38, 45, 17), (35, 30, 35), (59, 41)) for size in bin]
    bins = [[3 * b, 3 * b + 1, 3 * b + 2] for b in range(8)] + [[24, 25]]
    level = _level(sizes, bins, 100, 10)
    assert len(level) == 10 and max(sum(sizes[i] for i in bin) for bin in level) == 100
    assert sorted(i for bin in level for i in bin) == list(range(26))


def test_heavy_microbatches_are_spread_over_time_and_fall_together_on_all_ranks():
    grid = papers_grid()
    cost_RM = np.array(
        [[sum(grid.num_tokens[i] ** 2 for i in bin) for bin in rank] for rank in grid.placements], dtype=float
    )
    mean_M = cost_RM.mean(0)
    # the one round that is spread over ranks differs by an item, and the empty ones not at all
    full_M = np.array([all(len(rank[m]) > 1 for rank in grid.placements) for m in range(54)])
    assert full_M.sum() >= 48
    assert (cost_RM.max(0) < 1.3 * mean_M)[full_M].all() and cost_RM.std(0)[
        full_M
    ].mean() < 0.03 * mean_M.mean()
    # any 8 in a row cost about as much as any other
    windows = np.convolve(mean_M, np.ones(8), "valid") / 8
    assert windows.max() < 1.25 * mean_M.mean() and windows.min() > 0.75 * mean_M.mean()
    assert np.sort(mean_M)[-8:].mean() > 1.4 * mean_M.mean()


def test_few_items_are_spread_over_ranks():
    grid = pack([4, 3, 2, 1], capacity=10, dp_size=2, num_microbatches=2)
    assert sorted(grid.tokens_per_rank()) == [5, 5]


def test_nothing_fills_the_grid_with_empty_microbatches():
    grid = pack([], capacity=10, dp_size=2, num_microbatches=3)
    assert grid.placements == (((), (), ()),) * 2 and grid.metrics()["packing/fill"] == 0


SETTINGS = {
    "token_budget": 104_857_600,
    "longest_prompt": 400,
    "longest_response": 24_176,
    "capacity": 32_768,
    "dp_size": 64,
    "reserve": 0.05,
}


def test_the_number_of_microbatches_follows_from_the_budget():
    # 104857600 * (1 + 400 / 12088) * 1.05 / (32768 * 64) = 54.2
    assert grid_shape(**SETTINGS) == 55
    assert grid_shape(**SETTINGS, multiple_of=4) == 56
    assert grid_shape(**SETTINGS, typical_response=400) == 105
    assert grid_shape(**SETTINGS | {"token_budget": 1}, multiple_of=4) == 4
    # no two typical sequences of 22400 share a microbatch: x = 1.46, fit = 0.73, 153.1 microbatches
    alone = SETTINGS | {"longest_prompt": 12_400, "longest_response": 20_000, "reserve": 0.0}
    assert grid_shape(**alone) == 154


@pytest.mark.parametrize("dp_size", [2, 16])
@pytest.mark.parametrize(
    ("prompt", "response", "capacity"),
    # two and more typical sequences to a microbatch, about two, fewer
    [(400, 24_176, 32_768), (2048, 22_528, 65_536), (2048, 22_528, 27_000), (2048, 22_528, 24_576)],
)
def test_responses_of_typical_length_with_the_longest_prompts_fit(
    prompt: int, response: int, capacity: int, dp_size: int
):
    phi = 16 * dp_size * capacity
    shape = {"capacity": capacity, "dp_size": dp_size}
    num_microbatches = grid_shape(
        token_budget=phi, longest_prompt=prompt, longest_response=response, reserve=0.05, **shape
    )
    lengths = lognormal(dp_size, 4 * phi // response, response / 2, response)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), phi))]
    grid = pack((lengths + prompt).tolist(), num_microbatches=num_microbatches, **shape)
    assert not grid.dropped and grid.metrics()["packing/fill"] > 0.8


def test_a_capacity_below_the_longest_sequence_is_refused():
    with pytest.raises(ConfigError) as caught:
        grid_shape(**SETTINGS | {"capacity": 24_000})
    assert str(caught.value) == (
        "microbatch_capacity=24000 is less than the longest prompt and response, 400 + 24176 tokens; "
        "set it to 24576 or more"
    )
    with pytest.raises(ValueError, match="must be positive"):
        pack([1], capacity=10, dp_size=0, num_microbatches=1)

"""The invariants of ``megatron_ring.data.batch.packing``, each on random sequences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.data.batch.bins import fill_bins
from megatron_ring.data.batch.packing import Grid, _level, pack

CAPACITY = 100
TOKENS = st.lists(st.integers(1, CAPACITY), max_size=60)
SHAPE = st.fixed_dictionaries(
    {"capacity": st.just(CAPACITY), "dp_size": st.integers(1, 6), "multiple_of": st.integers(1, 4)}
)


def lognormal(seed: int, count: int, mean: float, longest: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(np.log(mean) - 0.45**2 / 2, 0.45, count)).astype(int).clip(1, longest)


def papers_grid(**shape) -> Grid:
    tokens = lognormal(7, 8192, 12_800, 24_576) + np.random.default_rng(8).integers(80, 401, 8192)
    return pack(tokens.tolist(), **{"capacity": 32_768, "dp_size": 64, **shape})


@given(tokens=TOKENS, shape=SHAPE)
def test_every_item_lies_in_exactly_one_microbatch(tokens: list[int], shape: dict):
    placed = [i for rank in pack(tokens, **shape).placements for bin in rank for i in bin]
    assert sorted(placed) == list(range(len(tokens)))


@given(tokens=TOKENS, shape=SHAPE)
def test_every_rank_has_the_same_number_of_microbatches_and_no_more_than_needed(
    tokens: list[int], shape: dict
):
    dp_size, multiple_of = shape["dp_size"], shape["multiple_of"]
    rounds = max(-(-len(fill_bins(tokens, CAPACITY)) // dp_size), 1)
    expected = -(-rounds // multiple_of) * multiple_of
    assert [len(rank) for rank in pack(tokens, **shape).placements] == [expected] * dp_size


@given(tokens=TOKENS, shape=SHAPE)
def test_no_microbatch_holds_more_than_its_capacity(tokens: list[int], shape: dict):
    bins = [bin for rank in pack(tokens, **shape).placements for bin in rank]
    assert all(sum(tokens[i] for i in bin) <= CAPACITY for bin in bins)


@given(tokens=TOKENS, shape=SHAPE)
def test_the_same_items_give_the_same_grid(tokens: list[int], shape: dict):
    assert pack(tokens, **shape) == pack(list(tokens), **shape)


@given(tokens=TOKENS, shape=SHAPE)
def test_metrics_say_what_the_grid_holds(tokens: list[int], shape: dict):
    grid = pack(tokens, **shape)
    slots = CAPACITY * shape["dp_size"] * len(grid.placements[0])
    assert grid.metrics()["packing/fill"] == sum(tokens) / slots
    assert sum(grid.tokens_per_rank()) == sum(tokens)
    assert sum(grid.attention_per_rank()) == sum(t * t for t in tokens)


def test_the_example_of_the_docstring():
    grid = pack([6, 5, 4, 3, 2, 9], capacity=10, dp_size=2)
    assert grid.placements == (((5,), (3, 4)), ((0, 2), (1,))) and grid.num_bins == 3
    assert grid.tokens_per_rank() == [14, 15]


@pytest.mark.parametrize(("multiple_of", "fill"), [(1, 0.97), (4, 0.95)])
def test_at_the_papers_scale_little_is_padding(multiple_of: int, fill: float):
    grid = papers_grid(multiple_of=multiple_of)
    assert grid.metrics()["packing/fill"] > fill and len(grid.placements[0]) % multiple_of == 0


def test_ranks_are_even_in_attention_and_tokens_at_the_papers_scale():
    metrics = papers_grid().metrics()
    assert metrics["packing/bin_fill"] >= 0.993
    assert metrics["packing/attention_imbalance"] < 1.005
    assert metrics["packing/tokens_imbalance"] < 1.01


def test_ranks_of_few_microbatches_trade_until_they_are_even():
    grid = pack(lognormal(3, 1000, 12_800, 24_576).tolist(), capacity=32_768, dp_size=64)
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
    full_M = np.array([all(len(rank[m]) > 1 for rank in grid.placements) for m in range(cost_RM.shape[1])])
    assert full_M.sum() >= 48
    assert (cost_RM.max(0) < 1.3 * mean_M)[full_M].all() and cost_RM.std(0)[
        full_M
    ].mean() < 0.03 * mean_M.mean()
    # any 8 in a row cost about as much as any other
    windows = np.convolve(mean_M, np.ones(8), "valid") / 8
    assert windows.max() < 1.25 * mean_M.mean() and windows.min() > 0.75 * mean_M.mean()
    assert np.sort(mean_M)[-8:].mean() > 1.35 * mean_M.mean()


def test_few_items_are_spread_over_ranks():
    grid = pack([4, 3, 2, 1], capacity=10, dp_size=2)
    assert sorted(grid.tokens_per_rank()) == [5, 5]


def test_nothing_is_one_empty_microbatch_for_each_rank():
    grid = pack([], capacity=10, dp_size=2, multiple_of=3)
    assert grid.placements == (((), (), ()),) * 2 and grid.metrics()["packing/fill"] == 0


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        pack([1], capacity=10, dp_size=0)
    with pytest.raises(ValueError, match="must be 1 to 10"):
        pack([11], capacity=10, dp_size=1)

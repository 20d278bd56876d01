"""Ranks, stages and layers as plain arithmetic."""

from collections import Counter

import pytest

from megatron_ring.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_ring.config.layout import data_parallel_size, num_microbatches, place, stage_layers


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "etp", "world"),
    [(1, 1, 1, 1, 1), (2, 2, 2, 1, 8), (2, 1, 2, 2, 8), (1, 2, 4, 1, 8), (4, 1, 1, 1, 8)],
)
def test_every_place_is_taken_once(tp: int, pp: int, ep: int, etp: int, world: int):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    places = [place(parallel, world, rank) for rank in range(world)]
    dense = Counter((p.tp, p.dp, p.pp) for p in places)
    experts = Counter((p.etp, p.ep, p.edp, p.pp) for p in places)
    assert set(dense.values()) == set(experts.values()) == {1}
    assert max(p.dp for p in places) + 1 == data_parallel_size(parallel, world) == world // (tp * pp)
    assert max(p.edp for p in places) + 1 == world // (etp * ep * pp)


def test_tensor_parallel_ranks_are_neighbours_and_stages_far_apart():
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2
    )
    last = place(parallel, 8, 5)
    assert (last.tp, last.dp, last.pp, last.ep, last.edp) == (1, 0, 1, 1, 0)


def test_stages_share_the_layers():
    model = ModelConfig(num_layers=8)
    plain = ParallelConfig(pipeline_model_parallel_size=2)
    assert [stage_layers(model, plain, s) for s in range(2)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    interleaved = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2)
    assert [stage_layers(model, interleaved, s) for s in range(2)] == [(0, 1, 4, 5), (2, 3, 6, 7)]


def test_microbatches_are_what_the_batch_leaves_per_rank():
    config = RunConfig(train=TrainConfig(micro_batch_size=2, global_batch_size=32))
    assert num_microbatches(config, 4) == 4


@pytest.mark.parametrize(("tp", "pp", "ep", "etp"), [(2, 2, 2, 1), (1, 2, 2, 2), (4, 1, 2, 2), (2, 2, 1, 2)])
def test_places_are_megatrons(tp: int, pp: int, ep: int, etp: int):
    from megatron.core.parallel_state import RankGenerator

    world = 8
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=world // (tp * pp), pp=pp, cp=1, order=order)
    experts = RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order=order)
    places = [place(parallel, world, rank) for rank in range(world)]
    axes = [(dense, name, name) for name in ("tp", "dp", "pp")]
    axes += [(experts, "tp", "etp"), (experts, "ep", "ep"), (experts, "dp", "edp")]
    for generator, group, own in axes:
        for ranks in generator.get_ranks(group):
            assert [getattr(places[rank], own) for rank in ranks] == list(range(len(ranks)))

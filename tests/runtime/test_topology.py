"""The process groups of Megatron are where :mod:`megatron_ring.config.layout` says they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_ring.config.layout import data_parallel_size, place
from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.runtime.session import open_session
from megatron_ring.runtime.topology import Topology, distributed_timeout


def layout(tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1) -> ParallelConfig:
    return ParallelConfig(
        bf16=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )


def open_as(parallel: ParallelConfig, world_size: int, rank: int, monkeypatch) -> dict[str, int]:
    """What Megatron makes of this rank, with a process group that no other process has joined."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ring.runtime import session as sessions

    def fake(_parallel: ParallelConfig) -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    monkeypatch.setattr(sessions, "_init_process_group", fake)
    with open_session(parallel, seed=1) as session:
        topology = session.topology
        groups = topology.groups
        return {
            "rank": session.rank,
            "tp": topology.tp_rank,
            "dp": topology.dp_rank,
            "pp": topology.pp_rank,
            "etp": groups.expt_tp.rank(),
            "ep": topology.ep_rank,
            "edp": groups.expt_dp.rank(),
            "dp_size": topology.dp_size,
            "exchange": groups.tp_ep.rank(),
        }


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        (layout(tp=2, pp=2, ep=2), 8),
        (layout(tp=2, pp=2, ep=2, etp=2), 8),
        (layout(tp=2, etp=1, ep=4), 8),
        (layout(pp=4, ep=2), 16),
        (layout(tp=4, etp=2, ep=2), 16),
    ],
    ids=str,
)
def test_every_rank_is_where_the_arithmetic_puts_it(parallel, world_size, monkeypatch):
    for rank in range(world_size):
        seen = open_as(parallel, world_size, rank, monkeypatch)
        expected = place(parallel, world_size, rank)
        for name in ("rank", "tp", "dp", "pp", "etp", "ep", "edp"):
            assert seen[name] == getattr(expected, name), (rank, name)
        assert seen["dp_size"] == data_parallel_size(parallel, world_size)
        # the experts' exchange sends to rank ep * etp_size + etp
        assert seen["exchange"] == expected.ep * parallel.expert_tensor_parallel_size + expected.etp


def test_first_and_last_stage():
    words = dict(tp_size=1, tp_rank=0, ep_size=1, ep_rank=0, etp_size=1, dp_size=1, dp_rank=0, vpp_size=1)
    ends = [
        Topology(pp_size=3, pp_rank=rank, groups=SimpleNamespace(), **words)  # type: ignore[arg-type]
        for rank in range(3)
    ]
    assert [(t.is_first_stage, t.is_last_stage) for t in ends] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_the_timeout_is_the_configs():
    assert distributed_timeout(ParallelConfig(distributed_timeout_minutes=7)).total_seconds() == 420

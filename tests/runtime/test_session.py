"""A session opens what it needs and leaves the process as it found it."""

from __future__ import annotations

import itertools
import os
import signal
import socket
from datetime import timedelta

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer as buffers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.runtime import device
from megatron_ring.runtime import session as session_module
from megatron_ring.runtime.ranks import rank_from_env, world_size_from_env
from megatron_ring.runtime.session import open_session

PLAIN = ParallelConfig(bf16=False)


@pytest.mark.parametrize("fails", [False, True], ids=["leaving", "an-error"])
def test_a_session_closes_what_it_opened(fails):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    load = DistributedOptimizer._set_main_param_and_optimizer_states
    current_device = torch.cuda.current_device
    try:
        with open_session(PLAIN, seed=1) as session:
            assert torch.distributed.is_initialized() and parallel_state.model_parallel_is_initialized()
            assert (session.rank, session.world_size, session.is_save_rank, session.is_log_rank) == (
                0,
                1,
                True,
                True,
            )
            assert session.device == device.device()
            assert DistributedOptimizer._set_main_param_and_optimizer_states is not load
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert not torch.distributed.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert DistributedOptimizer._set_main_param_and_optimizer_states is load
    assert torch.cuda.current_device is current_device


def test_sessions_follow_one_another_and_are_seeded_alike():
    drawn = []
    for seed in (1, 1, 2):
        with open_session(PLAIN, seed=seed):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_to_leave_and_a_second_one_has_its_usual_effect(number):
    usual = []
    before = signal.signal(number, lambda *_: usual.append(number))
    try:
        with open_session(PLAIN, seed=1) as session:
            assert not session.exit_wanted()
            os.kill(os.getpid(), number)
            assert session.exit_request.signal_number == number
            assert session.exit_wanted() and usual == []
            os.kill(os.getpid(), number)
            assert usual == [number]
    finally:
        signal.signal(number, before)


def test_a_reason_of_ones_own_is_a_wish_to_leave_too():
    with open_session(PLAIN, seed=1) as session:
        assert session.exit_wanted(also=True) and not session.exit_wanted(also=False)


def meet_on_a_port_of_somebody_elses(monkeypatch, rank: str, *, still_there: bool) -> str:
    """The line that rank ``rank`` of 2 ends with; ``{port}`` in place of the port."""
    monkeypatch.setattr(session_module, "distributed_timeout", lambda _: timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        if not still_there:
            taken.close()
        with pytest.raises(ConfigError) as caught, open_session(PLAIN, seed=1):
            pass
    assert not torch.distributed.is_initialized()
    return str(caught.value).replace(port, "{port}")


def test_a_port_that_is_in_use_is_one_line(monkeypatch):
    line = meet_on_a_port_of_somebody_elses(monkeypatch, "0", still_there=True)
    assert line.startswith("MASTER_PORT={port} is in use on rank 0's node, perhaps by another run; export ")


def test_an_address_where_nobody_answers_is_one_line(monkeypatch):
    line = meet_on_a_port_of_somebody_elses(monkeypatch, "1", still_there=False)
    assert line.startswith("MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 0 is not reached there (")


@pytest.mark.parametrize(("rank", "size"), [("1", "2"), ("2", "3")])
def test_a_process_that_meets_another_run_leaves_it_alone(monkeypatch, rank, size):
    """It waited for its own rank 0, and its end ended the other run."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    theirs = torch.distributed.PrefixStore("session0", store)
    for n in range(2):
        session_module._take_place(theirs, n, 2)
    monkeypatch.setattr(session_module, "distributed_timeout", lambda _: timedelta(seconds=5))
    monkeypatch.setattr(session_module, "_sessions", itertools.count())
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in (address | {"RANK": rank, "WORLD_SIZE": size}).items():
        monkeypatch.setenv(name, value)
    line = f"^MASTER_PORT={store.port} is that of another run of 2 processes; export another MASTER_PORT$"
    with pytest.raises(ConfigError, match=line) as caught, open_session(PLAIN, seed=1):
        pass
    assert caught.value.speaks and not torch.distributed.is_initialized()


def test_a_world_without_an_address_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert (world_size_from_env(), rank_from_env()) == (2, 0)
    with (
        pytest.raises(ConfigError, match="WORLD_SIZE=2 but RANK, MASTER_ADDR, MASTER_PORT not set; start"),
        open_session(PLAIN, seed=1),
    ):
        pass
    assert not torch.distributed.is_initialized()


def test_an_untested_megatron_is_refused(monkeypatch):
    monkeypatch.setattr("megatron.core.__version__", "0.99.0")
    with (
        pytest.raises(ConfigError, match=r"megatron-core 0\.99\.0 .*install megatron-core=="),
        open_session(PLAIN, seed=1),
    ):
        pass
    assert not torch.distributed.is_initialized()


def test_a_group_of_one_gathers_and_scatters_without_a_collective(monkeypatch):
    """A collective's thread of its own would slow every later parallel operation of the process down."""
    asked = []
    names = ("dist_all_gather_func", "dist_reduce_scatter_func")
    for name in names:
        monkeypatch.setattr(buffers, name, lambda *_, **__: asked.append(1))
    before = buffers.dist_all_gather_func
    with open_session(PLAIN, seed=1):
        buffer, other = torch.arange(7.0), torch.empty(7)
        for collective in (getattr(buffers, name) for name in names):
            collective(buffer, buffer[:], group=torch.distributed.group.WORLD, async_op=True)
            assert torch.equal(buffer, torch.arange(7.0))
            collective(other.zero_(), buffer, group=torch.distributed.group.WORLD)
            assert torch.equal(other, buffer)
        assert not asked
    assert buffers.dist_all_gather_func is before


def test_a_buffer_that_grew_while_sampling_can_be_written_in_training():
    """Megatron's all-gather of sequence parallelism reuses the largest buffer that was ever asked for."""
    with open_session(PLAIN, seed=1):
        memory = parallel_state.get_global_memory_buffer()
        with torch.inference_mode():
            memory.get_tensor([6], torch.float32, "mpu").zero_()
        weight = torch.ones(6, requires_grad=True)
        buffer = memory.get_tensor([2, 3], torch.float32, "mpu")
        buffer.copy_(torch.arange(6.0).view(2, 3))
        (buffer.view(6) * weight).sum().backward()
        assert torch.equal(weight.grad, torch.arange(6.0))
        with torch.inference_mode():
            assert memory.get_tensor([4], torch.float32, "mpu").fill_(1).sum() == 4


def test_one_process_opens_no_port_to_others():
    with open_session(PLAIN, seed=1):
        store = torch.distributed.distributed_c10d._get_default_store()
        while isinstance(store, torch.distributed.PrefixStore):
            store = store.underlying_store
        assert isinstance(store, torch.distributed.HashStore)


def test_a_rank_alone_gives_its_own_numbers_and_asks_no_device(monkeypatch: pytest.MonkeyPatch):
    with open_session(PLAIN, seed=1) as session:
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: pytest.fail("a collective"))
        assert session.summed(3, 0.5) == [3, 0.5] and session.largest(7, session.topology.groups.dp) == 7
        assert session.exit_wanted(also=True) and not session.exit_wanted()

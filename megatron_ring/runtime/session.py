"""A session: one process's part of a run, with process group, device, layout, seeds and signals."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup, Store

from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.errors import ConfigError
from megatron_ring.runtime import device
from megatron_ring.runtime.bf16_matmul import bf16_products
from megatron_ring.runtime.deterministic import deterministic_operations
from megatron_ring.runtime.peers import Watch
from megatron_ring.runtime.ranks import local_rank_from_env, master_port_from_env, world_size_from_env
from megatron_ring.runtime.topology import Topology, close_topology, distributed_timeout, open_topology

log = logging.getLogger("megatron_ring")

_sessions = itertools.count()


def is_log_rank(rank: int, world_size: int) -> bool:
    """Is this the one rank that prints and writes metrics? It is the last, which has the loss."""
    return rank == world_size - 1


@dataclass
class ExitRequest:
    """Set by SIGTERM or SIGUSR1; the loop saves and leaves after the step that sees it on any rank."""

    signal_number: int | None = None

    @property
    def wanted(self) -> bool:
        return self.signal_number is not None


@dataclass
class Session:
    """What an open run gives its stage.

    Example: ``Session(rank=0, world_size=1, device=device("cpu"), topology=Topology(tp_size=1, ...))``
    """

    rank: int
    world_size: int
    device: torch.device
    topology: Topology
    exit_request: ExitRequest = field(default_factory=ExitRequest)

    @property
    def is_save_rank(self) -> bool:
        """Is this the one rank that commits and prunes checkpoints? It is rank 0."""
        return self.rank == 0

    @property
    def is_log_rank(self) -> bool:
        """Is this the one rank that prints and writes metrics? It is the last, which has the loss."""
        return is_log_rank(self.rank, self.world_size)

    def exit_wanted(self, also: bool = False) -> bool:
        """Collective over the world: has any rank received a signal to save and leave, or passed ``also``?"""
        return bool(self.largest(self.exit_request.wanted or also))

    def summed(self, *numbers: float, group: ProcessGroup | None = None) -> list[float]:
        """Each number's sum over the ranks of ``group`` (None: all), in fp64. Collective if there are several."""
        return self._combined(numbers, torch.distributed.ReduceOp.SUM, group)

    def largest(self, number: float, group: ProcessGroup | None = None) -> float:
        """The maximum over the ranks of ``group`` (None: all). Collective if there are several."""
        return self._combined((number,), torch.distributed.ReduceOp.MAX, group)[0]

    def _combined(
        self, numbers: Sequence[float], op: torch.distributed.ReduceOp.RedOpType, group: ProcessGroup | None
    ) -> list[float]:
        # no tensor, so that one rank alone never waits for the device
        if torch.distributed.get_world_size(group) == 1:
            return list(numbers)
        combined = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(combined, op=op, group=group)
        return combined.tolist()


def _init_process_group(parallel: ParallelConfig) -> Watch | None:
    """Open the process group, and a watch over its other ranks if there are any."""
    world_size = world_size_from_env()
    timeout = distributed_timeout(parallel)
    backend = device.collective_backend()
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        # a store in this process's memory opens no port. NCCL accepts it, too (SkyRL's and TensorRT-LLM's tests)
        alone = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size} but {', '.join(missing)} not set; start the run with ring launch, torchrun or srun"
        )
    if os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1"):
        # otherwise gloo resolves the host name, which often fails on virtual machines
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, rank, world_size = _meet(timeout)
    # the store outlives a session: a second session must not read the addresses of the first
    prefixed = torch.distributed.PrefixStore(f"session{next(_sessions)}", store)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        # torchrun's agents have met already, and a restart finds the places of the ranks before it
        _take_place(prefixed, rank, world_size)
    with contextlib.ExitStack() as if_it_fails:
        # opened before the first collective, closed after the last
        watch = Watch.open(prefixed, rank, world_size) if world_size > 1 else None
        if watch is not None:
            if_it_fails.push(watch)
        torch.distributed.init_process_group(
            backend, store=prefixed, rank=rank, world_size=world_size, timeout=timeout
        )
        if_it_fails.pop_all()
    return watch


def _meet(timeout: timedelta) -> tuple[Any, int, int]:
    """The store of the job's processes, this one's rank, and how many there are.

    Raises:
        ConfigError: rank 0 cannot listen at ``MASTER_ADDR`` and ``MASTER_PORT``, or is not found there.
    """
    port = master_port_from_env()
    try:
        return next(torch.distributed.rendezvous("env://", timeout=timeout))
    except torch.distributed.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise ConfigError(
                f"MASTER_PORT={port} is in use on rank 0's node, perhaps by another run; export another MASTER_PORT"
            ) from None
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={port}: rank 0 is not reached there ({reason}); "
            "export the address and a free port of its node"
        ) from None


def _take_place(store: Store, rank: int, world_size: int) -> None:
    """Raise ConfigError where ``store`` is that of another run: its rank 0 listened at the same port before ours."""
    mine = f"{rank} of {world_size} (process {os.getpid()} on {socket.gethostname()})"
    size = store.compare_set("size", "", str(world_size)).decode()
    there = store.compare_set(f"place {rank}", "", mine).decode()
    if (size, there) == (str(world_size), mine):
        return
    error = ConfigError(
        f"MASTER_PORT={os.environ['MASTER_PORT']} is that of another run of {size} processes; export another MASTER_PORT"
    )
    error.speaks = store.compare_set("second run", "", mine).decode() == mine
    raise error


@contextlib.contextmanager
def open_session(parallel: ParallelConfig, seed: int, *, deterministic: bool = False) -> Iterator[Session]:
    """Open the run on this process and close it whatever happens.

    Collective over the world. With ``deterministic`` torch allows only operations that give the same bits every
    time. On a machine without CUDA the block runs inside
    :func:`~megatron_ring.runtime.megatron_cpu.megatron_on_cpu`.
    """
    with contextlib.ExitStack() as stack:
        if deterministic:
            # before anything starts CUDA
            stack.enter_context(deterministic_operations())
        bound = device.bind(local_rank_from_env())
        if not device.has_cuda():
            from megatron_ring.runtime.megatron_cpu import megatron_on_cpu

            stack.enter_context(megatron_on_cpu())
            if parallel.bf16:
                stack.enter_context(bf16_products())
        from megatron_ring.runtime.megatron_fixes import megatron_fixes

        stack.enter_context(megatron_fixes())
        watch = _init_process_group(parallel)
        if watch is not None:
            stack.push(watch)
        stack.callback(torch.distributed.destroy_process_group)
        topology = open_topology(parallel)
        stack.callback(close_topology)
        _seed_everything(seed, topology)
        session = Session(
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            device=bound,
            topology=topology,
        )
        stack.enter_context(_signals(session.exit_request))
        with watch.reporting() if watch else contextlib.nullcontext():
            yield session


def _seed_everything(seed: int, topology: Topology) -> None:
    """Megatron's seeding: one stream per pipeline stage, tensor and expert ranks told apart by the tracker."""
    import random

    import numpy as np
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * topology.pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


@contextlib.contextmanager
def _signals(request: ExitRequest) -> Iterator[None]:
    """SIGTERM and SIGUSR1 ask the loop to save and leave; a second signal has its usual effect."""

    def note(number: int, _frame: object) -> None:
        request.signal_number = number
        signal.signal(number, previous[number])

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

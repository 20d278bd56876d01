"""One rank of a world that loses one: what it does is the first word of the command line, and who does it the second."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch

from megatron_ring.errors import DataError
from megatron_ring.launch.entry import run_entry
from megatron_ring.runtime.peers import Watch


def main() -> None:
    how, who = sys.argv[1], int(sys.argv[2])
    store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=120)))
    torch.set_num_threads(1)
    watch = Watch.open(store, rank, world)
    assert watch is not None
    with watch:
        mine = rank == who
        if how == "forks" and mine and os.fork() == 0:
            # a child's copy of the connection is none of the rank's
            time.sleep(30)
            os._exit(0)
        if how == "dies-in-set-up" and mine:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        with watch.reporting():
            torch.distributed.barrier()
            # in one write: the ranks share a pipe
            os.write(1, b"together\n")
            act(how, mine)
            if how != "ends-early":
                torch.distributed.all_reduce(torch.ones(3))
        torch.distributed.destroy_process_group()
    print("ended", flush=True)


def act(how: str, mine: bool) -> None:
    if mine and how in ("dies", "forks", "dies-while-others-sleep"):
        os.kill(os.getpid(), signal.SIGKILL)
    if mine and how == "user":
        raise DataError("the corpus of this rank is empty; fill it")
    if how == "all-users":
        raise DataError("the corpus is empty; fill it")
    if how == "all-interrupted" or (mine and how == "interrupted"):
        signal.raise_signal(signal.SIGINT)
    if mine and how == "bug":
        raise KeyError("step")
    if how == "dies-while-others-sleep" or (how == "ends-early" and not mine):
        time.sleep(2 if how == "ends-early" else 60)


if __name__ == "__main__":
    run_entry(main)

"""Two processes under torchrun, one of which never comes to the barrier."""

from __future__ import annotations

import os
import threading

import torch

from megatron_ring.config.parallel import ParallelConfig
from megatron_ring.runtime.session import open_session


def wait_for_nobody() -> None:
    threading.Event().wait()


def main() -> None:
    # a session's threads, which watch its peers, use CPU time for ever
    with open_session(ParallelConfig(), seed=1) as session:
        # in one write: two processes share the file, and torchrun's print writes number and newline apart
        os.write(1, f"{os.getpid()}\n".encode())
        if session.rank == 1:
            wait_for_nobody()
        torch.distributed.barrier()


if __name__ == "__main__":
    main()

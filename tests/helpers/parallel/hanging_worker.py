"""Two processes under torchrun, one of which never comes to the barrier."""

from __future__ import annotations

import os
import threading

import torch


def wait_for_nobody() -> None:
    threading.Event().wait()


def main() -> None:
    torch.distributed.init_process_group("gloo")
    # in one write: two processes share the file, and torchrun's print writes number and newline apart
    os.write(1, f"{os.getpid()}\n".encode())
    if torch.distributed.get_rank() == 1:
        wait_for_nobody()
    torch.distributed.barrier()


if __name__ == "__main__":
    main()

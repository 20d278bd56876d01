"""Processes that race for run folders: ``python -m tests.helpers.checkpoint.lock_worker FOLDER PROCESSES ROUNDS``.

Prints how many won each round. Every winner holds its folder until all have tried.
"""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

from megatron_ring.checkpoint.run_lock import hold_run_folder
from megatron_ring.errors import CheckpointError


def race(root: Path, rounds: int, line: Any, wins: Any) -> None:
    for number in range(rounds):
        line.wait(60)
        try:
            with hold_run_folder(root / str(number)):
                with wins.get_lock():
                    wins[number] += 1
                line.wait(60)
        except CheckpointError as error:
            assert "writes its checkpoints there" in str(error), error
            line.wait(60)


def main(root: Path, processes: int, rounds: int) -> None:
    context = multiprocessing.get_context("fork")
    line, wins = context.Barrier(processes), context.Array("i", rounds)
    racers = [context.Process(target=race, args=(root, rounds, line, wins)) for _ in range(processes)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    print(*wins)
    sys.exit(any(racer.exitcode for racer in racers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

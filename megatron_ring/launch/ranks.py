"""torchrun, with one line where it prints a page: ``python -m megatron_ring.launch.ranks FLAG ... SCRIPT FLAG ...``.

torchrun's own launcher ends a run whose rank has failed with a traceback of itself and a table, whatever the rank said;
its exit code is 1 whatever the rank's was. Here the rank's own lines stay the last word, and its exit code is the
run's: 2 for a mistake of the user's, 75 where a peer was lost, 128 + n for signal n (130 for Ctrl-C).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from signal import SIGTERM
from typing import Any, NoReturn

from megatron_ring.errors import Interrupted
from megatron_ring.runtime.orphans import PEER_IS_GONE, name_launcher

_SPOKEN = (2, 130)
"""Exit codes of ranks that have said their line: a user's mistake, Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    try:
        failed = _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        # before there are ranks
        print(f"error: {Interrupted()}", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(failed)


def _run(argv: list[str]) -> int:
    """Start the ranks and wait for them; the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # each failed process is in the line below, and a signal is the caller's own
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    name_launcher()
    torchrun: Any = run
    try:
        torchrun.run(torchrun.parse_args(argv))
    except ChildFailedError as error:
        failures: dict[int, Any] = error.failures
        # a rank that was ended because of another is no cause
        rank, first = min(failures.items(), key=lambda item: (_follows(item[1].exitcode), item[1].timestamp))
        if first.exitcode not in _SPOKEN:
            print(_line_of(rank, first.pid, first.exitcode), file=sys.stderr, flush=True)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval.value
    return 0


def _follows(exit_code: int) -> bool:
    return exit_code in (PEER_IS_GONE, -SIGTERM)


def _line_of(rank: int, pid: int, exit_code: int) -> str:
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"
    return f"error: rank {rank} (process {pid}) {how}, and the run with it; what it said is above"


if __name__ == "__main__":
    main()

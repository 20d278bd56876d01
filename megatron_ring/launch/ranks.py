"""torchrun with short errors: ``ring launch FLAG ... COMMAND FLAG ...``, and for scripts
``python -m megatron_ring.launch.ranks FLAG ... SCRIPT FLAG ...``.

When a rank fails, torchrun prints its own traceback and a table, and exits with 1. Here the rank's own lines
come last, and the exit code is the rank's: 2 for a user's mistake, 75 for a lost peer, 128 + n for signal n
(130: Ctrl-C).
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from signal import SIGTERM
from typing import Any, NoReturn

from megatron_ring.errors import ConfigError, Interrupted
from megatron_ring.launch.entry import run_entry
from megatron_ring.runtime.orphans import PEER_IS_GONE, name_launcher

_SPOKEN = (2, 130)
"""Exit codes of ranks that have printed their own line: a user's mistake, Ctrl-C."""


def main(argv: Sequence[str] | None = None, prepare: Callable[[Any], None] = lambda _: None) -> NoReturn:
    """Start ranks from torchrun's arguments ``argv`` (``sys.argv`` by default), wait, exit with their code.

    ``prepare`` gets torchrun's parsed arguments before anything starts, and may change them.
    """
    try:
        failed = _run(list(sys.argv[1:] if argv is None else argv), prepare)
    except KeyboardInterrupt:
        # before there are ranks
        print(f"error: {Interrupted()}", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(failed)


def _run(argv: list[str], prepare: Callable[[Any], None]) -> int:
    """Start the ranks and wait for them; the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # each failed process is in the line below, and a signal is the caller's own
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    name_launcher()
    torchrun: Any = run
    arguments = _parse(torchrun, argv)
    _check_numbers(arguments)
    prepare(arguments)
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        failures: dict[int, Any] = error.failures
        # a rank that was stopped because another had failed is not the cause
        rank, first = min(failures.items(), key=lambda item: (_follows(item[1].exitcode), item[1].timestamp))
        if first.exitcode not in _SPOKEN:
            print(_line_of(rank, first.pid, first.exitcode), file=sys.stderr, flush=True)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval.value
    except (ValueError, RuntimeError, AssertionError) as error:
        if not _is_of_a_flag(error):
            raise
        raise ConfigError(f"{error}; see --help of the launcher") from None
    return 0


def _parse(torchrun: Any, argv: list[str]) -> Any:
    """torchrun's parsed arguments; ConfigError in place of its usage page."""
    parser = torchrun.get_args_parser()

    def refuse(message: str) -> NoReturn:
        named = message.replace(
            "training_script, training_script_args", "what to run, behind the launcher's flags"
        )
        raise ConfigError(f"{named}; see --help of the launcher")

    parser.error = refuse
    return parser.parse_args(argv)


def _check_numbers(arguments: Any) -> None:
    """
    Raises:
        ConfigError: a number that torchrun meets with an assertion or its own traceback.
    """
    processes, port, seconds = (
        str(arguments.nproc_per_node),
        arguments.master_port,
        arguments.monitor_interval,
    )
    if processes.removeprefix("-").isdecimal() and int(processes) < 1:
        raise ConfigError(f"--nproc-per-node {processes} must be at least 1; name the processes of this node")
    if port is not None and not 0 <= port < 1 << 16:
        raise ConfigError(f"--master-port {port} must be from 0 to 65535; try 29500")
    if not seconds > 0:
        raise ConfigError(f"--monitor-interval {seconds} must be positive; try 0.1 seconds")


def _is_of_a_flag(error: Exception) -> bool:
    """Did torchrun refuse the value of a flag? It parses some of them when it starts."""
    functions = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    parsers = {"config_from_args", "parse_min_max_nnodes", "parse_rendezvous_endpoint"}
    # with a known backend the same function calls what connects, whose errors are no flag's
    return not parsers.isdisjoint(functions) or functions[-1] == "create_handler"


def _follows(exit_code: int) -> bool:
    return exit_code in (PEER_IS_GONE, -SIGTERM)


def _line_of(rank: int, pid: int, exit_code: int) -> str:
    how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with code {exit_code}"
    return f"error: rank {rank} (process {pid}) {how}, and the run with it; what it said is above"


if __name__ == "__main__":
    run_entry(main)

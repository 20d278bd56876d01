"""What every entry point does first and last: read its command line, and end a user's mistake in one line.

An entry point is ``run_entry(main)`` under ``if __name__ == "__main__"``, and its ``main`` begins with
``config = start()``. Import the stage after that line: a wrong command line or ``--dry-run`` then costs no
torch.
"""

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from megatron_ring.checkpoint.run_lock import check_run_folder
from megatron_ring.config.load import parse_command
from megatron_ring.config.run import RunConfig
from megatron_ring.config.stage_rules import Stage
from megatron_ring.config.validate import check_inputs, validate
from megatron_ring.errors import Interrupted, RingError
from megatron_ring.launch.dry_run import dry_run
from megatron_ring.runtime.orphans import end_with_launcher


def run_entry(main: Callable[[], object]) -> NoReturn:
    """Run ``main`` and exit: 0 when it returns, 2 after ``error: ...`` on stderr when it raises a RingError, 130
    after such a line when somebody pressed Ctrl-C.

    Any other exception is ours and keeps its traceback. Of several processes that meet the same error one
    prints.
    """
    end_with_launcher()
    _dependency_warnings("ignore")
    try:
        main()
    except (RingError, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, RingError) else Interrupted()
        line = " ".join(str(error).split())
        if _is_speaker(line) if error.speaks is None else error.speaks:
            print(f"error: {line}", file=sys.stderr, flush=True)
        _tell_torchrun(line)
        sys.exit(error.exit_code)
    sys.exit(0)


def exit_on_sigterm() -> None:
    """From now on a terminated command cleans up as an interrupted one does, and exits with 143."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def start(argv: Sequence[str] | None = None, *, stage: Stage = "pretrain") -> RunConfig:
    """The validated config of this command line (``sys.argv`` by default), the inputs of ``stage`` found.

    With ``--dry-run`` prints the plan on rank 0 instead and exits 0. Raises RingError, before any process
    group.
    """
    command = parse_command(sys.argv[1:] if argv is None else argv)
    world_size = command.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    validate(command.config, world_size, stage)
    if command.config.logging.log_level == "debug":
        _dependency_warnings("default")
    if command.dry_run:
        if _rank() == 0:
            plan = dry_run(command.config, world_size, stage=stage, styled=sys.stdout.isatty())
            print(plan, flush=True)
        sys.exit(0)
    check_inputs(command.config, stage)
    check_run_folder(command.config.checkpoint.save, is_main=_rank() == 0)
    return command.config


def _dependency_warnings(action: Literal["ignore", "default"]) -> None:
    """What only the authors of our dependencies can act on: hidden from the start, shown by ``--log-level debug``.

    Python's own ``-W`` and PYTHONWARNINGS go before.
    """
    if sys.warnoptions:
        return
    # what is deprecated in torch is put down to its caller, which is ours
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings(
            action, category=category, module=r"(torch|megatron|megatron_ring|tensorboard)(\.|$)"
        )
    # at import, about each optional package that is not installed
    warnings.filterwarnings(action, category=UserWarning, module=r"megatron\.core(\.|$)")


def _tell_torchrun(line: str) -> None:
    """Leave the line where torchrun looks for it: its report of the root cause then holds it.

    torchrun prints a traceback of its own before the report, whatever a rank does; ``ring launch`` prints neither.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": f"error: {line}", "extraInfo": {"timestamp": str(int(time.time()))}}
        # the line is on stderr in any case
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_speaker(line: str) -> bool:
    """Should this process print the error?

    Without a process group every process has read the same command line: the first of each node speaks. With
    one, an error may be one rank's alone: the first rank to write the line into the group's store speaks for
    it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        mine = str(_rank())
        return store.compare_set(f"megatron_ring/error/{line}", "", mine).decode() == mine
    except (RuntimeError, ConnectionError):
        # the store lives in rank 0: it is gone because rank 0 has failed, and spoken, already
        return False

"""What every entry point does first and last: read its command line, and report a user's mistake in one line.

A stage's entry point is ``run_stage("pretrain")`` under ``if __name__ == "__main__"``; any other command's is
``run_entry(main)``. A stage's code is imported after its command line was checked, so neither a mistake nor
``--dry-run`` imports torch.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from megatron_ring.checkpoint.run_lock import check_run_folder
from megatron_ring.config.check import check_inputs, validate
from megatron_ring.config.importable import require_module
from megatron_ring.config.load import parse_command
from megatron_ring.config.run import RunConfig
from megatron_ring.config.stages import stage_spec
from megatron_ring.errors import ConfigError, Interrupted, RingError
from megatron_ring.launch.dry_run import dry_run
from megatron_ring.runtime.orphans import end_with_launcher
from megatron_ring.runtime.ranks import (
    adopt_slurm_address,
    adopt_slurm_ranks,
    local_rank_from_env,
    rank_from_env,
    world_size_from_env,
)


def run_entry(main: Callable[[], object]) -> NoReturn:
    """Run ``main`` and exit: 0 when it returns, 2 after ``error: ...`` on stderr when it raises a RingError, 130
    after such a line when the user pressed Ctrl-C.

    Any other exception is a bug of ours and keeps its traceback. If several processes raise the same error, one
    prints it.
    """
    end_with_launcher()
    _dependency_warnings("ignore")
    try:
        main()
    except (RingError, KeyboardInterrupt) as caught:
        error = caught if isinstance(caught, RingError) else Interrupted()
        line = " ".join(str(error).split())
        if _prints(line) if error.speaks is None else error.speaks:
            print(f"error: {line}", file=sys.stderr, flush=True)
        _tell_torchrun(line)
        sys.exit(error.exit_code)
    sys.exit(0)


def exit_on_sigterm() -> None:
    """Make SIGTERM clean up and exit with 143, as Ctrl-C cleans up."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def end_with_reader() -> None:
    """End without a traceback when the reader of the output, such as head, has seen enough."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def run_stage(name: str) -> NoReturn:
    """Run the stage ``name`` as this process's command line says, and exit like :func:`run_entry`."""
    run_entry(partial(stage_main, name))


def stage_main(name: str) -> None:
    """Run the stage ``name``: the command line is read first, the stage's code imported after that."""
    config = start(stage=name)
    entry = stage_spec(name).entry
    require_module(f"stage {name}: entry={entry}", entry)
    module, _, function = entry.partition(":")
    try:
        run = getattr(importlib.import_module(module), function, None)
    except SystemExit:
        # the process would end as if the stage were done
        raise ConfigError(
            f"stage {name}: entry={entry}: the import of {module} ends with sys.exit(); call it in a function"
        ) from None
    if run is None:
        raise ConfigError(f"stage {name}: entry={entry}: module {module} has no {function}; correct the name")
    if not callable(run):
        raise ConfigError(
            f"stage {name}: entry={entry} is {type(run).__name__}, not a function; name one that takes the RunConfig"
        )
    run(config)


def start(argv: Sequence[str] | None = None, *, stage: str = "pretrain") -> RunConfig:
    """The validated config of this command line (``sys.argv`` by default), the inputs of ``stage`` found.

    With ``--dry-run`` prints the plan on rank 0 instead and exits 0. Raises RingError, before any process
    group.
    """
    adopt_slurm_ranks()
    command = parse_command(sys.argv[1:] if argv is None else argv)
    world_size = command.world_size or world_size_from_env()
    validate(command.config, world_size, stage)
    if command.config.logging.log_level == "debug":
        _dependency_warnings("default")
    if command.dry_run:
        if rank_from_env() == 0:
            end_with_reader()
            plan = dry_run(command.config, world_size, stage=stage, styled=sys.stdout.isatty())
            print(plan, flush=True)
        sys.exit(0)
    check_inputs(command.config, stage)
    check_run_folder(command.config.checkpoint.save, is_save_rank=rank_from_env() == 0)
    adopt_slurm_address()
    return command.config


def _dependency_warnings(action: Literal["ignore", "default"]) -> None:
    """Hide or show warnings that only the authors of our dependencies can act on; ``--log-level debug`` shows them.

    Python's own ``-W`` and PYTHONWARNINGS take precedence.
    """
    if sys.warnoptions:
        return
    # a deprecation in torch is attributed to its caller, which may be a module of ours
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings(
            action, category=category, module=r"(torch|megatron|megatron_ring|tensorboard)(\.|$)"
        )
    # from packages that are compiled at their first import
    warnings.filterwarnings(action, category=SyntaxWarning, module=r".*/site-packages/")
    # at import, for each optional package that is not installed
    warnings.filterwarnings(action, category=UserWarning, module=r"megatron\.core(\.|$)")


def _tell_torchrun(line: str) -> None:
    """Write the line to the error file that torchrun names, so that its root-cause report shows it.

    torchrun still prints its own traceback before that report, whatever a rank does; ``ring launch`` prints neither.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": f"error: {line}", "extraInfo": {"timestamp": str(int(time.time()))}}
        # not worth an error: the line is on stderr already
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")


def _prints(line: str) -> bool:
    """Should this process print the error?

    Without a process group local rank 0 of each node prints: all have read the same command line. With one, the
    first rank to claim the message in the group's store prints it: an error may be a single rank's.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        try:
            # a process that is alone has nobody to print for it, whatever LOCAL_RANK a shell was left with
            return world_size_from_env() == 1 or local_rank_from_env() == 0
        except ConfigError:
            # no number, so this process stands for itself
            return True
    try:
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        mine = str(rank_from_env())
        return store.compare_set(f"megatron_ring/error/{line}", "", mine).decode() == mine
    except (RuntimeError, ConnectionError):
        # the store lives in rank 0: it is gone because rank 0 has failed and printed already
        return False

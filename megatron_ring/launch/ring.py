"""The installed command: ``ring COMMAND FLAG ...``. Each command imports only what it needs.

To add one, write a ``main`` that reads ``sys.argv`` in ``launch/commands/``, and a row below. The stages of
``config/stages.py`` are added automatically.
"""

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from megatron_ring import __version__
from megatron_ring.config.stages import STAGES
from megatron_ring.errors import ConfigError
from megatron_ring.launch.entry import run_entry


@dataclass(frozen=True, slots=True)
class Command:
    """One row of ``ring --help``.

    Example: ``Command("list the layouts that fit a cluster's memory", "megatron_ring.launch.commands.plan")``.
    """

    does: str
    module: str
    function: str = "main"
    """Called with ``arguments``; it reads ``sys.argv``."""
    arguments: tuple[str, ...] = ()

    def run(self) -> None:
        """Import the command and run it."""
        getattr(import_module(self.module), self.function)(*self.arguments)


COMMANDS = {
    "tokenizer": Command("train a tokenizer", "megatron_ring.launch.commands.tokenizer"),
    "preprocess": Command("turn text into a corpus", "megatron_ring.launch.commands.preprocess"),
    "prompts": Command("write a source of problems to a file", "megatron_ring.launch.commands.prompts"),
    **{
        name: Command(spec.does, "megatron_ring.launch.entry", "stage_main", (name,))
        for name, spec in STAGES.items()
    },
    "launch": Command(
        f"run {', '.join(STAGES)} in several processes", "megatron_ring.launch.commands.launch"
    ),
    "convert": Command("convert from and to Hugging Face", "megatron_ring.launch.commands.convert"),
    "verify": Command(
        "check a checkpoint's files by their checksums", "megatron_ring.launch.commands.verify"
    ),
    "plan": Command("list the layouts that fit a cluster's memory", "megatron_ring.launch.commands.plan"),
    "report": Command("draw the report of one run or several", "megatron_ring.launch.commands.report"),
}

_HELP = """\
usage: ring COMMAND [FLAG ...]        ring COMMAND --help lists a command's flags

{rows}

One machine:    ring launch --nproc-per-node 8 rl --config run.toml     (torchrun's flags, then the command)
Several:        srun ring rl --config run.toml, or torchrun ... -m megatron_ring rl --config run.toml
"""


def main() -> NoReturn:
    """What the console script and ``python -m megatron_ring`` call; exits as :func:`run_entry` does."""
    run_entry(_main)


def find(name: str) -> Command:
    """The command of that name.

    Raises:
        ConfigError: there is none; the line names the closest one.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    close = get_close_matches(name, COMMANDS, n=1)
    raise ConfigError(
        f"command {name} does not exist; " + (f"did you mean {close[0]}?" if close else "see ring --help")
    )


def _main() -> None:
    words = sys.argv[1:]
    if words[:1] in ([], ["--help"], ["-h"]):
        width = max(map(len, COMMANDS))
        print(
            _HELP.format(rows="\n".join(f"  {name:<{width}}  {row.does}" for name, row in COMMANDS.items())),
            end="",
        )
    elif words[0] == "--version":
        print(f"megatron_ring {__version__}")
    else:
        command = find(words[0])
        # what argparse calls the program
        sys.argv = [f"ring {words[0]}", *words[1:]]
        command.run()

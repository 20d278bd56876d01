"""``ring launch FLAG ... COMMAND FLAG ...``: torchrun's flags, then a stage and its flags for every rank."""

import sys
from typing import Any

from megatron_ring.config.stages import STAGES
from megatron_ring.errors import ConfigError
from megatron_ring.launch import ranks
from megatron_ring.launch.ring import find


def main() -> None:
    ranks.main(["-m", *sys.argv[1:]], prepare=_run_command)


def _run_command(arguments: Any) -> None:
    """What torchrun parsed as a module to run is the name of one of our commands."""
    name: str = arguments.training_script
    if name.endswith(".py"):
        raise ConfigError(
            f"{name} is a script, not a command; start it with python -m megatron_ring.launch.ranks FLAG ... {name}"
        )
    find(name)
    if name not in STAGES:
        raise ConfigError(f"command {name} runs in one process; call it without launch: ring {name}")
    arguments.training_script = "megatron_ring"
    arguments.training_script_args.insert(0, name)

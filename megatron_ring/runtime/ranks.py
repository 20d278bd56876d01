"""Which process of the job this is: torchrun's variables, which ``srun`` is made to set as well. No torch here.

A run reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. Under ``srun`` they follow
from Slurm's own (:func:`adopt_slurm_ranks`, :func:`adopt_slurm_address`), so that ``srun ring rl ...`` needs no script.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import MutableMapping

from megatron_ring.errors import ConfigError

_PORTS = range(20000, 30000)
"""Below the ephemeral ports of Linux (32768 on) and of IANA (49152 on)."""
_SCONTROL_SECONDS = 60
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def rank_from_env() -> int:
    """This process's place in the job, from 0."""
    return _number("RANK", 0)


def world_size_from_env() -> int:
    """Processes of the job; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def local_rank_from_env() -> int:
    """This process's place among those of its node, from 0."""
    return _number("LOCAL_RANK", 0)


def adopt_slurm_ranks(env: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables of rank and size in a process that ``srun`` started; elsewhere do nothing.

    What is set already stays: under ``srun torchrun`` the ranks are torchrun's. A batch script's own process is not one of
    the job's ranks.

    Raises:
        ConfigError: one of Slurm's variables is missing.
    """
    if not _is_task_of_srun(env) or any(name in env for name in _SLURM):
        return
    missing = [name for name in _SLURM.values() if name not in env]
    if missing:
        raise ConfigError(
            f"step {env['SLURM_STEP_ID']} of Slurm's job {env.get('SLURM_JOB_ID')} has no {', '.join(missing)}; "
            f"start the run with srun, or export {', '.join(_SLURM)} yourself"
        )
    for ours, theirs in _SLURM.items():
        env[ours] = env[theirs]


def adopt_slurm_address(env: MutableMapping[str, str] = os.environ) -> None:
    """Set ``MASTER_ADDR`` and ``MASTER_PORT`` of several ranks that ``srun`` started, where they are not set.

    The address is Slurm's of the step's first node, for a node's name need not resolve on the others. The port follows
    from the job's number.

    Raises:
        ConfigError: Slurm does not tell the address.
    """
    if not _is_task_of_srun(env) or "TORCHELASTIC_RUN_ID" in env or env.get("WORLD_SIZE", "1") == "1":
        return
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_address(env)
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_PORTS[int(env.get("SLURM_JOB_ID", "0")) % len(_PORTS)])


def _is_task_of_srun(env: MutableMapping[str, str]) -> bool:
    # a batch script has SLURM_PROCID as well, but is no task of a step
    return "SLURM_STEP_ID" in env and "SLURM_PROCID" in env


def _first_address(env: MutableMapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    try:
        first = _scontrol("show", "hostnames", nodes).split()[0]
        node = _scontrol("show", "node", first)
        return next(word.partition("=")[2] for word in node.split() if word.startswith("NodeAddr="))
    except (OSError, subprocess.SubprocessError, LookupError, StopIteration) as error:
        reason = str(error) or "it names no NodeAddr"
        raise ConfigError(
            f"scontrol does not tell the address of the first node of {nodes or 'this job'} ({reason}); "
            "export MASTER_ADDR with the address that the other nodes reach rank 0 at"
        ) from None


def _scontrol(*words: str) -> str:
    done = subprocess.run(
        ["scontrol", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SCONTROL_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise subprocess.SubprocessError(" ".join(done.stderr.split()) or f"exit code {done.returncode}")
    return done.stdout


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name}={text!r} in the environment must be a whole number; start the run with ring launch, torchrun or srun"
        ) from None

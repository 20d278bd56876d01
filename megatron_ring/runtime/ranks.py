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
_MOST_PORT = 65535
_STEP_STRIDE = 1009
"""Between the ports of a job's steps: jobs that run at the same time often have neighbouring numbers."""
_NO_STEP = 0xFFFFFFF0
"""Slurm's step numbers from here on are no ``srun``'s: the shell of ``salloc`` is 0xfffffffa, one process, and has the
SLURM_NTASKS of the whole job."""
_SCONTROL_SECONDS = 60
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def rank_from_env() -> int:
    """This process's place in the job, from 0 to below the number of its processes."""
    world_size = world_size_from_env()
    rank = _number("RANK", 0)
    if rank >= world_size:
        raise _wrong("RANK", rank, f"must be from 0 to below WORLD_SIZE={world_size}")
    return rank


def world_size_from_env() -> int:
    """Processes of the job; 1 without a launcher."""
    return _number("WORLD_SIZE", 1, least=1)


def local_rank_from_env() -> int:
    """This process's place among those of its node, from 0."""
    return _number("LOCAL_RANK", 0)


def master_port_from_env() -> int:
    """Where rank 0 listens; 0, which would be another port at each process, is none."""
    port = _number("MASTER_PORT", 0, least=1)
    if port > _MOST_PORT:
        raise _wrong("MASTER_PORT", port, f"must be from 1 to {_MOST_PORT}")
    return port


def adopt_slurm_ranks(env: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables of rank and size in a process that ``srun`` started; elsewhere do nothing.

    What is set already stays: under ``srun torchrun`` the ranks are torchrun's. A batch script's own process and the shell
    of ``salloc`` are none of the job's ranks.

    Raises:
        ConfigError: one of Slurm's variables is missing, or a batch script has exported another ``WORLD_SIZE``.
    """
    wanted = [name for name in _SLURM if name not in env]
    if not wanted or not _is_task_of_srun(env):
        return
    missing = [_SLURM[name] for name in wanted if _SLURM[name] not in env]
    if missing:
        raise ConfigError(
            f"step {env['SLURM_STEP_ID']} of Slurm's job {env.get('SLURM_JOB_ID')} has no {', '.join(missing)}; "
            f"start the run with srun, or export {', '.join(_SLURM)} yourself"
        )
    for name in wanted:
        env[name] = env[_SLURM[name]]
    if "RANK" in wanted and env["WORLD_SIZE"] != env["SLURM_NTASKS"]:
        raise ConfigError(
            f"WORLD_SIZE={env['WORLD_SIZE']} in the environment, but srun started SLURM_NTASKS={env['SLURM_NTASKS']} "
            "processes; unset WORLD_SIZE, which follows from Slurm"
        )


def adopt_slurm_address(env: MutableMapping[str, str] = os.environ) -> None:
    """Set ``MASTER_ADDR`` and ``MASTER_PORT`` of several ranks that ``srun`` started, where they are not set.

    The address is Slurm's of the step's first node, for a node's name need not resolve on the others. The port follows
    from the numbers of job and step: two steps of a job may share a node.

    Raises:
        ConfigError: Slurm does not tell the address.
    """
    if not _is_task_of_srun(env) or "TORCHELASTIC_RUN_ID" in env or env.get("WORLD_SIZE", "1") == "1":
        return
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_address(env)
    if "MASTER_PORT" not in env:
        number = _number("SLURM_JOB_ID", 0, env=env) + _STEP_STRIDE * _number("SLURM_STEP_ID", 0, env=env)
        env["MASTER_PORT"] = str(_PORTS[number % len(_PORTS)])


def _is_task_of_srun(env: MutableMapping[str, str]) -> bool:
    # a batch script has SLURM_PROCID as well, but is no task of a step
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return False
    # older versions of Slurm write the largest numbers as negative ones
    return 0 <= _number("SLURM_STEP_ID", 0, least=-(1 << 31), env=env) < _NO_STEP


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


def _number(name: str, default: int, *, least: int = 0, env: MutableMapping[str, str] = os.environ) -> int:
    text = env.get(name, str(default))
    try:
        number = int(text)
    except ValueError:
        raise _wrong(name, repr(text), "must be a whole number") from None
    if number < least:
        raise _wrong(name, number, f"must be at least {least}")
    return number


def _wrong(name: str, value: object, rule: str) -> ConfigError:
    error = ConfigError(
        f"{name}={value} in the environment {rule}; start the run with ring launch, torchrun or srun"
    )
    if name in ("RANK", "LOCAL_RANK"):
        # the other processes have another
        error.speaks = True
    return error

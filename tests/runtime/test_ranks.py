"""Ranks and the address of rank 0 from torchrun's variables or from Slurm's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ring.errors import ConfigError
from megatron_ring.runtime.ranks import (
    adopt_slurm_address,
    adopt_slurm_ranks,
    local_rank_from_env,
    master_port_from_env,
    rank_from_env,
    world_size_from_env,
)

STEP = {
    "SLURM_JOB_ID": "612345",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "h", "MASTER_PORT": "5"}


def adopted(env: dict[str, str]) -> dict[str, str]:
    """What is new."""
    mine = dict(env)
    adopt_slurm_ranks(mine)
    adopt_slurm_address(mine)
    return {name: value for name, value in mine.items() if env.get(name) != value}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that says what Slurm 22.05's does of ``gpu[07-08]``."""
    program = tmp_path / "scontrol"
    program.write_text(
        '#!/bin/sh\ncase "$2 $3" in\n"hostnames gpu[07-08]") printf "gpu07\\ngpu08\\n" ;;\n'
        '"node gpu07") printf "NodeName=gpu07 Arch=x86_64 CoresPerSocket=1\\n   NodeAddr=10.4.0.7 '
        'NodeHostName=gpu07 Version=22.05.8\\n" ;;\n*) echo "slurm_load_node error: no such node" >&2; exit 1 ;;\nesac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return program


def test_a_task_of_srun_has_ranks_an_address_and_a_port_below_the_ephemeral_ones(scontrol):
    assert adopted(STEP) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "10.4.0.7",
        "MASTER_PORT": "22345",
    }
    ports = {int(adopted(STEP | {"SLURM_JOB_ID": str(job)})["MASTER_PORT"]) for job in (0, 1, 9999, 10000)}
    assert ports == {20000, 20001, 29999}


def test_what_is_exported_stays(scontrol):
    assert "MASTER_ADDR" not in adopted(STEP | {"MASTER_ADDR": "10.0.0.1"})
    assert adopted(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}).keys() == {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    }


def test_torchruns_ranks_win_under_srun():
    assert adopted(STEP | TORCHRUN) == {}


def test_outside_a_step_nothing_is_taken_for_a_rank():
    """A batch script and the shell of salloc have SLURM_NTASKS, and are one process."""
    batch = {name: value for name, value in STEP.items() if "STEP" not in name}
    assert adopted(batch) == {}
    assert adopted({}) == {}


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "-6"])
def test_the_shell_of_salloc_is_one_process(step):
    """Where Slurm starts it on the first node, it is a step with the SLURM_NTASKS of the job: a run in it waited for
    ranks that nobody starts."""
    shell = STEP | {"SLURM_STEP_ID": step, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert adopted(shell) == {}


def test_two_steps_of_a_job_have_two_ports(scontrol):
    first, second = (adopted(STEP | {"SLURM_STEP_ID": step})["MASTER_PORT"] for step in "01")
    assert (first, second) == ("22345", "23354")


@pytest.mark.parametrize(
    "exported",
    [{"WORLD_SIZE": "16"}, {"LOCAL_RANK": "1"}, {"RANK": "9", "WORLD_SIZE": "16"}, {"RANK": "9"}],
)
def test_what_a_script_does_not_export_follows_from_slurm(scontrol, exported):
    """A batch script that exported WORLD_SIZE made every process rank 0."""
    env = STEP | exported
    assert env | adopted(env) == STEP | adopted(STEP)


def test_another_size_than_srun_started_is_one_line():
    line = r"^WORLD_SIZE=8 in the environment, but srun started SLURM_NTASKS=16 processes; unset WORLD_SIZE"
    with pytest.raises(ConfigError, match=line):
        adopt_slurm_ranks(STEP | {"WORLD_SIZE": "8"})


def test_a_single_task_needs_no_address():
    assert adopted(STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).keys() == {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    }


def test_a_variable_that_is_missing_is_named():
    env = {name: value for name, value in STEP.items() if name != "SLURM_LOCALID"}
    with pytest.raises(ConfigError, match=r"^step 0 of Slurm's job 612345 has no SLURM_LOCALID; start"):
        adopt_slurm_ranks(env)


@pytest.mark.parametrize("nodes", ["gpu[09-10]", ""])
def test_an_address_that_scontrol_does_not_tell_is_one_line(scontrol, nodes):
    env = STEP | {"SLURM_STEP_NODELIST": nodes, "WORLD_SIZE": "16"}
    with pytest.raises(ConfigError, match=r"no such node\); export MASTER_ADDR with the address"):
        adopt_slurm_address(env)


def test_no_scontrol_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"first node of gpu\[07-08\] \(.*scontrol.*\); export MASTER_ADDR"):
        adopt_slurm_address(STEP | {"WORLD_SIZE": "16"})


@pytest.mark.parametrize(
    ("ask", "env", "line"),
    [
        (
            world_size_from_env,
            {"WORLD_SIZE": "many"},
            "WORLD_SIZE='many' in the environment must be a whole number",
        ),
        (world_size_from_env, {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment must be at least 1"),
        (rank_from_env, {"RANK": "-1"}, "RANK=-1 in the environment must be at least 0"),
        (rank_from_env, {"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 .* must be from 0 to below WORLD_SIZE=2"),
        (rank_from_env, {"RANK": "1"}, "RANK=1 .* must be from 0 to below WORLD_SIZE=1"),
        (local_rank_from_env, {"LOCAL_RANK": ""}, "LOCAL_RANK='' in the environment must be a whole number"),
        (master_port_from_env, {"MASTER_PORT": "http"}, "MASTER_PORT='http' .* must be a whole number"),
        (master_port_from_env, {"MASTER_PORT": "0"}, "MASTER_PORT=0 .* must be at least 1"),
        (master_port_from_env, {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 .* must be from 1 to 65535"),
    ],
)
def test_a_variable_that_no_launcher_sets_so_is_one_line(monkeypatch, ask, env, line):
    """A rank beyond the last waited for the others, a port that is none was a traceback."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{line}; start the run with ring launch, torchrun or srun$"):
        ask()

"""The examples' configs are valid where their scripts run them, and the scripts start what they say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ring.config.check import validate
from megatron_ring.config.load import load_config
from tests.helpers.paths import python_path

ROOT = Path(__file__).parents[2]
TINY = "examples/tiny/pretrain.toml"
RING_LITE = "examples/ring_lite/pretrain.toml"
SBATCH = "examples/ring_lite/pretrain_multinode.sbatch"


@pytest.mark.parametrize(("config", "world_size"), [(TINY, 1), (TINY, 4), (RING_LITE, 8), (RING_LITE, 256)])
def test_every_config_is_valid_on_its_processes(config: str, world_size: int):
    validate(load_config(["--config", str(ROOT / config)]), world_size)


def test_ring_lite_trains_with_the_reports_settings():
    config = load_config(["--config", str(ROOT / RING_LITE)])
    train, model = config.train, config.model
    assert (train.adam_beta1, train.adam_beta2, train.adam_eps) == (0.9, 0.95, 1e-8)
    assert (train.weight_decay, train.clip_grad, train.lr_decay_style) == (0.1, 1.0, "WSD")
    assert (model.moe_aux_loss_coeff, model.moe_z_loss_coeff, model.norm_head) == (0.015, 1e-4, True)
    assert train.rampup_batch_size is not None and model.moe_router_warmup_iters > 0


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder of stand-ins for Slurm's programs: they run one task here and tell what they were asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "scontrol": ('echo "$1d $2"'),
        "srun": (
            "while [[ $1 == --* ]]; do shift; done\n"
            'SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8 exec "$@"'
        ),
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def environment(commands: Path, **more: str) -> dict[str, str]:
    path = f"{commands}:{os.environ['PATH']}"
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "20005"}
    return {
        **os.environ,
        **slurm,
        "PATH": path,
        "PYTHONPATH": python_path(),
        "PYTHON": sys.executable,
        **more,
    }


@pytest.mark.parametrize(
    ("script", "processes"),
    [("examples/tiny/pretrain_4proc.sh", 4), ("examples/ring_lite/pretrain_1node.sh", 8), (SBATCH, 8)],
)
def test_scripts_start_a_valid_run(script: str, processes: int, commands: Path):
    done = subprocess.run(
        ["bash", str(ROOT / script), "--dry-run"], env=environment(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ["processes", str(processes)] in [line.split() for line in done.stdout.splitlines()]
    if script == SBATCH:
        assert "requeued" not in done.stdout


@pytest.mark.parametrize(("code", "requeued"), [(0, True), (3, False)])
def test_the_batch_script_passes_usr1_on_and_requeues_only_a_clean_end(
    code: int, requeued: bool, commands: Path, tmp_path: Path
):
    task = tmp_path / "task.sh"
    started = tmp_path / "started"
    # USR1 asks the task to end; it takes a moment to save, through which the script has to wait
    task.write_text(
        f"trap 'sleep 0.3; echo saved; exit {code}' USR1\ntouch {started}\nwhile true; do sleep 0.05; done\n"
    )
    (commands / "task").write_text(f"#!/usr/bin/env bash\nexec bash {task}\n")
    (commands / "task").chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(ROOT / SBATCH), "--dry-run"],
        env=environment(commands, PYTHON=f"{commands}/task"),
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(4000):
        if started.exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code
    assert "saved" in output
    assert ("requeued 20005" in output) == requeued

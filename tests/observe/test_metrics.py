"""The metrics file holds each step once whatever kills a run; the progress line says what a person needs."""

import errno
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
import threading
import time
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_ring.errors import ConfigError, DataError
from megatron_ring.observe import metrics as metrics_module
from megatron_ring.observe.metrics import MetricsLogger, PhaseTimer
from megatron_ring.observe.metrics_file import MetricsFile, read_records
from megatron_ring.observe.progress import count, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock the test moves: ``clock.now += 2.0``."""
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: fake.now)
    return fake


def log_steps(metrics, first, last, clock=None, seconds=1.0):
    for step in range(first, last + 1):
        if clock is not None:
            clock.now += seconds
        values = {"loss": 4.0 - 0.1 * step, "lr": 1e-3, "grad_norm": 0.5}
        metrics.log(step, values, tokens=1000, seconds=seconds)


def of_kind(path, kind):
    return [record for record in read_records(path) if record["kind"] == kind]


def test_a_step_is_one_json_line_with_its_values_and_speed(tmp_path):
    with MetricsLogger(tmp_path, total_steps=2, log_interval=1, world_size=2, facts={"note": "x"}) as metrics:
        metrics.log(1, {"loss": 1 / 3}, tokens=1000, seconds=0.5)
        metrics.log_eval(1, {"loss": 2.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "train", "eval", "end"]
    assert lines[0]["world_size"] == 2 and lines[0]["note"] == "x" and lines[0]["step"] == 0
    assert lines[1]["loss"] == 1 / 3
    assert lines[1]["tokens_per_second"] == 2000.0
    assert "mfu" not in lines[1]
    assert lines[2]["loss"] == 2.5 and lines[2]["step"] == 1


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    metrics = MetricsLogger(tmp_path, total_steps=2, log_interval=1)
    metrics.log(1, {"loss": 1.0}, tokens=1, seconds=1.0)
    assert [r["step"] for r in of_kind(tmp_path / "metrics.jsonl", "train")] == [1]


def test_resume_drops_what_a_killed_run_said_about_later_steps(tmp_path, clock):
    killed = MetricsLogger(tmp_path, total_steps=10, log_interval=1)
    log_steps(killed, 1, 7, clock)
    killed.log_eval(6, {"loss": 9.0})
    with MetricsLogger(tmp_path, total_steps=10, log_interval=1, resume_step=5) as resumed:
        log_steps(resumed, 6, 10, clock)
    path = tmp_path / "metrics.jsonl"
    assert [r["step"] for r in of_kind(path, "train")] == list(range(1, 11))
    assert [r["step"] for r in of_kind(path, "run")] == [0, 5]
    assert of_kind(path, "eval") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_wall_time_goes_on_from_the_last_kept_step(tmp_path, clock):
    killed = MetricsLogger(tmp_path, total_steps=10, log_interval=1)
    log_steps(killed, 1, 7, clock, seconds=2.0)
    clock.now += 1000.0
    with MetricsLogger(tmp_path, total_steps=10, log_interval=1, resume_step=5) as resumed:
        log_steps(resumed, 6, 6, clock, seconds=3.0)
    walls = {r["step"]: r["wall_seconds"] for r in of_kind(tmp_path / "metrics.jsonl", "train")}
    assert walls[5] == 10.0 and walls[6] == 13.0


def test_a_line_cut_short_by_a_kill_is_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    killed = MetricsLogger(tmp_path, total_steps=9, log_interval=1)
    log_steps(killed, 1, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 20])
    assert [r["step"] for r in of_kind(path, "train")] == [1, 2]
    with MetricsLogger(tmp_path, total_steps=9, log_interval=1, resume_step=2) as resumed:
        log_steps(resumed, 3, 4)
    assert [r["step"] for r in of_kind(path, "train")] == [1, 2, 3, 4]


def test_a_start_at_zero_sets_an_earlier_file_aside(tmp_path):
    with MetricsLogger(tmp_path, total_steps=3, log_interval=1) as first:
        log_steps(first, 1, 3)
    with MetricsLogger(tmp_path, total_steps=1, log_interval=1) as second:
        log_steps(second, 1, 1)
    assert len(of_kind(tmp_path / "metrics.jsonl", "train")) == 1
    assert len(of_kind(tmp_path / "metrics.jsonl.old", "train")) == 3


def test_a_corrupt_line_inside_the_file_is_one_clear_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(DataError, match=r"line 2 is no metrics record; repair or move"):
        MetricsLogger(tmp_path, total_steps=9, log_interval=1, resume_step=2)
    assert "nonsense" in path.read_text()


def test_not_finite_numbers_are_null(tmp_path):
    with MetricsLogger(tmp_path, total_steps=1, log_interval=1) as metrics:
        metrics.log(1, {"loss": math.nan, "grad_norm": math.inf}, tokens=1, seconds=1.0)
    (record,) = of_kind(tmp_path / "metrics.jsonl", "train")
    assert record["loss"] is None and record["grad_norm"] is None


def test_a_step_reported_twice_is_our_bug(tmp_path):
    metrics = MetricsLogger(tmp_path, total_steps=9, log_interval=1, resume_step=4)
    log_steps(metrics, 5, 5)
    with pytest.raises(AssertionError, match="step 5 after step 5"):
        log_steps(metrics, 5, 5)


def test_phases_add_up_per_step_and_start_afresh(tmp_path, clock):
    with MetricsLogger(tmp_path, total_steps=2, log_interval=1) as metrics:
        for _ in range(2):
            with metrics.phase("data"):
                clock.now += 0.25
        with pytest.raises(KeyError), metrics.phase("optimizer"):
            clock.now += 1.0
            raise KeyError
        metrics.log(1, {}, tokens=1, seconds=2.0)
        metrics.log(2, {}, tokens=1, seconds=2.0)
        with metrics.phase("save"):
            clock.now += 3.0
    first, second = of_kind(tmp_path / "metrics.jsonl", "train")
    assert first["seconds_data"] == 0.5 and first["seconds_optimizer"] == 1.0
    assert not [name for name in second if name.startswith("seconds_")]
    (end,) = of_kind(tmp_path / "metrics.jsonl", "end")
    assert end["seconds_save"] == 3.0


def test_phase_timer_example():
    phases = PhaseTimer()
    with phases("data"):
        pass
    assert list(phases.drain()) == ["data"] and phases.drain() == {}


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    metrics = MetricsLogger(
        tmp_path / "run", total_steps=1, log_interval=1, is_log_rank=False, tensorboard_dir=tmp_path / "tb"
    )
    with metrics, metrics.phase("data"):
        log_steps(metrics, 1, 1)
        metrics.log_eval(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_run_that_fails_has_no_end_record(tmp_path):
    with pytest.raises(KeyError), MetricsLogger(tmp_path, total_steps=1, log_interval=1):
        raise KeyError
    assert of_kind(tmp_path / "metrics.jsonl", "end") == []


def test_progress_lines_come_at_the_interval_and_at_both_ends(tmp_path, capsys, clock):
    with MetricsLogger(None, total_steps=25, log_interval=10) as metrics:
        log_steps(metrics, 1, 25, clock, seconds=2.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].strip() for line in lines] == [
        "step  1/25",
        "step 10/25",
        "step 20/25",
        "step 25/25",
    ]
    assert lines[1] == "step 10/25 | loss 3.4000 | lr 1.00e-03 | grad norm 0.5000 | 500 tok/s | ETA 30s"
    assert "ETA" not in lines[-1]


def test_progress_lines_are_seconds_apart_and_metrics_are_of_every_step(tmp_path, capsys, clock):
    with MetricsLogger(tmp_path, total_steps=25, log_interval=2, log_interval_seconds=20.0) as metrics:
        log_steps(metrics, 1, 25, clock, seconds=3.0)
    steps = re.findall(r"^step +(\d+)", capsys.readouterr().out, re.MULTILINE)
    # the first ends after 3 seconds: the next line may come after 23, with step 8
    assert steps == ["1", "8", "16", "24", "25"]
    assert [r["step"] for r in of_kind(tmp_path / "metrics.jsonl", "train")] == list(range(1, 26))


def test_progress_loss_is_the_mean_since_the_line_before(capsys):
    with MetricsLogger(None, total_steps=99, log_interval=2) as metrics:
        for step, loss in enumerate([8.0, 4.0, 1.0, 2.0], start=1):
            metrics.log(step, {"loss": loss}, tokens=1, seconds=1.0)
    assert re.findall(r"loss (\S+)", capsys.readouterr().out) == ["8.0000", "4.0000", "1.5000"]


def test_eta_counts_validations_but_not_the_first_step(capsys, clock):
    with MetricsLogger(None, total_steps=100, log_interval=1) as metrics:
        log_steps(metrics, 1, 1, clock, seconds=50.0)
        log_steps(metrics, 2, 2, clock, seconds=1.0)
        clock.now += 3.0
        log_steps(metrics, 3, 3, clock, seconds=1.0)
    etas = re.findall(r"ETA (.*)", capsys.readouterr().out)
    assert etas == [duration(99 * 50.0), duration(98 * 1.0), duration(97 * 2.5)]


def test_mfu_is_the_share_of_the_peak_of_all_devices(tmp_path, capsys):
    with MetricsLogger(
        tmp_path, total_steps=1, log_interval=1, world_size=4, peak_tflops=2.0, flops_per_token=1e9
    ) as metrics:
        metrics.log(1, {"loss": 1.0}, tokens=1000, seconds=0.5)
    (record,) = of_kind(tmp_path / "metrics.jsonl", "train")
    assert record["mfu"] == pytest.approx(2000 * 1e9 / (4 * 2e12))
    assert "MFU 25.0%" in capsys.readouterr().out


def test_values_shown_are_the_stage_s_choice(capsys):
    with MetricsLogger(None, total_steps=1, log_interval=1, shown=("reward", "entropy")) as metrics:
        metrics.log(1, {"loss": 1.0, "entropy": 0.3, "reward": 0.5}, tokens=1, seconds=1.0)
    assert capsys.readouterr().out == "step 1/1 | reward 0.5000 | entropy 0.3000 | 1 tok/s\n"


def test_console_has_colour_only_in_a_terminal(capsys, monkeypatch):
    with MetricsLogger(None, total_steps=1, log_interval=1) as metrics:
        log_steps(metrics, 1, 1)
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with MetricsLogger(None, total_steps=1, log_interval=1) as metrics:
        log_steps(metrics, 1, 1)
    assert "\x1b[" in capsys.readouterr().out


def test_an_unwritable_place_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"metrics file .*metrics.jsonl: .*; free space or set --metrics-file"
    ):
        MetricsLogger(tmp_path / "file" / "run", total_steps=1, log_interval=1)
    with pytest.raises(ConfigError, match="--tensorboard-dir"):
        MetricsLogger(None, total_steps=1, log_interval=1, tensorboard_dir=tmp_path / "file" / "tb")


FULL_DISK = """
import resource, sys
from megatron_ring.errors import ConfigError
from megatron_ring.observe.metrics import MetricsLogger

metrics = MetricsLogger(sys.argv[1], total_steps=9, log_interval=9)
metrics.log(1, {"loss": 1.0}, tokens=1, seconds=1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    metrics.log(2, {"loss": 1.0}, tokens=1, seconds=1.0)
except ConfigError as error:
    print("REFUSED", error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file size")
def test_a_full_disk_leaves_whole_lines_and_one_clear_error(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), "300"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^REFUSED metrics file .*; free space or set --metrics-file$", said, re.MULTILINE)
    content = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["kind"] for line in content.splitlines()] == ["run", "train"]
    assert content.endswith("\n")


def test_tensorboard_hides_the_steps_of_a_killed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, loss in ((0, 5.0), (2, 1.0)):
        with MetricsLogger(
            None, total_steps=4, log_interval=9, resume_step=resume_step, tensorboard_dir=tmp_path
        ) as metrics:
            for step in range(resume_step + 1, 5 if resume_step == 0 else 4):
                metrics.log(step, {"loss": loss}, tokens=1, seconds=1.0)
            metrics.log_eval(2, {"loss": 7.0})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 5.0), (2, 5.0), (3, 1.0)]
    assert "eval/loss" in events.Tags()["scalars"] and "seconds/step" in events.Tags()["scalars"]


def test_without_tensorboard_training_goes_on_and_it_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    caplog.set_level(logging.WARNING, "megatron_ring")
    with MetricsLogger(tmp_path, total_steps=2, log_interval=1, tensorboard_dir=tmp_path / "tb") as metrics:
        log_steps(metrics, 1, 2)
    assert len([r for r in caplog.records if "no TensorBoard events" in r.getMessage()]) == 1
    assert len(of_kind(tmp_path / "metrics.jsonl", "train")) == 2


class FakeWandb(ModuleType):
    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.rows, self.ended, self.refuse = [], [], False

    def init(self, **arguments):
        if self.refuse:
            raise self.Error("No API key configured.\nmore lines")
        self.arguments = arguments
        return SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=self.rows.append,
            finish=lambda exit_code: self.ended.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    fake.__spec__ = spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_step_by_its_own_count(tmp_path, wandb):
    run_dir = tmp_path / "ring"
    with MetricsLogger(run_dir, total_steps=9, log_interval=9, resume_step=3, wandb_project="p") as metrics:
        log_steps(metrics, 4, 5)
    assert wandb.arguments["project"] == "p" and wandb.arguments["group"] == "ring"
    assert [row["step"] for row in wandb.rows] == [4, 5] and "train/loss" in wandb.rows[0]
    assert wandb.ended == [0]


def test_wandb_without_login_is_refused_before_any_file_exists(tmp_path, wandb):
    wandb.refuse = True
    with pytest.raises(ConfigError, match=r"--wandb-project p: No API key configured\.; run wandb login"):
        MetricsLogger(tmp_path / "run", total_steps=1, log_interval=1, wandb_project="p")
    assert not Path(tmp_path / "run" / "metrics.jsonl").exists()


def test_durations_and_counts_read_well():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 92, 7509, 273600)] == [
        "0s", "59s", "1m 00s", "1m 32s", "2h 05m", "3d 04h",
    ]  # fmt: skip
    assert [count(n) for n in (7, 950, 12400, 1_234_567, 16_801_974_272)] == [
        "7",
        "950",
        "12.4k",
        "1.23M",
        "16.8G",
    ]


def test_a_full_disk_ends_tensorboard_with_one_warning_and_not_the_run(tmp_path, monkeypatch, caplog, capfd):
    """The writer's thread meets the error first, as it does on a full disk."""
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hook = threading.excepthook
    with MetricsLogger(tmp_path, total_steps=9, log_interval=9, tensorboard_dir=tmp_path / "tb") as metrics:
        monkeypatch.setattr(RecordWriter, "write", full)
        deadline = time.monotonic() + 60
        step = 0
        while not caplog.records and time.monotonic() < deadline:
            step += 1
            metrics.log(step, {"loss": 1.0}, tokens=1, seconds=1.0)
        metrics.log(step + 1, {"loss": 1.0}, tokens=1, seconds=1.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "No space left on device; the run continues without them" in lines[0]
    assert "Traceback" not in capfd.readouterr().err and threading.excepthook is hook
    assert len(of_kind(tmp_path / "metrics.jsonl", "train")) == step + 1


def test_a_resume_writes_on_behind_a_link(tmp_path):
    """The link was replaced by a file, and the one that it names grew no more."""
    target, link = tmp_path / "elsewhere" / "curve.jsonl", tmp_path / "metrics.jsonl"
    target.parent.mkdir()
    target.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n')
    link.symlink_to(target)
    file = MetricsFile(link, resume_step=1)
    file.append({"kind": "train", "step": 2, "loss": 3.0})
    file.close()
    assert link.is_symlink()
    assert [record.get("loss") for record in read_records(target)] == [None, 3.0]

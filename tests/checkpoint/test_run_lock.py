"""One run writes in a run folder; who comes second is told, and who is gone is not waited for."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ring.checkpoint import folder as folders
from megatron_ring.checkpoint import run_lock
from megatron_ring.checkpoint.run_lock import LOCK, STALE_SECONDS, Owner, check_run_folder, hold_run_folder
from megatron_ring.errors import CheckpointError
from tests.helpers.checkpoint.convert_cases import ROOT
from tests.helpers.paths import python_path

HOLD = """
import sys, time
from megatron_ring.checkpoint.run_lock import hold_run_folder
with hold_run_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(300)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": python_path()}


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``tmp_path / "run"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def refused(action) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    return line


def hold(folder: Path) -> None:
    with hold_run_folder(folder):
        pass


def stranger(**values) -> Owner:
    """Somebody on another machine."""
    facts = {"token": "f00d", "host": "node7", "machine": "elsewhere", "pid": 7, "started": 7, "launch": "x"}
    return Owner(**{**facts, **values})


def put(folder: Path, owner: Owner, age: float = 0, name: str = LOCK) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(dataclasses.asdict(owner)))
    moment = time.time() - age
    os.utime(folder / name, (moment, moment))


def test_a_second_run_is_refused_and_the_folder_is_as_it_was(holder, tmp_path):
    run = tmp_path / "run"
    before = (run / LOCK).read_bytes()
    for action in (
        lambda: hold(run),
        lambda: check_run_folder(run, is_save_rank=True),
        lambda: check_run_folder(run, is_save_rank=False),
        lambda: folders.begin(run, 3, 100),
    ):
        line = refused(action)
        assert f"--save {run}: process {holder.pid} on " in line and "stop that run, or name another" in line
    assert [path.name for path in run.iterdir()] == [LOCK] and (run / LOCK).read_bytes() == before


def test_an_entry_point_ends_before_torch_is_there(holder, tmp_path):
    code = "import sys; from megatron_ring.launch.entry import run_entry, start\n"
    code += f"def main():\n    start(['--save', {str(tmp_path / 'run')!r}, '--data-path', {str(tmp_path / 'corpus')!r}])\n"
    code += "try:\n    run_entry(main)\nfinally:\n    assert 'torch' not in sys.modules\n"
    code = code.replace(
        "import run_entry, start", "import run_entry, start; from megatron_ring.launch import entry"
    )
    code = "import sys\n" + code.replace("def main", "entry.check_inputs = lambda *_: None\ndef main")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "writes its checkpoints there" in done.stderr


def test_a_stage_holds_its_folder_and_lets_it_go(holder, tmp_path):
    from megatron_ring.stages.run import open_stage
    from tests.helpers.model.small import config_of

    with (
        pytest.raises(CheckpointError, match="writes its checkpoints there"),
        open_stage(config_of("v2", save=str(tmp_path / "run"))),
    ):
        raise AssertionError("it was let in")
    with open_stage(config_of("v2", save=str(tmp_path / "own"))):
        assert json.loads((tmp_path / "own" / LOCK).read_text())["pid"] == os.getpid()
        folders.begin(tmp_path / "own", 1, 100)
    assert not (tmp_path / "own" / LOCK).exists()


def test_a_killed_run_is_taken_over_at_once(holder, tmp_path, caplog):
    holder.send_signal(signal.SIGKILL)
    # not waited for: a process that is dead and not yet buried is gone
    deadline = time.monotonic() + 30
    while run_lock._started(holder.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    with hold_run_folder(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert f"was held by process {holder.pid}" in caplog.text and "taken over" in caplog.text
    assert list(tmp_path.iterdir()) == [tmp_path / "run"] and list((tmp_path / "run").iterdir()) == []


def test_a_copy_of_a_live_folder_is_free_and_the_original_is_not(holder, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(run, copy)
    hold(copy)
    assert not (copy / LOCK).exists()
    (tmp_path / "link").symlink_to(run)
    for name in (run, tmp_path / "link"):
        assert f"process {holder.pid}" in refused(lambda name=name: hold(name))
    # moved while it runs, it is no copy
    moved = run.rename(tmp_path / "moved")
    assert f"process {holder.pid}" in refused(lambda: hold(moved))


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    here = stranger(machine=run_lock._machine(), pid=os.getppid(), started=1)
    put(tmp_path / "run", here)
    hold(tmp_path / "run")
    put(tmp_path / "run", dataclasses.replace(here, started=run_lock._started(os.getppid()) or 0))
    assert f"process {os.getppid()} on node7" in refused(lambda: hold(tmp_path / "run"))


def test_another_machine_is_believed_as_long_as_it_touches_the_lock(tmp_path):
    put(tmp_path / "run", stranger(), age=STALE_SECONDS - 60)
    assert (
        f"process 7 on node7 writes its checkpoints there; stop that run (or wait {STALE_SECONDS} s"
        in refused(lambda: hold(tmp_path / "run"))
    )
    put(tmp_path / "run", stranger(), age=STALE_SECONDS + 60)
    with hold_run_folder(tmp_path / "run"):
        names = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert names == [LOCK], "claims are taken away"


def test_a_take_over_that_died_in_the_middle_is_taken_over(tmp_path):
    run = tmp_path / "run"
    put(run, stranger(), age=STALE_SECONDS + 60)
    put(run, stranger(token="beef"), age=STALE_SECONDS + 60, name=f"{LOCK}.f00d.claim")
    put(run, stranger(token="cafe"), age=STALE_SECONDS + 60, name=f"{LOCK}.beef.claim")
    with hold_run_folder(run):
        assert [path.name for path in run.iterdir()] == [LOCK]
    put(run, stranger(), age=STALE_SECONDS + 60)
    put(run, stranger(token="beef"), name=f"{LOCK}.f00d.claim")
    assert "node7 writes its checkpoints there" in refused(lambda: hold(run))


def test_the_owner_touches_its_lock_and_says_when_it_is_lost(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.02)
    lock = tmp_path / "run" / LOCK
    with hold_run_folder(tmp_path / "run"):
        os.utime(lock, (1, 1))
        deadline = time.monotonic() + 30
        while lock.stat().st_mtime < 1000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.stat().st_mtime > 1000
        put(tmp_path / "run", stranger())
        while "not this run's any more" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        line = refused(lambda: folders.begin(tmp_path / "run", 1, 100))
        assert "node7 writes its checkpoints there" in line
    assert "not this run's any more" in caplog.text
    assert json.loads(lock.read_text())["host"] == "node7", "another's lock is left alone"


def test_a_run_that_fails_lets_go_and_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), hold_run_folder(tmp_path / "deep" / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_is_held():
    with hold_run_folder(None):
        check_run_folder(None, is_save_rank=True)


def test_ranks_of_the_same_launch_let_each_other_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29555")
    with hold_run_folder(tmp_path / "run"):
        check_run_folder(tmp_path / "run", is_save_rank=False)
        monkeypatch.setenv("MASTER_PORT", "29556")
        assert "writes its checkpoints there" in refused(
            lambda: check_run_folder(tmp_path / "run", is_save_rank=False)
        )


@pytest.mark.parametrize("text", ["", "\0" * 200, "{", "[]", "{}", '{"token": 3}', "[" * 9000])
def test_a_damaged_lock_is_stale_when_nobody_touches_it(tmp_path, text):
    """A power cut or a full disk leaves such a one: its run may start again."""
    (tmp_path / LOCK).write_text(text)
    line = refused(lambda: hold(tmp_path))
    assert f"--save {tmp_path}: an unknown process (its {LOCK} is damaged)" in line and "wait 300 s" in line
    moment = time.time() - STALE_SECONDS - 60
    os.utime(tmp_path / LOCK, (moment, moment))
    hold(tmp_path)
    put(tmp_path, stranger(), age=STALE_SECONDS + 60)
    (tmp_path / f"{LOCK}.f00d.claim").write_text(text)
    os.utime(tmp_path / f"{LOCK}.f00d.claim", (moment, moment))
    hold(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / LOCK).write_text("x" * 20_000)
    assert f"{tmp_path / LOCK}: has 20,000 bytes" in refused(lambda: hold(tmp_path))
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).mkdir()
    assert f"{tmp_path / LOCK}: is no plain file" in refused(lambda: hold(tmp_path))


def test_a_clock_that_was_put_back_holds_no_folder(tmp_path):
    put(tmp_path, stranger(), age=-10_000)
    hold(tmp_path)
    put(tmp_path, stranger(), age=-STALE_SECONDS + 60)
    assert "node7 writes its checkpoints there" in refused(lambda: hold(tmp_path))


def test_without_hard_links_one_still_wins(tmp_path, monkeypatch):
    def no_links(*_args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with hold_run_folder(tmp_path):
        assert "writes its checkpoints there" in refused(lambda: hold(tmp_path))
    put(tmp_path, stranger(), age=STALE_SECONDS + 60)
    hold(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_eight_that_start_at_once_one_wins(tmp_path, stale):
    rounds = 30
    for number in range(rounds if stale else 0):
        put(tmp_path / str(number), stranger(token=f"a{number}"), age=STALE_SECONDS + 60)
    words = [sys.executable, "-m", "tests.helpers.checkpoint.lock_worker", str(tmp_path), "8", str(rounds)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] * rounds
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left behind"

"""What a rank has started ends with it, even where it was killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_ring.runtime.orphans import PEER_IS_GONE
from tests.helpers.paths import python_path

ROOT = Path(__file__).resolve().parents[2]

# prints the processes it has started, and waits
RESULTS_QUEUE = """
import psutil, time
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron_ring.runtime.megatron_fixes import megatron_fixes

if __name__ == "__main__":
    with megatron_fixes():
        queue = filesystem_async._get_write_results_queue()
        queue.put(7)
        assert queue.get() == 7
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        time.sleep(300)
"""
WRITER = """
import multiprocessing, time
from megatron_ring.runtime.orphans import forked_writer

if __name__ == "__main__":
    writer = multiprocessing.get_context("fork").Process(target=forked_writer(time.sleep), args=(300,))
    writer.start()
    print(writer.pid, flush=True)
    writer.join()
"""
REFUSED = """
import multiprocessing
from megatron_ring.runtime.orphans import forked_writer

def write():
    raise ConnectionRefusedError

if __name__ == "__main__":
    writer = multiprocessing.get_context("fork").Process(target=forked_writer(write))
    writer.start()
    writer.join()
    print(writer.exitcode)
"""


def left_by(code: str, folder: Path) -> list[psutil.Process]:
    """What is still there half a minute after the process has been killed, of what it had started."""
    script = folder / "parent.py"
    script.write_text(code)
    command = [sys.executable, "-W", "ignore", str(script)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": python_path()}
    ) as parent:
        assert parent.stdout is not None
        started = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert started
    deadline = time.monotonic() + 30
    while any(map(_is_there, started)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [process for process in started if _is_there(process)]
    for process in left:
        process.kill()
    return left


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_queue_of_a_checkpoints_writers_ends_with_a_killed_rank(tmp_path: Path):
    assert left_by(RESULTS_QUEUE, tmp_path) == []


def test_a_writer_ends_with_a_killed_rank(tmp_path: Path):
    assert left_by(WRITER, tmp_path) == []


def test_a_writer_whose_rank_is_leaving_says_nothing(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(REFUSED)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": python_path()},
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_rank_behind_a_shell_ends_with_its_launcher():
    namespace = os.stat("/proc/self/ns/pid").st_ino
    rank = (
        "import time; from megatron_ring.runtime.orphans import end_with_launcher as end; "
        "end(); print(1, flush=True); time.sleep(300)"
    )
    with subprocess.Popen(["sleep", "300"]) as launcher:
        env = {
            "PYTHONPATH": python_path(),
            "TORCHELASTIC_RUN_ID": "1",
            "MEGATRON_RING_LAUNCHER": f"{launcher.pid}/{namespace}",
        }
        # its parent lives on, as a wrapping shell does
        with subprocess.Popen(
            [sys.executable, "-c", rank], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as started:
            assert started.stdout is not None and started.stdout.readline() == "1\n"
            launcher.kill()
            launcher.wait()
            try:
                _, said = started.communicate(timeout=60)
            finally:
                started.kill()
    assert started.returncode == PEER_IS_GONE and f"process {launcher.pid}" in said

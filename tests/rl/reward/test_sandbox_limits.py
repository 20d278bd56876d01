"""What a run may use: CPU seconds of all its processes decide, wall clock at a multiple, memory that shows or not."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_ring.rl.reward.sandbox import command as sandbox_command
from megatron_ring.rl.reward.sandbox import run as sandbox_run
from megatron_ring.rl.reward.sandbox.command import Limits, Program
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from tests.helpers.reward.judging import sandbox_processes

PATIENT = Limits(seconds=100.0, wall_seconds=200.0, memory_mb=256)
BURN = "import time, os\ndef burn(s):\n    t = time.process_time()\n    while time.process_time() - t < s: pass\n"


def test_wall_clock_is_a_multiple_of_the_cpu_seconds_unless_given():
    assert Limits(seconds=3.0).wall == 15.0
    assert Limits(seconds=3.0, wall_seconds=4.0).wall == 4.0
    assert Limits(seconds=3.0, wall_seconds=0.0).wall == 0.0


def test_time_spent_waiting_is_not_the_programs(sandbox: Sandbox):
    limits = Limits(seconds=0.6, wall_seconds=200.0)
    source = BURN + "time.sleep(0.8); burn(0.2); print(2)"
    result = sandbox.run(sandbox.python(source), limits)
    assert (result.status, result.stdout) == ("ok", b"2\n")
    assert result.seconds > 0.9 and 0.2 <= result.cpu_seconds < 0.6


def test_a_sleeper_ends_at_the_multiple(sandbox: Sandbox):
    result = sandbox.run(sandbox.python("import time; time.sleep(600)"), Limits(seconds=0.1))
    assert result.status == "timeout" and result.exit_code is None
    assert result.seconds >= 0.5 and result.cpu_seconds < 0.1
    assert sandbox_processes() == []


TOGETHER = {
    "at the same time": "for _ in range(4):\n    if os.fork() == 0: burn(0.4); os._exit(0)\nfor _ in range(4): os.wait()",
    "one after another": "for _ in range(4):\n    if os.fork() == 0: burn(0.4); os._exit(0)\n    os.wait()",
    "threads": "import hashlib, threading\ndef f():\n    for _ in range(900): hashlib.sha512(b'x' * 4000000)\n"
    "ts = [threading.Thread(target=f) for _ in range(3)]\nfor t in ts: t.start()",
    "orphans": "for _ in range(4):\n    if os.fork() == 0:\n        if os.fork() == 0: burn(0.4)\n        os._exit(0)\n"
    "    os.wait()\ntime.sleep(600)",
    "ignored children": "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nfor _ in range(8):\n"
    "    if os.fork() == 0: burn(0.3); os._exit(0)\n    try: os.wait()\n    except ChildProcessError: pass",
    "at the end": "burn(0.65)",
    "in the kernel": "f = open('/dev/urandom', 'rb')\nwhile True: f.read(1 << 20)",
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_the_cpu_seconds_of_all_processes_count_together(sandbox: Sandbox, name: str):
    limits = Limits(seconds=0.6, wall_seconds=200.0)
    result = sandbox.run(sandbox.python(BURN + TOGETHER[name]), limits)
    assert result.status == "timeout" and result.cpu_seconds > 0.6
    assert sandbox_processes() == []


def test_the_same_children_pass_where_they_are_within_the_limit(sandbox: Sandbox):
    result = sandbox.run(sandbox.python(BURN + TOGETHER["at the same time"]), PATIENT)
    assert result.status == "ok" and 1.6 <= result.cpu_seconds < 100


def test_a_program_that_ignores_the_kernels_signal_is_cut(sandbox: Sandbox):
    source = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    result = sandbox.run(sandbox.python(source), Limits(seconds=0.3, wall_seconds=200.0))
    assert result.status == "timeout" and result.exit_code is None


HIDDEN = {
    "page tables": (
        "import ctypes, mmap\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(8 << 30), 1, 0x4022, -1, 0)\n"
        "for n in range(0, 8 << 30, 2 << 20): ctypes.string_at(at + n, 1)\nprint('held', flush=True)\n"
        "import time; time.sleep(600)",
        Limits(seconds=100.0, wall_seconds=200.0, memory_mb=24, address_space=False),
    ),
    "pages shared through a file": (
        "import mmap, os, time\n"
        "for n in range(8):\n    fd = os.open(f'/tmp/{n}', os.O_CREAT | os.O_RDWR); os.ftruncate(fd, 8 << 20)\n"
        "    room = mmap.mmap(fd, 8 << 20); room[:] = bytes(8 << 20); globals()[f'r{n}'] = room\ntime.sleep(600)",
        Limits(seconds=100.0, wall_seconds=200.0, memory_mb=48, address_space=False),
    ),
    "a process with much address space": (
        "import ctypes, time\nkept = []\nwhile True: kept.append(b'x' * (1 << 20))",
        Limits(seconds=100.0, wall_seconds=200.0, memory_mb=128, address_space=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_memory_counts_where_the_address_space_does_not_bound_it(sandbox: Sandbox, name: str):
    source, limits = HIDDEN[name]
    result = sandbox.run(sandbox.python(source), limits)
    assert result.status == "memory", result


def test_every_run_has_a_bounded_address_space(sandbox: Sandbox):
    source = "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[1] >> 20)"
    for words, wanted in ({}, 100), ({"address_space": False}, 100 + sandbox_command.RESERVED_MB):
        limits = Limits(seconds=100.0, wall_seconds=200.0, memory_mb=100, **words)
        assert int(sandbox.run(sandbox.python(source), limits).stdout) == wanted


def test_what_honest_programs_use_still_works(sandbox: Sandbox):
    source = """
import asyncio, json, mmap, os, shutil, sqlite3, subprocess, tempfile, threading
out = []
with tempfile.NamedTemporaryFile() as file:
    file.write(b'x' * 100000); file.flush()
    out.append(len(shutil.copyfile(file.name, '/tmp/copy')))
    with mmap.mmap(file.fileno(), 0) as shared: out.append(shared[:2].decode())
with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own: out.append(len(own))
shutil.copy2('/tmp/copy', '/tmp/copy2'); os.link('/tmp/copy', '/tmp/link')
out.append(sqlite3.connect(':memory:').execute('select 6 * 7').fetchone()[0])
out.append(subprocess.run(['cat', '/tmp/link'], capture_output=True).stdout.count(b'x'))
async def twice(n): await asyncio.sleep(0); return 2 * n
async def main(): return await asyncio.gather(*map(twice, range(3)))
out.append(asyncio.run(main()))
t = threading.Thread(target=out.append, args=('thread',)); t.start(); t.join()
print(json.dumps(out))
"""
    result = sandbox.run(sandbox.python(source), PATIENT)
    assert result.status == "ok", result.stderr.decode()
    assert json.loads(result.stdout) == [9, "xx", 1 << 20, 42, 100000, [0, 2, 4], "thread"]


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
def test_what_goes_to_standard_error_fails_no_program_for_a_while(sandbox: Sandbox):
    source = "import sys\nfor n in range(15):\n    print('x' * 999, file=sys.stderr)\nprint('right')"
    limits = Limits(seconds=100.0, wall_seconds=200.0, output_bytes=1000)
    result = sandbox.run(sandbox.python(source), limits)
    assert (result.status, result.stdout) == ("ok", b"right\n")
    assert sandbox.run(sandbox.python(source.replace("15", "17")), limits).status == "output_limit"


def test_a_flood_is_cut_and_what_is_kept_is_bounded(sandbox: Sandbox):
    limits = Limits(seconds=100.0, wall_seconds=200.0, output_bytes=1000)
    program = Program(argv=("/usr/bin/sh", "-c", "while :; do echo flood; done"), files={})
    result = sandbox.run(program, limits)
    assert (result.status, len(result.stdout), result.exit_code) == ("output_limit", 1000, None)
    exact = sandbox.run(sandbox.python("print('x' * 999)"), limits)
    assert (exact.status, len(exact.stdout)) == ("ok", 1000)


def test_exit_codes_are_those_of_a_shell(sandbox: Sandbox):
    for script, code, status in [
        ("exit 0", 0, "ok"),
        ("exit 7", 7, "crashed"),
        ("kill -9 $$", 137, "crashed"),
        ("kill -TERM $$", 143, "crashed"),
        ("kill -XCPU $$", 152, "timeout"),
        ("kill -XFSZ $$", 153, "output_limit"),
    ]:
        result = sandbox.run(Program(argv=("/usr/bin/sh", "-c", script), files={}), PATIENT)
        assert (result.exit_code, result.status) == (code, status), script


def test_a_run_that_ends_by_itself_is_hardly_looked_at(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    looks = []
    look = sandbox_run._poll_usage
    monkeypatch.setattr(sandbox_run, "_poll_usage", lambda watched: looks.append(1) or look(watched))
    result = sandbox.run(sandbox.python("import time; time.sleep(1)"), PATIENT)
    assert len(looks) <= 8 + result.seconds / 0.1

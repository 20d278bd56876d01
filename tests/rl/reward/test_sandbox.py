"""Hostile code gets its value, and the machine does not notice. Everything here runs in the real sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox import command as sandbox_command
from megatron_ring.rl.reward.sandbox import sandbox as sandbox_module
from megatron_ring.rl.reward.sandbox import zygote_handle as sandbox_process
from megatron_ring.rl.reward.sandbox.command import Limits
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from tests.helpers.reward.judging import PATIENCE, becomes, own_processes, sandbox_processes

ROOT = Path(__file__).parents[3]
SHORT = Limits(seconds=1.0, wall_seconds=2.0, memory_mb=256)
"""For runs that never end: a busy machine has to let them start."""
PATIENT = Limits(seconds=200.0, wall_seconds=200.0, memory_mb=256)
"""For runs that end by themselves: a busy machine must not turn them into timeouts."""

FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
MANY_SMALL_HOGS = """
import os, time
for _ in range(15):
    if os.fork() == 0:
        hog = b"x" * (60 << 20)
        time.sleep(600)
time.sleep(600)
"""
DEAF_LOOP = """
import signal
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
HOSTILE = {
    "fork bomb": (FORK_BOMB, "timeout"),
    "10 GB at once": ("hog = bytearray(10 << 30)", "memory"),
    "a little in each of many processes": (MANY_SMALL_HOGS, "memory"),
    "endless output": ("while True: print('x' * 1000)", "output_limit"),
    "endless errors": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "output_limit"),
    "endless loop": ("while True: pass", "timeout"),
    "endless loop that ignores signals": (DEAF_LOOP, "timeout"),
    "sleep": ("import time; time.sleep(600)", "timeout"),
    "closed output and sleep": ("import os, time; os.close(1); os.close(2); time.sleep(600)", "timeout"),
    "200 MB file": ("open('/tmp/big', 'wb').write(b'x' * (200 << 20))", "crashed"),
    "all of /tmp": (
        "for n in range(99): open(f'/tmp/{n}', 'wb').write(b'x' * (8 << 20))",
        "crashed",
    ),
    "bad exit": ("import os; os._exit(7)", "crashed"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "crashed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_gets_its_value_and_leaves_nothing(sandbox: Sandbox, name: str):
    source, status = HOSTILE[name]
    limits = SHORT if status == "timeout" else PATIENT
    started = time.monotonic()
    result = sandbox.run(sandbox.python(source), limits)
    assert result.status == status, result.stderr.decode(errors="replace")
    assert len(result.stdout) <= limits.output_bytes
    assert time.monotonic() - started < limits.wall + PATIENCE
    assert sandbox_processes() == []


def inside(sandbox: Sandbox, body: str, *words: str) -> list:
    """What ``body`` leaves in ``out`` inside; ``tried(f)`` notes f's result, or its error's name."""
    source = (
        "import ctypes, json, os, sys, time\nout = []\ndef tried(f):\n    try:\n        out.append(repr(f())[:80])\n"
        "    except BaseException as error:\n        out.append(type(error).__name__)\n"
        f"{body}\nprint(json.dumps(out))\n"
    )
    result = sandbox.run(sandbox.python(source, *words), PATIENT)
    assert result.status == "ok", result
    return json.loads(result.stdout)


def test_no_network_not_even_to_this_machine(sandbox: Sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        body = f"import socket\ntried(lambda: socket.create_connection(('127.0.0.1', {server.getsockname()[1]})))"
        assert inside(sandbox, body) == ["PermissionError"]
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_of_the_machine_can_be_read(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("RING_SECRET", "secret")
    paths = [
        "/root",
        "/home",
        "/etc/shadow",
        "/etc/passwd",
        "/var",
        "/work",
        str(ROOT),
        str(tmp_path / "secret"),
    ]
    body = (
        "for path in sys.argv[1:]:\n    tried(lambda: os.listdir(path) if os.path.isdir(path) else open(path).read())\n"
        "tried(lambda: open('/proc/1/environ', 'rb').read())\n"
        "out.append(sorted(os.environ))\nout.append(sorted(os.listdir('/')))"
    )
    *reads, first, environment, root = inside(sandbox, body, *paths)
    assert first == "FileNotFoundError"
    assert reads == ["FileNotFoundError"] * len(paths)
    assert "RING_SECRET" not in environment and set(environment) <= {
        "PATH",
        "HOME",
        "LANG",
        "PWD",
        "LC_CTYPE",
    }
    assert set(root) <= {"bin", "code", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "tmp", "usr"}


def test_nothing_outside_its_own_tmp_can_be_written(sandbox: Sandbox, tmp_path: Path):
    name = f"ring-sandbox-{secrets.token_hex(8)}"
    folders = [
        "/",
        "/usr/bin",
        "/dev",
        "/dev/shm",
        "/code",
        "/etc",
        "/proc/sys/kernel",
        "/tmp",
        "/tmp/deep/er",
    ]
    body = (
        "for folder in sys.argv[2:]:\n    tried(lambda: open(os.path.join(folder, sys.argv[1]), 'w').write('x'))\n"
        "tried(lambda: open('/code/main.py', 'w'))\ntried(lambda: os.write(os.open('/proc/self/fd/0', os.O_WRONLY), b'x'))"
    )
    answers = inside(sandbox, body, name, *folders)
    assert answers[folders.index("/tmp")] == answers[folders.index("/dev/shm")] == "1"
    assert [a for a in answers if a != "1"] == [a for a in answers if a.endswith("Error")]
    assert answers.count("1") == 2
    assert not any(
        Path(folder, name).exists() for folder in ["/", "/tmp", "/dev/shm", "/usr/bin", "/var/tmp"]
    )


def test_no_process_outside_can_be_seen_killed_or_traced(sandbox: Sandbox):
    body = (
        "tried(lambda: os.kill(os.getppid(), 9))\ntried(lambda: os.kill(1, 9))\n"
        f"tried(lambda: os.kill({os.getpid()}, 9))\n"
        "tried(lambda: os.kill(-1, 9))\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "out.append([libc.ptrace(16, os.getppid(), 0, 0), ctypes.get_errno()])\n"
        "out.append([libc.ptrace(0, 0, 0, 0), ctypes.get_errno()])\n"
        "out.append(max(int(n) for n in os.listdir('/proc') if n.isdigit()) < 10)"
    )
    answers = inside(sandbox, body)
    assert answers[2] == "ProcessLookupError"
    assert answers[-3:] == [[-1, 1], [-1, 1], True]
    assert inside(sandbox, "tried(lambda: 1)") == ["1"]


def test_memory_that_no_process_shows_cannot_be_made(sandbox: Sandbox):
    body = (
        "libc = ctypes.CDLL(None, use_errno=True)\ntried(lambda: os.memfd_create('x'))\n"
        "out.append(libc.shmget(5, ctypes.c_size_t(1 << 30), 0o1600))\n"
        "tried(lambda: open('/dev/shm/x', 'wb', 0).write(bytes(1 << 20)))\n"
        "tried(lambda: open('/dev/shm/y', 'wb', 0).write(bytes(1 << 20)))\n"
        # where the machine lets sockets have large buffers, one run held 5.8 GB in them
        "import socket\na, b = socket.socketpair()\n"
        "tried(lambda: a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 26))"
    )
    assert inside(sandbox, body) == ["OSError", -1, str(1 << 20), "OSError", "PermissionError"]


def test_daemons_and_zombies_end_with_the_run(sandbox: Sandbox):
    source = """
import os, signal, time
for number in range(8):
    if os.fork() == 0:
        if number % 2:
            os._exit(0)
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
print("done")
"""
    result = sandbox.run(sandbox.python(source), PATIENT)
    assert (result.status, result.stdout) == ("ok", b"done\n")
    assert sandbox_processes() == []


def test_a_run_cut_at_any_moment_of_its_start_leaves_nothing(sandbox: Sandbox):
    for number in range(100):
        wall = number * 0.0003
        result = sandbox.run(sandbox.python("while True: pass"), Limits(seconds=5.0, wall_seconds=wall))
        assert result.status == "timeout"
        assert sandbox_processes() == [], f"cut after {1e3 * wall:.1f} ms"


def test_what_is_left_would_be_seen(sandbox: Sandbox):
    """A sandbox at work, and a process whose parent is dead."""

    def run_for_ever() -> None:
        with contextlib.suppress(RewardError):  # its bwrap is killed below
            sandbox.run(sandbox.python("while True: pass"), PATIENT)

    run = threading.Thread(target=run_for_ever)
    run.start()
    assert becomes(lambda: any("/code/main.py" in words for words in sandbox_processes()))
    for process in own_processes():
        if process.name() == "bwrap":
            process.kill()
    run.join()
    assert sandbox_processes() == []
    script = "sleep 600 >/dev/null & echo $!"
    orphan = int(subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout)
    assert psutil.Process(orphan) in own_processes()
    os.kill(orphan, signal.SIGKILL)
    assert becomes(lambda: psutil.Process(orphan) not in own_processes())


def test_runs_start_afresh_and_read_their_input(sandbox: Sandbox):
    source = "import os\nprint(input(), os.listdir('/tmp'))\nopen('/tmp/left', 'w')"
    for _ in range(2):
        assert sandbox.run(sandbox.python(source), PATIENT, b"16\n").stdout == b"16 []\n"


def test_no_descriptor_is_left_open(sandbox: Sandbox):
    before = os.listdir("/proc/self/fd")
    for source in ("print(1)", "while True: pass", "while True: print('x' * 1000)"):
        sandbox.run(sandbox.python(source), Limits(seconds=0.3, wall_seconds=0.6))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_without_bubblewrap_it_refuses_and_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **words: None if name == "bwrap" else which(name, **words)
    )
    with pytest.raises(RewardError, match=r"bwrap is not installed.*run tools/setup_sandbox\.sh$"):
        Sandbox.open()


def test_without_a_filter_it_refuses(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    import tempfile

    import pyseccomp

    with tempfile.TemporaryFile() as file:
        pyseccomp.SyscallFilter(pyseccomp.ALLOW).export_bpf(file)
        file.seek(0)
        nothing = file.read()
    monkeypatch.setattr(sandbox_process, "seccomp_program", lambda: nothing)
    with pytest.raises(RewardError, match="does not isolate: sockets can be made, ptrace works"):
        Sandbox.open()


@pytest.mark.parametrize(
    ("wall", "instead", "hole"),
    [
        (("--remount-ro", "/"), (), "the root directory can be written"),
        (("--remount-ro", "/dev"), (), "/dev can be written"),
        (
            ("--unshare-all",),
            ("--unshare-user", "--unshare-net"),
            "processes outside are visible|did not start",
        ),
        (("--remount-ro", "/dev"), ("--ro-bind", "/etc", "/etc"), "/etc/passwd is visible"),
    ],
)
def test_without_a_wall_it_refuses(sandbox, monkeypatch: pytest.MonkeyPatch, wall, instead, hole: str):
    whole = sandbox_command.command

    def without(*words):
        argv = whole(*words)
        at = next(n for n in range(len(argv)) if tuple(argv[n : n + len(wall)]) == wall)
        return [*argv[:at], *instead, *argv[at + len(wall) :]]

    monkeypatch.setattr(sandbox_process, "command", without)
    with pytest.raises(RewardError, match=hole):
        Sandbox.open()


def test_a_check_that_fails_is_no_sandbox(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox_module, "_PROBE", "import no_such_module")
    with pytest.raises(RewardError, match=r"own check ended with crashed: .*no_such_module"):
        Sandbox.open()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start as somebody else")
def test_it_works_for_users_who_are_not_root(sandbox: Sandbox):
    # forked rather than started: the environment's interpreter may be readable by root alone
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(FOREIGN_UID)
            os.setuid(FOREIGN_UID)
            code = 0 if inside(Sandbox.open(), "out.append(os.getuid())") == [65534] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FOREIGN_UID = sandbox_command.FIRST_UID + 1500

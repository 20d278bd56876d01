"""The process that stands ready: an interpreter like a fresh one, replaced when it dies, gone when its owner is."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox import run as sandbox_run
from megatron_ring.rl.reward.sandbox import zygote_handle as sandbox_process
from megatron_ring.rl.reward.sandbox.command import Limits, Program
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from megatron_ring.rl.reward.sandbox.zygote_handle import ZygoteHandle
from tests.helpers.reward.judging import becomes, own_processes, sandbox_processes, zygotes

PATIENT = Limits(seconds=100.0, wall_seconds=200.0, memory_mb=256)

LIKE_A_FRESH_ONE = {
    "words": "import sys; print(sys.argv, sys.orig_argv, sys.path, sys.flags, sys.executable, sys.warnoptions)",
    "globals": "print(sorted(globals()), __name__, __file__, __doc__, __spec__, __loader__, type(__builtins__))",
    "main": "import sys, __main__; print(vars(__main__) is globals(), sys.modules['__main__'] is __main__)",
    "streams": (
        "import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr):\n    print(s, s.line_buffering, s.write_through, "
        "s.errors, s.newlines, s.buffer, s.isatty(), s.seekable(), s is sys.__stdout__, s.fileno())"
    ),
    "lines": "import sys\nprint(repr(input()), repr(sys.stdin.readline()), repr(sys.stdin.read()))",
    "input again": "print(sum(1 for _ in open(0)), open('/dev/stdin').read())",
    "environment": "import os; print(sorted(os.environ.items()), os.getcwd(), os.umask(0), os.getppid())",
    "signals": (
        "import signal\nprint([(n, signal.getsignal(n)) for n in range(1, 65) if signal.getsignal(n) is not None], "
        "signal.pthread_sigmask(0, []))"
    ),
    "limits": "import resource, sys\nprint([resource.getrlimit(n) for n in range(16)], sys.getrecursionlimit())",
    "traceback": "def f(n):\n    return 1 / n if n == 0 else f(n - 1)\nprint('x')\nf(3)",
    "chained": "try:\n    {}['k']\nexcept KeyError as e:\n    raise ValueError('bad') from e",
    "group": "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
    "no syntax": "def f(:\n    pass",
    "latin source": "# coding: latin-1\nprint(len('\u00e9'))",
    "exit": "raise SystemExit",
    "exit code": "import sys; sys.exit(300)",
    "exit below": "import sys; sys.exit(-1)",
    "exit far": "import sys; sys.exit(10 ** 30)",
    "exit in a hook": "import sys; sys.excepthook = lambda *a: sys.exit(4); 1 / 0",
    "odd modules": "import sys\nclass M: x = 1\nsys.modules['m'] = M; sys.modules['n'] = None; print(1)",
    "exit word": "import sys; sys.exit('so long')",
    "exit object": "raise SystemExit((1, 2))",
    "exit deep": "def f():\n    try:\n        raise SystemExit(3)\n    finally:\n        print('finally')\nf()",
    "left at once": "import os; print('lost'); os._exit(5)",
    "interrupt": "raise KeyboardInterrupt",
    "own interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "term": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "hook": "import sys; sys.excepthook = lambda *a: print('hook', a[0].__name__, a[2].tb_lineno); 1 / 0",
    "bad hook": "import sys\ndef hook(*a): raise ValueError('in the hook')\nsys.excepthook = hook\n1 / 0",
    "exit functions": "import atexit; atexit.register(print, 'one'); atexit.register(print, 'two'); print('three')",
    "exit function fails": "import atexit; atexit.register(lambda: 1 / 0); print('x')",
    "thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "daemon": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()",
    "thread fails": "import threading\nthreading.Thread(target=lambda: 1 / 0, name='t').start()",
    "last object": "class A:\n    def __del__(self): print('deleted')\na = A()\nb = A(); b.me = b",
    "last file": "import os\nf = os.fdopen(os.dup(1), 'w'); f.write('kept by a global')",
    "text kept for the end": (
        "import atexit, io, sys\nsys.stdout = io.StringIO()\nprint('x')\n"
        "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))"
    ),
    "writer on a module": "import os, sys\nsys.out = os.fdopen(os.dup(1), 'w'); sys.out.write('kept by sys')",
    "writer in a function": "import os\ndef f(o): return lambda: o\nos.f = f(open(1, 'wb'))\nos.f().write(b'x')",
    "closed output": "import sys; sys.stdout.close()",
    "output that fails": "import os; print('x'); os.close(1)",
    "no output": "import sys; sys.stdout = None; print('x')",
    "libc": "import ctypes; ctypes.CDLL(None).puts(b'from libc')",
    "undecodable": "import sys; print(ascii(sys.stdin.read())); print('\\udc80')",
    "fork": "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait(); print('parent')",
    "process": "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(3)'], capture_output=True))",
    "asyncio": "import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))",
    "pool": "from concurrent.futures import ThreadPoolExecutor as P\nprint(list(P(3).map(abs, [-1, -2])))",
    "hash randomised": "import sys; print(sys.flags.hash_randomization, hash(1), hash(2.5), hash((1, 2)))",
    "huge number": "print(10 ** 5000)",
    "deep": "def f(n): return n and f(n - 1)\nprint(f(990))",
    "too deep": "def f(n): return f(n + 1)\ntry:\n    f(0)\nexcept RecursionError as e:\n    print(e)",
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_A_FRESH_ONE)
def test_a_program_finds_what_it_would_find_in_a_fresh_interpreter(sandbox: Sandbox, name: str):
    ready = sandbox.python(LIKE_A_FRESH_ONE[name], "a word", "")
    fresh = dataclasses.replace(ready, ready_python=False)
    stdin = b"one\r\ntwo\rthree\n\xff\x00 four"
    results = [sandbox.run(program, PATIENT, stdin) for program in (ready, fresh)]
    found = [(r.status, r.exit_code, _plain(r.stdout), _plain(r.stderr)) for r in results]
    assert found[0] == found[1]


def _plain(text: bytes) -> str:
    """Without what differs from one process to the next."""
    import re

    return re.sub(r"0x[0-9a-f]+|\b140\d{12}\b", "ADDRESS", text.decode(errors="backslashreplace"))


MULTIPROCESSING = {
    "pool": "with multiprocessing.Pool(2) as p:\n        print(p.map(abs, [-1, -2]))",
    "queue": "q = multiprocessing.Queue(); p = multiprocessing.Process(target=q.put, args=([1, 2],)); p.start()\n"
    "    print(q.get()); p.join()",
    "executor": "from concurrent.futures import ProcessPoolExecutor as P\n    print(list(P(2).map(abs, [-1, -2])))",
    "shared value": "v = multiprocessing.Value('i', 2)\n    with v.get_lock():\n        print([1, v.value])",
}


@pytest.mark.parametrize("name", MULTIPROCESSING)
def test_multiprocessing_works_inside(sandbox: Sandbox, name: str):
    source = f"import multiprocessing\nif __name__ == '__main__':\n    {MULTIPROCESSING[name]}\n"
    result = sandbox.run(sandbox.python(source), PATIENT)
    assert (result.status, result.stdout) == ("ok", b"[1, 2]\n"), result.stderr


def test_a_run_has_no_descriptor_of_its_owners_however_many_that_one_has_open(sandbox: Sandbox):
    """Above a number that was thought to be the highest, the zygote's socket to its owner stayed open in the run."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(200)]
    try:
        crowded = Sandbox(sandbox._python)
        source = "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
        assert crowded.run(crowded.python(source), PATIENT).stdout == b"[0, 1, 2, 3]\n"
        crowded.close()
    finally:
        for fd in opened:
            os.close(fd)


def test_what_the_owner_ignores_holds_back_or_has_closed_is_not_the_runs(sandbox: Sandbox):
    code = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGXCPU])
said = os.dup(1)
os.closerange(0, 3)
from megatron_ring.rl.reward.sandbox.command import Limits
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
sandbox = Sandbox.open()
source = "import signal as s; print(s.pthread_sigmask(0, []), [n for n in s.valid_signals() if s.getsignal(n) == 1])"
os.write(said, sandbox.run(sandbox.python(source), Limits(seconds=100.0)).stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=200)
    # the interpreter itself ignores these two
    wanted = f"set() {[signal.SIGPIPE, signal.SIGXFSZ]}\n"
    assert done.stdout.decode() == wanted, done.stderr


def test_any_number_that_stood_ready_may_be_killed_together(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
):
    crowd = Sandbox(sandbox._python)
    crowd._idle += [ZygoteHandle.start(sandbox._python) for _ in range(4)]
    for zygote in crowd._idle:
        signal.pidfd_send_signal(zygote.pidfd, signal.SIGKILL)
    # they were looked at before they were killed
    monkeypatch.setattr(ZygoteHandle, "is_idle", lambda self: True)
    assert crowd.run(crowd.python("print(1)"), PATIENT).stdout == b"1\n"
    crowd.close()


def test_nothing_random_is_the_same_twice(sandbox: Sandbox):
    source = (
        "import os, random, secrets, tempfile, uuid\n"
        "print(random.random(), secrets.token_hex(4), uuid.uuid4(), tempfile.mktemp(), random.SystemRandom().random(), "
        "os.urandom(4).hex(), random.Random().random())"
    )
    words = [sandbox.run(sandbox.python(source), PATIENT).stdout.split() for _ in range(3)]
    assert all(len(set(column)) == 3 for column in zip(*words, strict=True))


def test_many_threads_run_at_once_and_each_gets_its_own(sandbox: Sandbox):
    source = "import time; n = int(input()); time.sleep(n % 3 / 100); print(n * n)"

    def one(n: int) -> bool:
        return sandbox.run(sandbox.python(source), PATIENT, str(n).encode()).stdout == b"%d\n" % (n * n)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(48)))
    assert sandbox_processes() == []


def test_one_that_was_killed_or_hangs_while_idle_is_replaced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox_run, "START_SECONDS", 3.0)
    sandbox = Sandbox.open()
    program = sandbox.python("print(3)")
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        for process in _zygote_processes(sandbox):
            process.send_signal(number)
        time.sleep(0.05)
        assert sandbox.run(program, PATIENT).stdout == b"3\n"
    ready = len(zygotes())
    sandbox.close()
    assert len(zygotes()) == ready - 1 and sandbox.run(program, PATIENT).stdout == b"3\n"
    sandbox.close()


def _zygote_processes(sandbox: Sandbox) -> list:
    pids = [sandbox_process.process_of(zygote.pidfd) for zygote in sandbox._idle if zygote.pidfd is not None]
    return [process for process in own_processes() if process.pid in pids]


def test_one_that_is_killed_during_a_run_is_an_error_in_one_line(sandbox: Sandbox):
    sandbox = Sandbox.open()
    (process,) = _zygote_processes(sandbox)
    errors = []

    def run() -> None:
        try:
            sandbox.run(sandbox.python("while True: pass"), PATIENT)
        except RewardError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert becomes(lambda: sandbox_processes() != [])
    process.kill()
    thread.join()
    assert errors == [
        "the sandbox was killed during a run (it said nothing); free memory, or find out who killed it"
    ] and becomes(lambda: sandbox_processes() == [])
    assert sandbox.run(sandbox.python("print(3)"), PATIENT).stdout == b"3\n"
    sandbox.close()


@pytest.mark.parametrize("busy", [True, False])
def test_it_ends_with_its_owner_even_by_kill(sandbox: Sandbox, busy: bool):
    before = len(zygotes())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            own = Sandbox.open()
            os.write(write, b"x")
            own.run(own.python("while True: pass" if busy else "1"), PATIENT)
            time.sleep(600)
        finally:
            os._exit(1)
    assert os.read(read, 1) == b"x"
    assert becomes(lambda: len(zygotes()) == before + 1 and len(sandbox_processes()) == 2 * busy)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert becomes(lambda: len(zygotes()) == before and sandbox_processes() == [])
    os.close(read)
    os.close(write)


def test_it_outlives_the_thread_that_started_it():
    sandboxes: list[Sandbox] = []
    thread = threading.Thread(target=lambda: sandboxes.append(Sandbox.open()))
    thread.start()
    thread.join()
    (sandbox,) = sandboxes
    (before,) = [zygote.pidfd for zygote in sandbox._idle]
    assert sandbox.run(sandbox.python("print(3)"), PATIENT).stdout == b"3\n"
    assert [zygote.pidfd for zygote in sandbox._idle] == [before]
    sandbox.close()


def test_a_forked_copy_of_the_owner_starts_its_own(sandbox: Sandbox):
    before = len(zygotes())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(sandbox.run(sandbox.python("print(3)"), PATIENT).stdout != b"3\n")
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert becomes(lambda: len(zygotes()) == before)
    assert sandbox.run(sandbox.python("print(4)"), PATIENT).stdout == b"4\n"


def test_a_sandbox_that_nobody_holds_ends():
    before = len(zygotes())
    sandbox = Sandbox.open()
    assert len(zygotes()) == before + 1
    del sandbox
    assert becomes(lambda: len(zygotes()) == before)


def test_a_start_cut_at_any_moment_leaves_nothing(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    before = {process.pid for process in own_processes()}
    cut = 0
    for number in range(30):
        monkeypatch.setattr(sandbox_process, "START_SECONDS", number / 1000)
        try:
            ZygoteHandle.start(sandbox._python).close()
        except RewardError as error:
            assert "did not start the sandbox" in str(error)
            cut += 1
        # one that is about to end shows no words that it could be found by
        assert becomes(lambda: {process.pid for process in own_processes()} <= before), (
            f"cut after {number} ms"
        )
    assert cut


def test_a_start_whose_bwrap_is_killed_leaves_nothing(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    before = {process.pid for process in own_processes()}
    start, cut = sandbox_process.subprocess.Popen, 0
    for number in range(16):

        def killed(*words, delay=number / 1000, **more):
            process = start(*words, **more)
            time.sleep(delay)
            process.kill()
            return process

        monkeypatch.setattr(sandbox_process.subprocess, "Popen", killed)
        try:
            ZygoteHandle.start(sandbox._python).close()
        except RewardError as error:
            assert "did not start the sandbox" in str(error)
            cut += 1
        assert becomes(lambda: {process.pid for process in own_processes()} <= before), (
            f"killed after {number} ms"
        )
    assert cut


def test_a_file_must_lie_below_code(sandbox: Sandbox):
    for path in ("/tmp/x", "/code/../usr/x", "code/x", "/code", "/code//x"):
        with pytest.raises(ValueError, match="not below /code"):
            sandbox.run(Program(argv=("/usr/bin/true",), files={path: b""}), PATIENT)
    assert sandbox.run(Program(argv=("/usr/bin/true",), files={"/code/a/b/c": b"x"}), PATIENT).status == "ok"


def test_a_command_that_does_not_exist_has_crashed(sandbox: Sandbox):
    result = sandbox.run(Program(argv=("/usr/bin/no-such",), files={}), PATIENT)
    assert (result.status, result.exit_code) == ("crashed", 127)
    assert result.stderr == b"/usr/bin/no-such: No such file or directory\n"

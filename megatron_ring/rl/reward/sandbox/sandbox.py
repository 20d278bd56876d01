"""The sandbox for model-written code. Opening it fails if isolation cannot be verified on this machine.

``Sandbox.open()`` runs a program inside that tries what must be impossible, before any program of a model runs. This check
cannot be skipped, and there is no weaker mode.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable
from typing import Literal

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox.cgroup import MemoryCgroup
from megatron_ring.rl.reward.sandbox.command import CODE, SETUP, Limits, Program, find_tool
from megatron_ring.rl.reward.sandbox.run import RunResult, run
from megatron_ring.rl.reward.sandbox.zygote_handle import GoneError, ZygoteHandle

_TRIES = 3
_NAMESPACES = ("pid", "mnt", "ipc", "net", "user", "uts", "cgroup")
_PROBE_LIMITS = Limits(seconds=20.0)

_PROBE = """
import ctypes, fcntl, json, mmap, os, resource, sys
outside, zygote, rlimits, tmp_bytes = json.loads(sys.argv[1])
holes = []
if {int(fd) for fd in os.listdir("/proc/self/fd")} - {0, 1, 2, 3}:
    holes.append("descriptors leak in")
def must_fail(name, attempt):
    try:
        attempt()
    except OSError:
        return
    holes.append(name)
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *words):
    if function(*words) == -1:
        raise OSError(ctypes.get_errno(), "refused")
must_fail("the root directory can be written", lambda: open("/hole", "w"))
must_fail("/dev can be written", lambda: open("/dev/hole", "w"))
must_fail("/usr can be written", lambda: open("/usr/hole", "w"))
must_fail("/code can be written", lambda: open("/code/hole", "w"))
must_fail("/root is visible", lambda: os.listdir("/root"))
must_fail("/home is visible", lambda: os.listdir("/home"))
must_fail("/etc/passwd is visible", lambda: open("/etc/passwd"))
must_fail("/dev/zero is visible", lambda: open("/dev/zero"))
must_fail("/proc/sys can be written", lambda: open("/proc/sys/kernel/core_pattern", "r+"))
must_fail("/proc can be written", lambda: open("/proc/self/comm", "r+"))
must_fail("the first process can be read", lambda: open("/proc/1/stat"))
must_fail("the first process can be written", lambda: open("/proc/1/mem", "r+b"))
must_fail("sockets can be made", lambda: __import__("socket").socket())
must_fail("ptrace works: no seccomp filter", lambda: call(libc.ptrace, 0, 0, 0, 0))
must_fail("namespaces can be made", lambda: call(libc.unshare, 0x10000000))
must_fail("memory can be shared without a file", lambda: mmap.mmap(-1, 4096))
must_fail("pages can be given to pipes", lambda: call(libc.vmsplice, os.pipe()[1], 0, 0, 0))
must_fail("pipes can grow", lambda: fcntl.fcntl(os.pipe()[1], 1031, 1 << 20))
if os.getuid() == 0:
    holes.append("the code is root")
if len([name for name in os.listdir("/proc") if name.isdigit()]) > 3 or os.getppid() != 1:
    holes.append("processes outside are visible")
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
if status["NoNewPrivs"] != "1":
    holes.append("privileges can be gained")
if any(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")):
    holes.append("capabilities are left")
for name, link in outside.items():
    if os.readlink("/proc/self/ns/" + name) == link:
        holes.append("the " + name + " namespace is the machine's")
for name in ("pid", "mnt", "ipc"):
    if os.readlink("/proc/self/ns/" + name) == zygote[name]:
        holes.append("the " + name + " namespace is that of all runs")
for name, bounds in rlimits.items():
    if resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1] not in range(bounds[1] + 1):
        holes.append("no limit of " + name)
for folder in ("/tmp", "/dev/shm"):
    room = os.statvfs(folder)
    if not 0 < room.f_blocks * room.f_frsize <= tmp_bytes or not 0 < room.f_files <= 1 << 20:
        holes.append(folder + " is not bounded")
if os.listdir("/tmp") or os.listdir("/dev/shm") or os.listdir("/code") != ["main.py"]:
    holes.append("files of another run are visible")
for folder in ("/tmp", "/dev/shm"):
    open(folder + "/mine", "w").write("x")
print(json.dumps(holes))
"""


class Sandbox:
    """Runs programs isolated from the machine; made by ``Sandbox.open()``. Several threads may call it at once.

    Each run uses one zygote alone. Zygotes are kept for later runs: as many as there were runs at the same time.

    Example: ``Sandbox.open().run(sandbox.python("print(1)"), Limits(seconds=2.0)).stdout == b"1\\n"``.
    """

    def __init__(self, python_path: str):
        self._python = python_path
        self._memory = MemoryCgroup.find()
        self._idle: list[ZygoteHandle] = []
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._idle)

    @property
    def memory_bound(self) -> Literal["cgroup", "counted"]:
        """Whether a memory cgroup bounds a run, or only the memory of its processes, which is polled.

        The cgroup's limit is the run's memory, its /tmp, its files and 32 MB together; the polled limit is its memory.
        """
        return "counted" if self._memory is None else "cgroup"

    @classmethod
    def open(cls) -> Sandbox:
        """A sandbox whose isolation has just been verified. Raises RewardError: what is missing, and the remedy."""
        sandbox = cls(find_tool("python3", "Python solutions", "install the system's python3"))
        try:
            sandbox._check_isolation()
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def python(self, source: str, *words: str, files: dict[str, bytes] | None = None) -> Program:
        """A program that runs ``source`` with the system's Python, without site packages."""
        path = f"{CODE}/main.py"
        argv = (self._python, "-I", "-S", "-B", path, *words)
        data = {path: source.encode(errors="surrogateescape"), **(files or {})}
        return Program(argv=argv, files=data, ready_python=True)

    def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> RunResult:
        """Run to the end, at most ``limits.wall`` seconds. All its processes have ended when this returns."""
        return self._on_zygote(lambda zygote: run(zygote, program, limits, stdin))

    def close(self) -> None:
        """End all idle zygotes; a later run starts a new one."""
        with self._lock:
            idle, self._idle[:] = list(self._idle), []
        _close(idle)

    def _on_zygote(self, use: Callable[[ZygoteHandle], RunResult]) -> RunResult:
        why, deaths = "", 0
        while deaths < _TRIES:
            zygote, is_new = self._take()
            try:
                result = use(zygote)
            except GoneError as error:
                why = f"{error}: {zygote.last_words()}"
                zygote.close()
                # any number of idle zygotes may have been killed at once: only new ones count
                deaths += is_new
                continue
            except BaseException:
                zygote.close()
                raise
            with self._lock:
                self._idle.append(zygote)
            return result
        raise RewardError(
            f"the sandbox died {_TRIES} times before a run began ({why}); free memory, or find out who killed it"
        )

    def _take(self) -> tuple[ZygoteHandle, bool]:
        """A zygote to use alone, and whether it was started just now."""
        if os.getpid() != self._owner_pid:
            # this process was forked: the zygotes, and perhaps a held lock, belong to its parent
            self._owner_pid, self._lock, self._idle = os.getpid(), threading.Lock(), []
            weakref.finalize(self, _close, self._idle)
        while True:
            with self._lock:
                zygote = self._idle.pop() if self._idle else None
            if zygote is None:
                return ZygoteHandle.start(self._python, self._memory), True
            if zygote.is_idle():
                return zygote, False
            zygote.close()

    def _check_isolation(self) -> None:
        outside = {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES}

        def probe(zygote: ZygoteHandle) -> RunResult:
            rules = [outside, dict(zygote.namespaces), _PROBE_LIMITS.rlimits(), _PROBE_LIMITS.tmp_bytes]
            return run(zygote, self.python(_PROBE, json.dumps(rules)), _PROBE_LIMITS)

        holes: list[str] = []
        # the second run would see files that the first has left
        for _ in range(2):
            result = self._on_zygote(probe)
            try:
                found = json.loads(result.stdout) if result.status == "ok" else None
            except ValueError:
                found = None
            if found is None:
                said = result.stderr.decode(errors="replace").strip().replace("\n", "; ")[-300:]
                raise RewardError(f"the sandbox's own check ended with {result.status}: {said}; {SETUP}")
            holes += [hole for hole in found if hole not in holes]
        if holes:
            raise RewardError(f"the sandbox does not isolate: {', '.join(holes)}; {SETUP}, or run elsewhere")


def _close(zygotes: list[ZygoteHandle]) -> None:
    for zygote in zygotes:
        zygote.close()
    zygotes.clear()

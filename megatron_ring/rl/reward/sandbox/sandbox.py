"""The sandbox for model-written code: refuses to exist where its walls do not hold.

``Sandbox.open()`` runs a program inside that tries what must not work, before anything of the model's is run;
there is no way round it, and no weaker mode.
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
from megatron_ring.rl.reward.sandbox.process import GoneError, Zygote
from megatron_ring.rl.reward.sandbox.run import RunResult, run

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
    """Runs programs apart from the machine; obtained by ``Sandbox.open()``. Several threads may call it at once.

    Every run has a zygote to itself; as many stand ready as there ever were runs at the same time.

    Example: ``Sandbox.open().run(sandbox.python("print(1)"), Limits(seconds=2.0)).stdout == b"1\\n"``.
    """

    def __init__(self, python_path: str):
        self._python = python_path
        self._memory = MemoryCgroup.find()
        self._idle: list[Zygote] = []
        self._owner_pid = os.getpid()
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._idle)

    @property
    def memory_bound(self) -> Literal["cgroup", "counted"]:
        """Whether a group of the kernel holds all that a run has, or it is denied and counted alone.

        The group's limit is the run's memory, its /tmp, its files and 32 MB together; the count stays at its memory.
        """
        return "counted" if self._memory is None else "cgroup"

    @classmethod
    def open(cls) -> Sandbox:
        """A sandbox whose isolation has just been tried. Raises RewardError: what is missing, and the remedy."""
        sandbox = cls(find_tool("python3", "Python solutions", "install the system's python3"))
        try:
            sandbox._try_walls()
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def python(self, source: str, *words: str, files: dict[str, bytes] | None = None) -> Program:
        """A program that is ``source``, run by the system's Python without site packages."""
        path = f"{CODE}/main.py"
        argv = (self._python, "-I", "-S", "-B", path, *words)
        data = {path: source.encode(errors="surrogateescape"), **(files or {})}
        return Program(argv=argv, files=data, ready_python=True)

    def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> RunResult:
        """Run to the end, at most ``limits.wall`` seconds. Nothing of it is left when this returns."""
        return self._on_zygote(lambda zygote: run(zygote, program, limits, stdin))

    def close(self) -> None:
        """End what stands ready; a later run starts it again."""
        with self._lock:
            idle, self._idle[:] = list(self._idle), []
        _close(idle)

    def _on_zygote(self, use: Callable[[Zygote], RunResult]) -> RunResult:
        why, deaths = "", 0
        while deaths < _TRIES:
            zygote, is_new = self._take()
            try:
                result = use(zygote)
            except GoneError as error:
                why = f"{error}: {zygote.last_words()}"
                zygote.close()
                # any number of those that stood ready may have been killed together
                deaths += is_new
                continue
            except BaseException:
                zygote.close()
                raise
            with self._lock:
                self._idle.append(zygote)
            return result
        raise RewardError(
            f"the sandbox died {_TRIES} times before a run began ({why}); free memory, or see who did it"
        )

    def _take(self) -> tuple[Zygote, bool]:
        """One to use alone, and whether it was started for that."""
        if os.getpid() != self._owner_pid:
            # a copy made by fork: what stands ready, and perhaps the lock, is the original's
            self._owner_pid, self._lock, self._idle = os.getpid(), threading.Lock(), []
            weakref.finalize(self, _close, self._idle)
        while True:
            with self._lock:
                zygote = self._idle.pop() if self._idle else None
            if zygote is None:
                return Zygote.start(self._python, self._memory), True
            if zygote.idle():
                return zygote, False
            zygote.close()

    def _try_walls(self) -> None:
        outside = {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES}

        def probe(zygote: Zygote) -> RunResult:
            rules = [outside, dict(zygote.walls), _PROBE_LIMITS.rlimits(), _PROBE_LIMITS.tmp_bytes]
            return run(zygote, self.python(_PROBE, json.dumps(rules)), _PROBE_LIMITS)

        holes: list[str] = []
        # the second run sees what the first has left
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


def _close(zygotes: list[Zygote]) -> None:
    for zygote in zygotes:
        zygote.close()
    zygotes.clear()

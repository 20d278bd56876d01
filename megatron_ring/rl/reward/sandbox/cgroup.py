"""A memory cgroup around each process that stands ready, where this process may make one.

The group holds a zygote and all its runs, one at a time; its limit is set for each run. It counts what no process
shows: pages of /tmp, shared memory that was given back, page tables, tables of the kernel. Moving a process costs up to
a grace period of the kernel (10 ms), so a zygote is moved once, before its first run, and no run ever is.

Version 1: a group is made below this process's own, so it stays within that one's limit. Version 2 gives no memory
controller to children of a group that holds processes, so it is made beside this process's own, below a parent that
was delegated to us; nobody is moved out of the way for it. Everything else counts as "there is none".
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ring.rl.reward.sandbox.command import Limits, Program, identity

ALLOWANCE_BYTES = 32 << 20
"""What a run may hold beyond its memory, its /tmp and its files: the tables of 24 processes and of 8192 files (about
a kilobyte each), and what the process that stands ready was charged for."""
REMOVE_SECONDS, SWEEP_SECONDS = 20.0, 1.0
_LARGEST_PAGES = 4 << 20
"""What is refused at a limit may be as large as two huge pages, and leave so much of the limit unused."""
_NAME = re.compile(r"ring-sandbox-(\d+)-(\d+)-(\d+)-\d+")
_FAULTS = OSError, ValueError, IndexError
"""The kernel's refusals, and files of other contents than the kernel's, as stand-ins for it have them."""
_numbers = itertools.count()


@dataclass(kw_only=True, slots=True)
class Group:
    """One memory group; ``begin`` before each run, ``struck`` whether the kernel has killed in it since, for its limit.

    Example: ``group = MemoryCgroup.find().make(); group.take(pid); group.begin(640 << 20)``.
    """

    path: Path
    version: int
    _limit: int | None = None
    _before: tuple[int, int] = (0, 0)
    _fds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.version == 1:
            # a group above may have it off, and then who meets the limit waits for ever
            _write(self.path / "memory.oom_control", 0)
        # a run is not to be slowed down and then saved by swap: the limit is that of both together
        if self.version == 2 and (self.path / "memory.swap.max").exists():
            _write(self.path / "memory.swap.max", 0)
        elif self.version == 1 and not (self.path / "memory.memsw.limit_in_bytes").exists():
            _write(self.path / "memory.swappiness", 0)
        # version 1 has a memory.failcnt, which stays 0 on some kernels; the most that was held tells as much
        flags = {"memory.oom_control": os.O_RDONLY, "memory.max_usage_in_bytes": os.O_RDWR}
        for name, flag in (flags if self.version == 1 else {"memory.events": os.O_RDONLY}).items():
            self._fds.append(os.open(self.path / name, flag | os.O_CLOEXEC))

    def take(self, pid: int) -> None:
        """Move a process in, and see that it is. Raises OSError."""
        _write(self.path / "cgroup.procs", pid)
        if str(pid) not in (self.path / "cgroup.procs").read_text().split():
            raise OSError(f"{self.path} does not take processes")

    def begin(self, limit: int) -> None:
        """Bound what it holds from now on. Raises OSError, also where that cannot be had."""
        if limit != self._limit:
            names = ["memory.max"]
            if self.version == 1:
                names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
                # the second is never below the first
                names = names if limit < (self._limit or 1 << 62) else names[::-1]
            for name in names:
                if (self.path / name).exists():
                    _write(self.path / name, limit)
                    if abs(int((self.path / name).read_text()) - limit) >= os.sysconf("SC_PAGE_SIZE"):
                        raise OSError(f"{self.path / name} does not keep what is written")
            self._limit = limit
        if self.version == 1:
            os.pwrite(self._fds[1], b"0", 0)
        self._before = (self._counts()[0], 0) if self.version == 1 else self._counts()

    def struck(self) -> bool:
        """Whether something in it was killed since ``begin`` because its limit was reached.

        A kill for want of memory elsewhere, on the machine or in a group above, is not the run's.
        """
        return all(now > before for now, before in zip(self._counts(), self._before, strict=True))

    def remove(self) -> None:
        """Remove it once its last process is gone, which the caller has ended."""
        while self._fds:
            os.close(self._fds.pop())
        deadline = time.monotonic() + REMOVE_SECONDS
        while not _removed(self.path) and time.monotonic() < deadline:
            time.sleep(0.001)

    def _counts(self) -> tuple[int, int]:
        """How many were killed in it, and how often its limit was met (in version 1: whether)."""
        texts = [os.pread(fd, 4096, 0) for fd in self._fds]
        killed = int(texts[0].partition(b"oom_kill ")[2].split()[0])
        if self.version == 1:
            assert self._limit is not None
            return killed, int(int(texts[1]) + _LARGEST_PAGES > self._limit)
        return killed, int(texts[0].partition(b"oom ")[2].split()[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCgroup:
    """Where groups are made.

    Example: ``MemoryCgroup(version=1, parent=Path("/sys/fs/cgroup/memory/job_7"))``.
    """

    version: int
    parent: Path

    @classmethod
    def find(cls) -> MemoryCgroup | None:
        """A place where one was just made, limited, entered and removed; None where there is none."""
        for place in _places_here():
            with contextlib.suppress(*_FAULTS):
                place.sweep()
                place._try()
                return place
        return None

    def make(self) -> Group:
        """A group of this process's. Raises OSError."""
        pid = os.getpid()
        words = (os.stat("/proc/self/ns/pid").st_ino, pid, _started(pid), next(_numbers))
        path = self.parent / "-".join(["ring-sandbox", *map(str, words)])
        path.mkdir()
        try:
            return Group(path=path, version=self.version)
        except BaseException:
            path.rmdir()
            raise

    def sweep(self) -> bool:
        """Remove what owners left that were killed: groups of processes that are no more. False if one is not empty."""
        own = str(os.stat("/proc/self/ns/pid").st_ino)
        names = [
            parts for parts in map(_NAME.fullmatch, os.listdir(self.parent)) if parts and parts[1] == own
        ]
        left = [parts[0] for parts in names if _started(int(parts[2])) != int(parts[3])]
        removed = [_removed(self.parent / name) for name in left]
        return all(removed)

    def _try(self) -> None:
        group = self.make()
        try:
            group.begin(64 << 20)
            words = ("/bin/sh", "-c", "read line")
            with subprocess.Popen(words, stdin=subprocess.PIPE, cwd="/", **identity()) as waiter:
                group.take(waiter.pid)
        finally:
            group.remove()


def bytes_for(program: Program, limits: Limits) -> int:
    """The limit of the group for one run: its memory, its /tmp, its files, and an allowance."""
    # whole megabytes, so that runs that are alike have the same limit, and none is written
    files_mb = -(-sum(map(len, program.files.values())) >> 20)
    return (limits.memory_mb + files_mb << 20) + limits.tmp_bytes + ALLOWANCE_BYTES


def sweep() -> None:
    """Remove the groups of sandboxes whose owners were just killed, as soon as their processes are gone."""
    deadline = time.monotonic() + SWEEP_SECONDS
    for place in _places_here():
        with contextlib.suppress(*_FAULTS):
            while not place.sweep() and time.monotonic() < deadline:
                time.sleep(0.005)


def _places_here() -> list[MemoryCgroup]:
    with contextlib.suppress(*_FAULTS):
        # 2: the machine stops where a group meets its limit
        if Path("/proc/sys/vm/panic_on_oom").read_text().strip() == "2":
            return []
        return list(_places(*(Path("/proc/self", name).read_text() for name in ("cgroup", "mountinfo"))))
    return []


def _places(groups: str, mounts: str) -> Iterator[MemoryCgroup]:
    """Where it may be tried, from this process's lines of /proc/self/cgroup and of mountinfo."""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        root, point = (_unescaped(word) for word in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version is None or (version == 1 and "memory" not in options.split(",")):
            continue
        for group in groups.splitlines():
            _, controllers, path = group.split(":", 2)
            if (version == 1 and "memory" not in controllers.split(",")) or (version == 2 and controllers):
                continue
            # a mount may show a part of the tree only
            if ".." in path.split("/") or not f"{path}/".startswith(f"{root.rstrip('/')}/"):
                continue
            own = Path(point, os.path.relpath(path, root))
            if version == 1 and _nested(own):
                yield MemoryCgroup(version=1, parent=own)
            elif version == 2 and path != root and _delegated(own.parent):
                yield MemoryCgroup(version=2, parent=own.parent)


def _nested(own: Path) -> bool:
    """Whether groups below ``own`` stay within its limit."""
    flag = own / "memory.use_hierarchy"
    return own.is_dir() and (not flag.exists() or flag.read_text().strip() == "1")


def _delegated(parent: Path) -> bool:
    """Whether the groups in ``parent`` are ours to make, and have memory to be limited.

    Root may write everywhere, but what systemd has not delegated is systemd's.
    """
    try:
        shared = (parent / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False
    if "memory" not in shared or not os.access(parent / "cgroup.procs", os.W_OK):
        return False
    return os.geteuid() != 0 or any(_marked(each) for each in (parent, *parent.parents))


def _marked(path: Path) -> bool:
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None if there is none, or it only waits to be buried."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in (b"Z", b"X") else int(words[19])


def _unescaped(word: str) -> str:
    return re.sub(r"\\(\d{3})", lambda digits: chr(int(digits[1], 8)), word)


def _write(path: Path, value: int) -> None:
    with open(path, "w") as file:
        file.write(str(value))

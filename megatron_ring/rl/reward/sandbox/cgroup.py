"""A memory cgroup around each zygote, if this process may make one.

The group holds a zygote and its runs, one run at a time; its limit is set before each run. It counts memory that no
process shows: pages of /tmp, shared memory that was unmapped, page tables, kernel tables. Moving a process takes up to a
grace period of the kernel (10 ms), so only the zygote is moved, once, before its first run.

Version 1: the group is made below this process's own, so it stays within that one's limit. Version 2 gives no memory
controller to children of a group that holds processes, so the group is made beside this process's own, below a parent
that was delegated to us; no process is moved for that. In any other case there is no group.
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
"""Allowance beyond a run's memory, its /tmp and its files: kernel tables of 24 processes and of 8192 files (about a
kilobyte each), and the zygote's own memory."""
REMOVE_SECONDS, SWEEP_SECONDS = 20.0, 1.0
_LARGEST_PAGES = 4 << 20
"""An allocation that fails at the limit may be two huge pages large, so usage may end this far below the limit."""
_NAME = re.compile(r"ring-sandbox-(\d+)-(\d+)-(\d+)-\d+")
_FAULTS = OSError, ValueError, IndexError
"""Refusals of the kernel, and files with other contents, as kernels that only imitate Linux have them."""
_numbers = itertools.count()


@dataclass(kw_only=True, slots=True)
class Group:
    """One memory cgroup: ``begin`` before each run; ``oom_killed`` tells whether the run reached the limit.

    Example: ``group = MemoryCgroup.find().make(); group.take(pid); group.begin(640 << 20)``.
    """

    path: Path
    version: int
    _limit: int | None = None
    _before: tuple[int, int] = (0, 0)
    _fds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.version == 1:
            # a parent group may have the OOM killer disabled: a process at the limit would wait forever
            _write(self.path / "memory.oom_control", 0)
        # no swap: it would slow a run down and let it exceed the limit
        if self.version == 2 and (self.path / "memory.swap.max").exists():
            _write(self.path / "memory.swap.max", 0)
        elif self.version == 1 and not (self.path / "memory.memsw.limit_in_bytes").exists():
            _write(self.path / "memory.swappiness", 0)
        # memory.failcnt of version 1 stays 0 on some kernels; the maximum usage serves instead
        flags = {"memory.oom_control": os.O_RDONLY, "memory.max_usage_in_bytes": os.O_RDWR}
        for name, flag in (flags if self.version == 1 else {"memory.events": os.O_RDONLY}).items():
            self._fds.append(os.open(self.path / name, flag | os.O_CLOEXEC))

    def take(self, pid: int) -> None:
        """Move a process into the group, and check that it is there. Raises OSError."""
        _write(self.path / "cgroup.procs", pid)
        if str(pid) not in (self.path / "cgroup.procs").read_text().split():
            raise OSError(f"{self.path} does not take processes")

    def begin(self, limit: int) -> None:
        """Set the limit for the next run. Raises OSError, also if the kernel does not keep it."""
        if limit != self._limit:
            names = ["memory.max"]
            if self.version == 1:
                names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
                # the second limit must never be below the first
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

    def oom_killed(self) -> bool:
        """Has the kernel killed a process in the group since ``begin`` because the group's limit was reached?

        A kill because the machine or a parent group is out of memory does not count.
        """
        return all(now > before for now, before in zip(self._counts(), self._before, strict=True))

    def remove(self) -> None:
        """Remove the group as soon as its last process, which the caller has killed, is gone."""
        while self._fds:
            os.close(self._fds.pop())
        deadline = time.monotonic() + REMOVE_SECONDS
        while not _removed(self.path) and time.monotonic() < deadline:
            time.sleep(0.001)

    def _counts(self) -> tuple[int, int]:
        """How many processes were killed in it, and how often its limit was reached (version 1: 0 or 1)."""
        texts = [os.pread(fd, 4096, 0) for fd in self._fds]
        killed = int(texts[0].partition(b"oom_kill ")[2].split()[0])
        if self.version == 1:
            assert self._limit is not None
            return killed, int(int(texts[1]) + _LARGEST_PAGES > self._limit)
        return killed, int(texts[0].partition(b"oom ")[2].split()[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryCgroup:
    """A place where groups can be made.

    Example: ``MemoryCgroup(version=1, parent=Path("/sys/fs/cgroup/memory/job_7"))``.
    """

    version: int
    parent: Path

    @classmethod
    def find(cls) -> MemoryCgroup | None:
        """A place where making, limiting, entering and removing a group has just worked; None if there is none."""
        for place in _places_here():
            with contextlib.suppress(*_FAULTS):
                place.sweep()
                place._try()
                return place
        return None

    def make(self) -> Group:
        """A new group that belongs to this process. Raises OSError."""
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
        """Remove groups whose owner has ended. False if one of them is not empty."""
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
    """The group's limit for one run: its memory, its /tmp, its files, and an allowance."""
    # in whole megabytes: similar runs have the same limit, which then is not written again
    files_mb = -(-sum(map(len, program.files.values())) >> 20)
    return (limits.memory_mb + files_mb << 20) + limits.tmp_bytes + ALLOWANCE_BYTES


def sweep() -> None:
    """Remove groups of sandboxes whose owners were just killed, as soon as their processes are gone."""
    deadline = time.monotonic() + SWEEP_SECONDS
    for place in _places_here():
        with contextlib.suppress(*_FAULTS):
            while not place.sweep() and time.monotonic() < deadline:
                time.sleep(0.005)


def _places_here() -> list[MemoryCgroup]:
    with contextlib.suppress(*_FAULTS):
        # 2: the kernel panics when a group reaches its limit
        if Path("/proc/sys/vm/panic_on_oom").read_text().strip() == "2":
            return []
        return list(_places(*(Path("/proc/self", name).read_text() for name in ("cgroup", "mountinfo"))))
    return []


def _places(groups: str, mounts: str) -> Iterator[MemoryCgroup]:
    """Places to try, from the contents of /proc/self/cgroup and /proc/self/mountinfo."""
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
            # a mount may show only a part of the tree
            if ".." in path.split("/") or not f"{path}/".startswith(f"{root.rstrip('/')}/"):
                continue
            own = Path(point, os.path.relpath(path, root))
            if version == 1 and _nested(own):
                yield MemoryCgroup(version=1, parent=own)
            elif version == 2 and path != root and _delegated(own.parent):
                yield MemoryCgroup(version=2, parent=own.parent)


def _nested(own: Path) -> bool:
    """Do groups below ``own`` stay within its limit?"""
    flag = own / "memory.use_hierarchy"
    return own.is_dir() and (not flag.exists() or flag.read_text().strip() == "1")


def _delegated(parent: Path) -> bool:
    """May this process make groups in ``parent``, and do they have a memory controller?

    Root may write everywhere, but only groups that systemd has delegated are not systemd's.
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
    """Start time of a process in ticks since boot; None if there is none, or it is a zombie."""
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

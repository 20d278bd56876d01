"""A lock on a run's folder: only one run at a time writes its checkpoints there.

``run.lock`` is made by a hard link, which succeeds for one of several starters, on NFS too. It names its owner: machine
(boot), process, the process's start, launch. On the owner's machine it is stale as soon as the process is gone. Another
machine cannot see the process: there it is stale if its time stamp is older than :data:`STALE_SECONDS`. The owner renews
the time stamp every :data:`TOUCH_SECONDS` in a thread; ages are measured with the file system's own clock.

Several processes may find the same stale lock. Each lock has a token, and only the process that makes the one claim file
named after the stale token may replace the lock. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ring.checkpoint.plain_files import is_count, parse_json_object
from megatron_ring.durable import write_synced
from megatron_ring.errors import CheckpointError
from megatron_ring.plain import read_plain

log = logging.getLogger("megatron_ring")

LOCK = "run.lock"
TOUCH_SECONDS = 20
STALE_SECONDS = 300
_MAX_BYTES = 10_000
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that holds a run folder.

    Example: ``Owner(token="9f...", host="node3", machine="6b2c.../4026531836", pid=4711, started=123456,
    launch="127.0.0.1:29500/...", folder="/runs/a")``.
    """

    token: str
    host: str
    machine: str
    """This boot of the machine, and the process namespace of ``pid``."""
    pid: int
    started: int
    """Start of the process in clock ticks after the boot: ``pid`` may be reused."""
    launch: str
    """The same for all processes of one launch."""
    folder: str = ""
    """Where the lock was made: a copy of the folder contains the lock, too."""

    def is_here(self) -> bool:
        """Can this process see whether the owner still runs?"""
        return self.machine == _machine()

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {self.host}"
            if self.pid
            else f"an unknown process (its {LOCK} is damaged)"
        )


def check_run_folder(folder: str | Path | None, *, is_save_rank: bool) -> None:
    """Check before the start that no other run writes to ``folder``. Does not take the lock.

    On ranks other than rank 0 (``is_save_rank``) a lock of this launch is accepted: rank 0 may have taken it already.

    Raises:
        CheckpointError: another run writes there.
    """
    if folder is None:
        return
    lock = Path(folder) / LOCK
    found = _read(lock)
    if found is None or (not is_save_rank and found.launch == _launch()):
        return
    if _is_live(lock, found):
        raise _refusal(lock, found)


def must_be_mine(folder: Path) -> None:
    """Check that no other process holds ``folder``.

    Raises:
        CheckpointError: one does.
    """
    lock = folder / LOCK
    found = _read(lock)
    mine = found is not None and found.is_here() and found.pid == os.getpid()
    if found is not None and not mine and _is_live(lock, found):
        raise _refusal(lock, found)


@contextlib.contextmanager
def hold_run_folder(folder: str | Path | None) -> Iterator[None]:
    """Hold the lock of ``folder`` (made if it is missing) until the block ends, however it ends.

    Raises:
        CheckpointError: another run holds it, or it cannot be written.
    """
    if folder is None:
        yield
        return
    lock = Path(folder) / LOCK
    made: list[Path] = []
    try:
        made = [each for each in (lock.parent, *lock.parent.parents) if not each.exists()]
        lock.parent.mkdir(parents=True, exist_ok=True)
        owner = _take(lock)
    except OSError as error:
        raise CheckpointError(
            f"--save {folder}: {error.strerror or error}; name a folder that can be written"
        ) from None
    stop = threading.Event()
    toucher = threading.Thread(target=_keep_fresh, args=(lock, owner, stop), daemon=True, name="run-lock")
    toucher.start()
    try:
        yield
    finally:
        stop.set()
        toucher.join(timeout=5)
        if _read(lock) == owner:
            with contextlib.suppress(OSError):
                lock.unlink()
        for each in made:
            with contextlib.suppress(OSError):  # it is not empty any more
                each.rmdir()


def _take(lock: Path) -> Owner:
    """Take ``lock``, if need be from an owner that is gone."""
    owner = Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        launch=_launch(),
        folder=os.path.realpath(lock.parent),
    )
    own = lock.with_name(f"{LOCK}.{owner.token}")
    # synced, so that a power cut leaves no empty lock
    write_synced(own, json.dumps(asdict(owner)) + "\n")
    try:
        for _ in range(100):
            if _link(own, lock):
                return owner
            held = _read(lock)
            if held is None:
                # released or replaced in the meantime
                continue
            if _is_live(lock, held):
                raise _refusal(lock, held)
            if _take_over(lock, held, own):
                log.warning("%s: was held by %s, which is gone: taken over", lock, held)
                return owner
        raise CheckpointError(
            f"{lock}: other processes keep taking it (100 tries); remove it when no run writes there"
        )
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)


def _take_over(lock: Path, held: Owner, own: Path) -> bool:
    """Replace the stale lock of ``held`` by ``own``; False if another process does.

    A claim whose maker died half-way is stale like a lock: it is claimed by its own token.
    """
    chain = [held]
    while True:
        claim = lock.with_name(f"{LOCK}.{chain[-1].token}.claim")
        if _link(own, claim):
            break
        maker = _read(claim)
        if maker is None or maker in chain:
            return False
        if _is_live(claim, maker):
            raise _refusal(lock, maker)
        chain.append(maker)
    try:
        if _read(lock) != held:
            # another claim was made, used and removed before ours
            return False
        own.replace(lock)
        return True
    finally:
        # the process at the end of a chain of claims removes all of them, its own last
        for each in chain:
            with contextlib.suppress(OSError):
                lock.with_name(f"{LOCK}.{each.token}.claim").unlink(missing_ok=True)


def _link(own: Path, target: Path) -> bool:
    """Hard-link ``own`` to ``target``; False if that exists already. Without hard links, copy it."""
    try:
        os.link(own, target)
        return True
    except FileExistsError:
        # NFS may repeat a request whose reply was lost: then the link is ours
        return target.exists() and own.stat().st_nlink > 1 and own.samefile(target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(own.read_bytes())
    return True


def _keep_fresh(lock: Path, owner: Owner, stop: threading.Event) -> None:
    while not stop.wait(TOUCH_SECONDS):
        try:
            if _read(lock) != owner:
                log.error(
                    "%s: is not this run's any more: another run may write here; stop one of them", lock
                )
                return
            os.utime(lock)
        except (OSError, CheckpointError) as error:
            log.warning("%s: cannot be touched (%s)", lock, error)


def _is_live(lock: Path, owner: Owner) -> bool:
    """Does the owner of ``lock`` still run? On another machine this is judged by the lock's age."""
    if owner.is_here():
        return _started(owner.pid) == owner.started and not _is_copy(lock, owner)
    try:
        # abs: after a clock was set back, a stale lock may be from the future
        return abs(_now(lock) - lock.stat().st_mtime) < STALE_SECONDS
    except FileNotFoundError:
        return False


def _is_copy(lock: Path, owner: Owner) -> bool:
    """Is ``lock`` a copy, made with its folder, of a lock that its owner holds in another folder?

    False in doubt: if both names lead to the same file, or if the original is not found (the folder was moved, or is not
    visible here).
    """
    if not owner.folder or owner.folder == os.path.realpath(lock.parent):
        return False
    original = Path(owner.folder) / LOCK
    try:
        return _read(original) == owner and not original.samefile(lock)
    except (OSError, ValueError, CheckpointError):
        return False


def _now(lock: Path) -> float:
    """The time by the file system's clock: the time stamp of a new file."""
    probe = lock.with_name(f"{LOCK}.{secrets.token_hex(8)}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        # the folder cannot be written by this user: take this machine's clock
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _read(lock: Path) -> Owner | None:
    """The owner of ``lock``; ``None`` if there is no lock.

    A damaged lock, as a full disk or a power cut may leave it, gets an owner on an unknown machine: it is stale by its age.

    Raises:
        CheckpointError: it cannot be read.
    """
    data = b""
    try:
        data = read_plain(lock, _MAX_BYTES)
        values = parse_json_object(data)
        owner = Owner(**values)
        if not all(
            isinstance(v, str) for v in (owner.token, owner.host, owner.machine, owner.launch, owner.folder)
        ):
            raise ValueError("names no owner")
        if not is_count(owner.pid) or not is_count(owner.started) or not owner.token.isalnum():
            raise ValueError("names no process")
        return owner
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(
            f"{lock}: {error.strerror or error}; remove it when no run writes there"
        ) from None
    except (ValueError, TypeError):
        token = f"damaged{zlib.crc32(data):08x}"
        return Owner(token=token, host="", machine="nobody's", pid=0, started=0, launch="")


def _refusal(lock: Path, owner: Owner) -> CheckpointError:
    gone = "stop that run" if owner.is_here() else f"stop that run (or wait {STALE_SECONDS} s if it is gone)"
    return CheckpointError(
        f"--save {lock.parent}: {owner} writes its checkpoints there; {gone}, or name another folder"
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Start of a process of this machine, in clock ticks after the boot; ``None`` if there is none, or it is a zombie."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _launch() -> str:
    """An identifier that all processes of this launch share, and no other launch at the same time."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    values = [os.environ.get(name, "") for name in names]
    return "/".join(values) if any(values) else f"alone/{os.getpid()}"

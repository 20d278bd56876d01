"""Walls around verifiers: a process that judges sees the interpreter and its libraries, and nothing else.

Libraries that compare answers read text that a model wrote, and some of them evaluate it. So they run inside
bubblewrap: no network, no file but the system's and Python's own, read-only, no process but their own, no rights.
Two ways lead there, tried in this order:

- a user namespace, as the code sandbox has it (root takes the rights of no one first);
- where no one's rights cannot reach the interpreter (it lies in root's home), root builds the walls and drops
  every right inside them, before Python starts.

Where neither works there are no walls: verifiers then run under rlimits and a seccomp filter (:mod:`confine`), which is
said, and what evaluates text is refused.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_ring
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox.command import (
    FIRST_UID,
    SETUP,
    find_tool,
    identity,
    open_data,
    seccomp_program,
    system_binds,
)
from megatron_ring.rl.reward.workers.confine import judge_filter

_TMP_BYTES = 16 << 20
_PROBE_SECONDS = 60.0
_PACKAGE = Path(megatron_ring.__file__).resolve().parent
_PROBE = """
import json, os, sys
import megatron_ring.rl.reward.workers.worker
holes = []
def must_fail(name, attempt):
    try:
        attempt()
    except OSError:
        return
    holes.append(name)
must_fail("the root directory can be written", lambda: open("/hole", "w"))
must_fail("libraries can be written", lambda: open(os.path.join(os.path.dirname(json.__file__), "hole"), "w"))
must_fail("processes are visible", lambda: os.listdir("/proc"))
must_fail("sockets can be made", lambda: __import__("socket").socket())
if os.getuid() == 0:
    holes.append("verifiers are root")
if os.path.exists(sys.argv[1]):
    holes.append("files of this machine are visible")
print(json.dumps(holes))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Walls:
    """How processes that judge are started on this machine.

    Example: ``Walls(way="namespaces", missing="", filter_bytes=b"...")``.
    """

    way: str
    """namespaces, dropped (root built them and left), or none."""
    missing: str
    """Why there are no walls; empty where there are."""
    filter_bytes: bytes
    """Seccomp filter that a process puts on before it judges; empty where libseccomp is missing."""

    def start(self, words: Sequence[str], *, pass_fds: Sequence[int], log: int) -> subprocess.Popen:
        """Start this interpreter with ``words`` inside the walls; ``log`` takes what it prints."""
        return _start(self.way, words, pass_fds=pass_fds, stdout=log, stderr=log)


@functools.cache
def raise_walls() -> Walls:
    """The walls of this machine, tried once in a process."""
    why = []
    try:
        filter_bytes = judge_filter()
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        filter_bytes = b""
        why.append(f"pyseccomp cannot be used ({error})")
    for way in ("namespaces", "dropped") if os.geteuid() == 0 else ("namespaces",):
        problem = _try(way) if filter_bytes else None
        if filter_bytes and problem is None:
            return Walls(way=way, missing="", filter_bytes=filter_bytes)
        why += [problem] if problem else []
    return Walls(way="none", missing="; ".join(dict.fromkeys(why)), filter_bytes=filter_bytes)


def _try(way: str) -> str | None:
    """None if the walls stand and the verifiers' own code can be imported inside."""
    try:
        # the checkout or site-packages is there, but nothing beside the package: not this machine's temporary files
        words = ("-B", "-c", _PROBE, str(Path.home() / ".profile" if os.geteuid() else "/etc/passwd"))
        process = _start(way, words, pass_fds=(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except (RewardError, OSError) as error:
        return str(error)
    with process:
        try:
            said, complaint = process.communicate(timeout=_PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"the walls' own check took more than {_PROBE_SECONDS:g} s"
    try:
        holes = json.loads(said)
    except ValueError:
        lines = complaint.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return f"bwrap does not start a verifier here ({lines[-1][:200]}); {SETUP}, or allow user namespaces here"
    return f"the walls have holes: {', '.join(holes)}" if holes else None


def _start(
    way: str, words: Sequence[str], *, pass_fds: Sequence[int], stdout: int, stderr: int
) -> subprocess.Popen:
    argv, environment, held, who = [sys.executable, *words], _environment(), [], {}
    if way == "none":
        environment = {**os.environ, **environment}
    else:
        held = [open_data(seccomp_program(final=False))]
        argv = [*_bwrap(way, environment, held[0]), *argv]
        who = identity() if way == "namespaces" else {}
        environment = {"PATH": "/usr/bin:/bin"}
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd="/" if way != "none" else None,
            env=environment,
            pass_fds=(*pass_fds, *held),
            start_new_session=True,
            **who,
        )
    finally:
        for fd in held:
            os.close(fd)


def _bwrap(way: str, environment: dict[str, str], seccomp_fd: int) -> list[str]:
    bwrap = find_tool("bwrap", "a wall around verifiers")
    argv = [bwrap, "--die-with-parent", "--new-session", "--hostname", "verifier"]
    if way == "namespaces":
        argv += ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"]
    else:
        argv += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    argv += system_binds()
    # no /proc: nothing here needs it, and what is not there cannot be misused
    argv += [
        "--dev",
        "/dev",
        "--size",
        str(_TMP_BYTES),
        "--perms",
        "1777",
        "--tmpfs",
        "/tmp",
        "--chdir",
        "/tmp",
    ]
    for folder in _folders():
        for parent in reversed([each for each in folder.parents[:-1] if each != Path("/tmp")]):
            argv += ["--perms", "0755", "--dir", str(parent)]
        argv += ["--ro-bind", str(folder), str(folder)]
    argv.append("--clearenv")
    for name, value in environment.items():
        argv += ["--setenv", name, value]
    argv += ["--cap-drop", "ALL"]
    if way == "dropped":
        for right in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            argv += ["--cap-add", right]
    argv += ["--seccomp", str(seccomp_fd), "--remount-ro", "/dev", "--remount-ro", "/", "--"]
    if way == "dropped":
        uid = str(FIRST_UID + os.getpid() % 1000)
        argv += [find_tool("setpriv", "a wall around verifiers"), "--reuid", uid, "--regid", uid]
        argv += ["--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"]
    return argv


def _folders() -> list[Path]:
    """What Python needs to see beside /usr: itself, its libraries and this package, none inside another."""
    wanted = {Path(sys.prefix), Path(sys.base_prefix), _PACKAGE, Path(sys.executable).resolve().parents[1]}
    wanted |= {Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    found: list[Path] = []
    for folder in sorted(path.absolute() for path in wanted if path.is_dir()):
        if not any(folder.is_relative_to(other) for other in [Path("/usr"), *found]):
            found.append(folder)
    return found


def _environment() -> dict[str, str]:
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {
        **kept,
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "MPLCONFIGDIR": "/tmp",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_PACKAGE.parent), *libraries]),
    }

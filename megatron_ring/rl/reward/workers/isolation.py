"""Isolation of verifiers: an isolated worker sees the interpreter and its libraries, and nothing else.

Libraries that compare answers read text that a model wrote, and some of them evaluate it. So they run inside
bubblewrap: no network, no files but the system's and Python's (read-only), no other processes, no privileges. Two
methods are tried, in this order:

- ``namespaces``: a user namespace, as in the code sandbox (root changes to an unprivileged uid first);
- ``dropped``: if that uid cannot read the interpreter (it is in root's home), root sets up the namespaces and setpriv
  drops all privileges inside, before Python starts.

If neither works there is no isolation: verifiers then run under rlimits and a seccomp filter (:mod:`confine`), the pool
logs a warning, and scorers that evaluate text are refused.
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
    Identity,
    find_tool,
    identity,
    open_data,
    seccomp_program,
    system_binds,
)
from megatron_ring.rl.reward.workers.confine import seccomp_filter

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
class Isolation:
    """How isolated workers are started on this machine.

    Example: ``Isolation(method="namespaces", missing="", filter_bytes=b"...")``.
    """

    method: str
    """namespaces, dropped or none; see this module's docstring."""
    missing: str
    """Why there is no isolation; empty if there is."""
    filter_bytes: bytes
    """Seccomp filter that a verifier process installs before its first task; empty if libseccomp is missing."""

    def start(self, words: Sequence[str], *, pass_fds: Sequence[int], log: int) -> subprocess.Popen[bytes]:
        """Start this interpreter with ``words`` in isolation; its output goes to the descriptor ``log``."""
        return _start(self.method, words, pass_fds=pass_fds, stdout=log, stderr=log)


@functools.cache
def find_isolation() -> Isolation:
    """The isolation that this machine offers; probed once per process."""
    why = []
    try:
        filter_bytes = seccomp_filter()
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        filter_bytes = b""
        why.append(f"pyseccomp cannot be used ({error})")
    for method in ("namespaces", "dropped") if os.geteuid() == 0 else ("namespaces",):
        problem = _probe(method) if filter_bytes else None
        if filter_bytes and problem is None:
            return Isolation(method=method, missing="", filter_bytes=filter_bytes)
        why += [problem] if problem else []
    return Isolation(method="none", missing="; ".join(dict.fromkeys(why)), filter_bytes=filter_bytes)


def _probe(method: str) -> str | None:
    """None if a process is isolated by ``method`` and can import the workers' code; else what is wrong."""
    try:
        # a file that exists on this machine and must not be visible
        words = ("-B", "-c", _PROBE, str(Path.home() / ".profile" if os.geteuid() else "/etc/passwd"))
        process = _start(method, words, pass_fds=(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except (RewardError, OSError) as error:
        return str(error)
    with process:
        try:
            said, complaint = process.communicate(timeout=_PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"the check of the isolation took more than {_PROBE_SECONDS:g} s"
    try:
        holes = json.loads(said)
    except ValueError:
        lines = complaint.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        return f"bwrap does not start a verifier here ({lines[-1][:200]}); {SETUP}, or allow user namespaces here"
    return f"the isolation has holes: {', '.join(holes)}" if holes else None


def _start(
    method: str, words: Sequence[str], *, pass_fds: Sequence[int], stdout: int, stderr: int
) -> subprocess.Popen[bytes]:
    argv, environment, held = [sys.executable, *words], _environment(), list[int]()
    who: Identity = {}
    if method == "none":
        environment = {**os.environ, **environment}
    else:
        held = [open_data(seccomp_program(final=False))]
        argv = [*_bwrap(method, environment, held[0]), *argv]
        who = identity() if method == "namespaces" else {}
        environment = {"PATH": "/usr/bin:/bin"}
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd="/" if method != "none" else None,
            env=environment,
            pass_fds=(*pass_fds, *held),
            start_new_session=True,
            **who,
        )
    finally:
        for fd in held:
            os.close(fd)


def _bwrap(method: str, environment: dict[str, str], seccomp_fd: int) -> list[str]:
    bwrap = find_tool("bwrap", "the isolation of verifiers")
    argv = [bwrap, "--die-with-parent", "--new-session", "--hostname", "verifier"]
    if method == "namespaces":
        argv += ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns"]
    else:
        argv += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    argv += system_binds()
    # no /proc: nothing here needs it
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
    if method == "dropped":
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            argv += ["--cap-add", capability]
    argv += ["--seccomp", str(seccomp_fd), "--remount-ro", "/dev", "--remount-ro", "/", "--"]
    if method == "dropped":
        uid = str(FIRST_UID + os.getpid() % 1000)
        argv += [find_tool("setpriv", "the isolation of verifiers"), "--reuid", uid, "--regid", uid]
        argv += ["--clear-groups", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"]
    return argv


def _folders() -> list[Path]:
    """Folders that Python needs beside /usr: itself, its libraries and this package; none is inside another."""
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

"""The sandbox for model-written code: refuses to exist where its walls do not hold.

``Sandbox.open()`` runs a program inside that tries what must not work, before anything of the model's is run;
there is no way round it, and no weaker mode.
"""

from __future__ import annotations

import json

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox_command import SETUP, Limits, Program, find_tool
from megatron_ring.rl.reward.sandbox_run import RunResult, run

_PROBE = """
import ctypes, json, os
holes = []
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
must_fail("/dev/shm can be written", lambda: open("/dev/shm/hole", "w"))
must_fail("/usr can be written", lambda: open("/usr/hole", "w"))
must_fail("/root is visible", lambda: os.listdir("/root"))
must_fail("/home is visible", lambda: os.listdir("/home"))
must_fail("/etc/passwd is visible", lambda: open("/etc/passwd"))
must_fail("/proc/sys can be written", lambda: open("/proc/sys/kernel/core_pattern", "r+"))
must_fail("the first process can be read", lambda: open("/proc/1/environ"))
must_fail("the first process can be written", lambda: open("/proc/1/mem", "r+b"))
must_fail("sockets can be made", lambda: __import__("socket").socket())
must_fail("ptrace works: no seccomp filter", lambda: call(libc.ptrace, 0, 0, 0, 0))
must_fail("namespaces can be made", lambda: call(libc.unshare, 0x10000000))
if os.getuid() == 0:
    holes.append("the code is root")
if len([name for name in os.listdir("/proc") if name.isdigit()]) > 3:
    holes.append("processes outside are visible")
if "NoNewPrivs:\\t1" not in open("/proc/self/status").read():
    holes.append("privileges can be gained")
if {int(fd) for fd in os.listdir("/proc/self/fd")} - {0, 1, 2, 3}:
    holes.append("descriptors leak in")
open("/tmp/mine", "w").write("x")
print(json.dumps(holes))
"""


class Sandbox:
    """Runs programs apart from the machine; obtained by ``Sandbox.open()``.

    Example: ``Sandbox.open().run(sandbox.python("print(1)"), Limits(seconds=2.0)).stdout == b"1\\n"``.
    """

    def __init__(self, python_path: str):
        self._python = python_path

    @classmethod
    def open(cls) -> Sandbox:
        """A sandbox whose isolation has just been tried. Raises RewardError: what is missing, and the remedy."""
        sandbox = cls(find_tool("python3", "Python solutions", "install the system's python3"))
        result = sandbox.run(sandbox.python(_PROBE), Limits(seconds=20.0))
        try:
            holes = json.loads(result.stdout) if result.status == "ok" else None
        except ValueError:
            holes = None
        if holes is None:
            said = result.stderr.decode(errors="replace").strip().replace("\n", "; ")[-300:]
            raise RewardError(f"the sandbox's own check ended with {result.status}: {said}; {SETUP}")
        if holes:
            raise RewardError(f"the sandbox does not isolate: {', '.join(holes)}; {SETUP}, or run elsewhere")
        return sandbox

    def python(self, source: str, *words: str, files: dict[str, bytes] | None = None) -> Program:
        """A program that is ``source``, run by the system's Python without site packages."""
        path = "/code/main.py"
        argv = (self._python, "-I", "-S", "-B", path, *words)
        return Program(argv=argv, files={path: source.encode(errors="surrogateescape"), **(files or {})})

    def run(self, program: Program, limits: Limits, stdin: bytes = b"") -> RunResult:
        """Run to the end, at most ``limits.seconds``. Nothing of it is left when this returns."""
        return run(program, limits, stdin)

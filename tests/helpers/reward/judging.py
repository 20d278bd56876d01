"""Problems to judge, reward functions good and bad, and the processes that a test's workers and sandboxes are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_ring.config.rl import RewardConfig
from megatron_ring.data.prompts.stream import Prompt

PLUGIN = """
import os, signal, sys, time
from megatron_ring.rl.types import RewardResult

def right(prompt, text):
    return RewardResult(score=1.0, status="correct", detail=f"{os.getpid()} {text}")

def wait(prompt, text):
    open(f"{text}.{os.getpid()}", "w").close()
    while not os.path.exists(text):
        time.sleep(0.01)
    return right(prompt, text)

def hang(prompt, text):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(text, "w").write(str(os.getpid()))
    while True:
        pass

def die(prompt, text):
    print("the last words of a verifier", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def leave(prompt, text):
    os._exit(0)

def fail(prompt, text):
    raise KeyError("no such thing")

def number(prompt, text):
    return 1.0

def chatter(prompt, text):
    print("x" * (3 << 20), flush=True)
    return RewardResult(score=0.0, status="wrong", detail=str(os.fstat(1).st_size))

def modules(prompt, text):
    main = os.path.basename(sys.modules["__main__"].__file__)
    return RewardResult(score=0.0, status="wrong", detail=f"{main}, torch: {'torch' in sys.modules}")

def comes_back(prompt, text):
    child = os.fork()
    if child == 0:
        if text == "raises":
            raise ValueError("the copy's")
        return RewardResult(score=0.5, status="wrong", detail="the copy's")
    os.waitpid(child, 0)
    return right(prompt, text)

def leaves_an_alarm(prompt, text):
    signal.signal(signal.SIGALRM, lambda *_: os._exit(9))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    return right(prompt, text)

def ends_its_group(prompt, text):
    os.killpg(0, signal.SIGKILL)

def says_much(prompt, text):
    return RewardResult(score=1.0, status="correct", detail="x" * (3 << 20))

def prints_much_and_dies(prompt, text):
    os.ftruncate(1, 64 << 30)
    os.kill(os.getpid(), signal.SIGKILL)

def one_argument(prompt):
    return right(prompt, "")

not_a_function = 3

def sandboxed(prompt, text):
    from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
    from megatron_ring.rl.reward.sandbox.command import Limits
    sandbox = Sandbox.open()
    source = "import os, time" + chr(10) + "os.fork(); os.fork(); time.sleep(600)"
    sandbox.run(sandbox.python(source), Limits(seconds=600.0))
"""


_FUNCTION_WORDS = (
    "right wait hang die leave fail number chatter modules sandboxed comes_back leaves_an_alarm ends_its_group "
    "says_much prints_much_and_dies"
)


FUNCTIONS = tuple(_FUNCTION_WORDS.split())


def config(plugin: str, **words) -> RewardConfig:
    functions = tuple(f"{name}={plugin}:{name}" for name in FUNCTIONS)
    return RewardConfig(
        **{"reward_functions": functions, "reward_workers": 1, "reward_timeout": 200.0, **words}
    )


def problem(domain: str, **reference: Any) -> Prompt:
    return Prompt(uid=3, domain=domain, text="?", tokens=(1, 2), reference=reference)


PATIENCE = 120.0
"""Seconds for what happens by itself: a busy machine is not a failure."""


stood_before: set[psutil.Process] = set()
"""What other rooms' tests have left running for the next of them, such as ``parallel/preloaded.py``'s server."""


def own_processes() -> list[psutil.Process]:
    """Everything below this process that has not ended, but for what stood before."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append(process)
    return [process for process in found if process not in stood_before]


def sandbox_processes() -> list[str]:
    """Command lines of what runs in a sandbox: two process namespaces below ours, that of its zygote and its own."""
    return [words for words, depth in _command_lines() if depth == 2]


def zygotes() -> list[str]:
    """Command lines of the processes that stand ready for runs of ours: one namespace below ours."""
    return [words for words, depth in _command_lines() if depth == 1]


def _command_lines() -> Iterator[tuple[str, int]]:
    for process in own_processes():
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            ids = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))
            yield " ".join(process.cmdline()), len(ids) - 1


def becomes(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

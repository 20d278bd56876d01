"""The process that judges: forked by a worker's keeper, and killed by it at any time."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_ring.data.prompts import Prompt
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.registry import Judge, result_problem
from megatron_ring.rl.reward.workers.processes import MAX_WORD_BYTES, die_with_parent, exit_words, kill_below
from megatron_ring.rl.types import RewardResult

_DYING_SECONDS = 0.5
"""A process whose socket has closed is about to end by itself, with an exit code that says more than a kill."""
_LAST_WORDS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A response to judge.

    Example: ``Task(prompt=prompt, text="\\boxed{4}", seconds=10.0)``.
    """

    prompt: Prompt
    text: str
    seconds: float
    """After which the process is killed, if its judge knows no better; loading does not count."""
    alone: bool = False
    """In a process that does nothing else before or after: its library evaluates the text."""


class GoneError(Exception):
    """The process has ended, or says what is no word of it."""


class Judging:
    """The keeper's side of it. ``become`` is what the fork runs: it takes its end of the socket.

    Example: ``judging = Judging(trainer, become)``, ``judging.send(task)``, ``judging.receive(10.0)``.
    """

    def __init__(self, trainer: Connection, become: Callable[[Connection], None]):
        self.num_judged = 0
        self._trainer = trainer
        self._socket, far_end = Pipe()
        self._log_start = os.fstat(2).st_size
        keeper = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            # from here on another process, which never comes back
            status = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                die_with_parent(keeper)
                self._socket.close()
                trainer.close()
                with contextlib.suppress(EOFError, ConnectionError):
                    become(far_end)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        far_end.close()

    def is_alive(self) -> bool:
        """False once it has ended by itself. It says nothing unasked, so a word would be its end as well."""
        return not wait([self._socket], 0)

    def send(self, task: Task) -> None:
        """Raises GoneError at its end."""
        try:
            self._socket.send_bytes(pickle.dumps(task))
        except OSError as error:
            raise GoneError from error

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Its next word; None after ``seconds``. Raises GoneError at its end, EOFError at the trainer's."""
        ready = wait([self._socket, self._trainer], seconds)
        if not ready:
            return None
        if self._socket not in ready:  # the trainer says nothing while it waits for a verdict
            raise EOFError
        try:
            words = json.loads(self._socket.recv_bytes(MAX_WORD_BYTES))
        except (EOFError, OSError, ValueError, RecursionError) as error:
            raise GoneError from error
        if not isinstance(words, dict):
            raise GoneError
        return words

    def end(self) -> str:
        """Kill it and all that it has started; how it ended, with its last words, in one line."""
        if wait([self._socket], 0):
            pidfd = os.pidfd_open(self._pid)
            wait([pidfd], _DYING_SECONDS)
            os.close(pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        kill_below(os.getpid())
        _, status = os.waitpid(self._pid, 0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # what it had left behind
                pass
        self._socket.close()
        start = max(self._log_start, os.fstat(2).st_size - _LAST_WORDS)
        lines = os.pread(2, _LAST_WORDS, start).decode(errors="replace").strip().splitlines()
        end = exit_words(os.waitstatus_to_exitcode(status))
        return f"{end}: {lines[-1][:200]}" if lines else end


def judge_until_told(keeper: Connection, judges: Mapping[str, Judge], loaded: Collection[str]) -> None:
    """Answer one task after another, until the keeper closes its end or kills this process.

    ``loaded`` are the domains whose libraries are here already.
    """

    def say(**words: object) -> None:
        keeper.send_bytes(json.dumps(words).encode())

    loaded = set(loaded)
    while True:
        task: Task = pickle.loads(keeper.recv_bytes())
        domain = task.prompt.domain
        judge = judges[domain]
        if domain not in loaded:
            say(loading=True)
            try:
                judge.load()
            except RewardError as error:
                say(refused=str(error))
                continue
            loaded.add(domain)
        say(started=task.seconds if judge.seconds is None else judge.seconds(task.prompt.reference))
        result = verdict(judge, task.prompt, task.text)
        say(result=[float(result.score), result.status, str(result.detail)])


def verdict(judge: Judge, prompt: Prompt, text: str) -> RewardResult:
    """What the judge's function says; whatever it raises is a value."""
    try:
        result = judge.function(prompt, text)
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return RewardResult(score=0.0, status="verifier_error", detail=detail)
    problem = result_problem(result)
    if problem is not None:
        return RewardResult(score=0.0, status="verifier_error", detail=problem)
    return result

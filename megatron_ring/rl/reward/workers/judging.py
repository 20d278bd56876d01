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

from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.registry import Judge, result_problem
from megatron_ring.rl.reward.workers.processes import MAX_WORD_BYTES, die_with_parent, end_words, kill_below
from megatron_ring.rl.types import RewardResult

_DYING_SECONDS = 0.5
"""A process whose socket has closed is about to end by itself, with an exit code that says more than a kill."""
_DETAIL_CHARS = 4096
"""Of a verdict's words; what is longer says no more to anybody and is no word that the trainer takes."""


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
                # a function that signals its own group reaches what it has started, and not the keeper
                os.setsid()
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
        return end_words(os.waitstatus_to_exitcode(status), 2, self._log_start)


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
        say(result=[float(result.score), result.status, str(result.detail)[:_DETAIL_CHARS]])


def verdict(judge: Judge, prompt: Prompt, text: str) -> RewardResult:
    """What the judge's function says; whatever it raises is a value."""
    itself = os.getpid()
    try:
        result = judge.function(prompt, text)
    except Exception as error:
        result = error
    if os.getpid() != itself:
        # a copy that the function made by fork came back from it: its word would be taken for that of the next text
        os._exit(0)
    # an alarm that the function has left would go off in the next one
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(result, Exception):
        error = result
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return RewardResult(score=0.0, status="verifier_error", detail=detail)
    problem = result_problem(result)
    if problem is not None:
        return RewardResult(score=0.0, status="verifier_error", detail=problem)
    return result

"""The process that runs reward functions: a fork of a worker's supervisor, which may kill it at any time."""

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
from megatron_ring.rl.reward.registry import Verifier, result_problem
from megatron_ring.rl.reward.workers.processes import (
    MAX_MESSAGE_BYTES,
    die_with_parent,
    end_words,
    kill_below,
)
from megatron_ring.rl.types import RewardResult

_EXIT_SECONDS = 0.5
"""Wait for the exit of a process whose socket has closed: its own exit code tells more than our kill."""
_DETAIL_CHARS = 4096
"""Of a result's detail; a message must stay below ``MAX_MESSAGE_BYTES``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A response to verify.

    Example: ``Task(prompt=prompt, text="\\boxed{4}", timeout=10.0)``.
    """

    prompt: Prompt
    text: str
    timeout: float
    """Seconds after which the process is killed, unless the verifier has its own limit; loading does not
    count."""
    alone: bool = False
    """Verify it in a new process that is not used again: the library evaluates the text."""


class GoneError(Exception):
    """The process has ended, or has sent an invalid message."""


class VerifierProcess:
    """The supervisor's handle of it. ``run`` is what the fork runs; it gets its end of the socket.

    Example: ``process = VerifierProcess(trainer, run)``, ``process.send(task)``, ``process.receive(10.0)``.
    """

    def __init__(self, trainer: Connection, run: Callable[[Connection], None]):
        self.num_verified = 0
        self._trainer = trainer
        self._socket, far_end = Pipe()
        self._log_start = os.fstat(2).st_size
        supervisor = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            # the child: it never returns from here
            status = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                # a function that signals its own group reaches what it has started, and not the supervisor
                os.setsid()
                die_with_parent(supervisor)
                self._socket.close()
                trainer.close()
                with contextlib.suppress(EOFError, ConnectionError):
                    run(far_end)
                status = 0
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        far_end.close()

    def is_alive(self) -> bool:
        """False once it has ended. It sends nothing without a task, so a message would mean that it is broken."""
        return not wait([self._socket], 0)

    def send(self, task: Task) -> None:
        """Raises GoneError if it has ended."""
        try:
            self._socket.send_bytes(pickle.dumps(task))
        except OSError as error:
            raise GoneError from error

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Its next message; None after ``seconds``. Raises GoneError if it has ended, EOFError if the trainer has."""
        ready = wait([self._socket, self._trainer], seconds)
        if not ready:
            return None
        if self._socket not in ready:  # the trainer sends nothing while it waits for a result: it has ended
            raise EOFError
        try:
            message = json.loads(self._socket.recv_bytes(MAX_MESSAGE_BYTES))
        except (EOFError, OSError, ValueError, RecursionError) as error:
            raise GoneError from error
        if not isinstance(message, dict):
            raise GoneError
        return message

    def end(self) -> str:
        """Kill it and everything it started. How it ended and the last line of its log, in one line."""
        if wait([self._socket], 0):
            pidfd = os.pidfd_open(self._pid)
            wait([pidfd], _EXIT_SECONDS)
            os.close(pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        kill_below(os.getpid())
        _, status = os.waitpid(self._pid, 0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # orphans that it left
                pass
        self._socket.close()
        return end_words(os.waitstatus_to_exitcode(status), 2, self._log_start)


def serve_tasks(supervisor: Connection, verifiers: Mapping[str, Verifier], loaded: Collection[str]) -> None:
    """Verify one task after another, until the supervisor closes its end or kills this process.

    ``loaded`` are the domains whose libraries are loaded already.
    """

    def send(**message: object) -> None:
        supervisor.send_bytes(json.dumps(message).encode())

    loaded = set(loaded)
    while True:
        task: Task = pickle.loads(supervisor.recv_bytes())
        domain = task.prompt.domain
        verifier = verifiers[domain]
        if domain not in loaded:
            send(loading=True)
            try:
                verifier.load()
            except RewardError as error:
                send(refused=str(error))
                continue
            loaded.add(domain)
        send(started=task.timeout if verifier.timeout is None else verifier.timeout(task.prompt.reference))
        result = verify(verifier, task.prompt, task.text)
        send(result=[float(result.score), result.status, str(result.detail)[:_DETAIL_CHARS]])


def verify(verifier: Verifier, prompt: Prompt, text: str) -> RewardResult:
    """The result of the verifier's function; an exception becomes a ``verifier_error``."""
    own_pid = os.getpid()
    try:
        result = verifier.function(prompt, text)
    except Exception as error:
        result = error
    if os.getpid() != own_pid:
        # the function forked, and this is the child: its result would be taken for that of the next response
        os._exit(0)
    # an alarm that the function left would go off in the next call
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(result, Exception):
        error = result
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return RewardResult(score=0.0, status="verifier_error", detail=detail)
    problem = result_problem(result)
    if problem is not None:
        return RewardResult(score=0.0, status="verifier_error", detail=problem)
    return result

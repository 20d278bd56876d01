"""The trainer's side of one worker process, and the socket to it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Collection
from multiprocessing import Pipe
from multiprocessing.connection import wait as wait_for
from typing import IO, Any

from megatron_ring.config.rl import RewardConfig
from megatron_ring.rl.reward.registry import WorkerKind
from megatron_ring.rl.reward.sandbox.command import above_streams
from megatron_ring.rl.reward.workers.isolation import find_isolation
from megatron_ring.rl.reward.workers.processes import MAX_MESSAGE_BYTES, end_words, kill_tree


class DiedError(Exception):
    """A worker ended, sent an invalid message, or had to be killed while it loaded."""


class WorkerHandle:
    """One worker process. Every method belongs to the thread that made it, except :meth:`kill`."""

    @above_streams()
    def __init__(self, config: RewardConfig, domains: Collection[str], kind: WorkerKind):
        self._log: IO[bytes] = tempfile.TemporaryFile("ab+", buffering=0)  # noqa: SIM115 (closed by close)
        self._socket, far_end = Pipe()
        fd, words = far_end.fileno(), ("-m", "megatron_ring.rl.reward.workers.worker", str(far_end.fileno()))
        filter_bytes: bytes | None = None
        try:
            if kind == "isolated":
                isolation = find_isolation()
                filter_bytes = isolation.filter_bytes
                # behind bwrap its parent is not this process; bwrap ends it with this process
                parent = "0" if isolation.method != "none" else str(os.getpid())
                self._process = isolation.start((*words, parent), pass_fds=(fd,), log=self._log.fileno())
            else:
                self._process = self._start((*words, str(os.getpid())), fd)
        finally:
            far_end.close()
        self._settings = (config, tuple(domains), kind, filter_bytes)
        self.is_ready = False
        """Whether it has sent that it waits for the next task."""

    def _start(self, words: tuple[str, ...], fd: int) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(fd,),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            start_new_session=True,
        )

    def wait_until_loaded(self, seconds: float) -> str | None:
        """None once the worker has loaded its reward functions, or the error line with which it refused to."""
        self.send(self._settings)
        message = self.receive(seconds)
        if message is None:
            raise DiedError
        return message.get("refused")

    def send(self, message: object) -> None:
        """Raises DiedError if the worker has ended."""
        try:
            self._socket.send_bytes(pickle.dumps(message))
        except OSError as error:
            raise DiedError from error

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The worker's next message; None if none comes within ``seconds``. Raises DiedError if it has ended.

        An isolated worker is not trusted: its message is read as JSON of bounded length.
        """
        try:
            if not self._socket.poll(seconds):
                return None
            message = json.loads(self._socket.recv_bytes(MAX_MESSAGE_BYTES))
        except (EOFError, OSError, ValueError, RecursionError) as error:
            raise DiedError from error
        if not isinstance(message, dict):
            raise DiedError
        return message

    def kill(self) -> None:
        """Kill the process and everything it started; also after it has died."""
        kill_tree(self._process.pid)

    def close(self, wait: float) -> str:
        """Wait ``wait`` seconds for its end, then kill it and release what it holds. How it ended, in one line."""
        pidfd = os.pidfd_open(self._process.pid)
        # not select: it takes no descriptor above 1023
        wait_for([pidfd], wait)
        os.close(pidfd)
        self.kill()
        code = self._process.wait()
        self._socket.close()
        with self._log as log:
            return end_words(code, log.fileno())

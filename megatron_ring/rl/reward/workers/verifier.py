"""The trainer's side of one verifier: a worker process, and the socket to it."""

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
from megatron_ring.rl.reward.registry import Place
from megatron_ring.rl.reward.sandbox.command import above_streams
from megatron_ring.rl.reward.workers.processes import MAX_WORD_BYTES, end_words, kill_tree
from megatron_ring.rl.reward.workers.walls import raise_walls


class DiedError(Exception):
    """A worker ended, said what is no word of a worker, or had to be killed while it loaded."""


class Verifier:
    """One worker process. Every method belongs to the thread that made it, except :meth:`kill`."""

    @above_streams()
    def __init__(self, config: RewardConfig, domains: Collection[str], place: Place):
        self._log: IO[bytes] = tempfile.TemporaryFile("ab+", buffering=0)  # noqa: SIM115 (closed by close)
        self._socket, far_end = Pipe()
        fd, words = far_end.fileno(), ("-m", "megatron_ring.rl.reward.workers.worker", str(far_end.fileno()))
        filter_bytes: bytes | None = None
        try:
            if place == "inside":
                walls = raise_walls()
                filter_bytes = walls.filter_bytes
                # behind bwrap the parent is not this process: it dies with that one by itself
                parent = "0" if walls.way != "none" else str(os.getpid())
                self._process = walls.start((*words, parent), pass_fds=(fd,), log=self._log.fileno())
            else:
                self._process = self._start((*words, str(os.getpid())), fd)
        finally:
            far_end.close()
        self._settings = (config, tuple(domains), place, filter_bytes)
        self.is_ready = False
        """Whether it has said that it waits for the next task."""

    def _start(self, words: tuple[str, ...], fd: int) -> subprocess.Popen:
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
        """None once the worker has its reward functions, or the line with which it refuses to have them."""
        self.send(self._settings)
        words = self.receive(seconds)
        if words is None:
            raise DiedError
        return words.get("refused")

    def send(self, words: object) -> None:
        """Raises DiedError at its end."""
        try:
            self._socket.send_bytes(pickle.dumps(words))
        except OSError as error:
            raise DiedError from error

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The worker's next word; None if it says nothing for so long. Raises DiedError at its end.

        What comes from inside the walls is read as JSON of bounded length and is otherwise not trusted.
        """
        try:
            if not self._socket.poll(seconds):
                return None
            words = json.loads(self._socket.recv_bytes(MAX_WORD_BYTES))
        except (EOFError, OSError, ValueError, RecursionError) as error:
            raise DiedError from error
        if not isinstance(words, dict):
            raise DiedError
        return words

    def kill(self) -> None:
        """End the process and whatever it started; also after it has died."""
        kill_tree(self._process.pid)

    def close(self, wait: float) -> str:
        """Kill after ``wait`` seconds, clear up; returns how the process ended and its last words, in one line."""
        pidfd = os.pidfd_open(self._process.pid)
        # not select: a process with many open files gives it a number that it cannot take
        wait_for([pidfd], wait)
        os.close(pidfd)
        self.kill()
        code = self._process.wait()
        self._socket.close()
        with self._log as log:
            return end_words(code, log.fileno())

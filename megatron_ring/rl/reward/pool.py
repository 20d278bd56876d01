"""Verifiers beside the trainer: scores arrive while generation goes on, and no response can stop a run.

Each worker process has a thread here that hands it one response at a time and waits. A verifier that takes longer
than ``reward_timeout`` is killed and replaced; one that dies is replaced. Either is the value of that response alone.
The clock of a response starts when its verifier is called: imports do not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait as wait_for
from typing import IO

from megatron_ring.config.rl import RewardConfig
from megatron_ring.data.prompts import Prompt
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.registry import BUILT_IN, parse_reward_functions
from megatron_ring.rl.types import RewardResult

_DYING_SECONDS = 0.5
"""A process whose socket has closed is about to end by itself, with an exit code that says more than a kill."""
START_SECONDS = 120.0
"""Longest start of a worker, and longest load of what a domain needs."""
MAX_DEATHS_AT_START = 3


class _DiedError(Exception):
    """A worker ended, or had to be killed while it loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    prompt: Prompt
    text: str
    future: Future[RewardResult]


class _Worker:
    """One verifier process and the socket to it."""

    def __init__(self, config: RewardConfig, domains: Collection[str]):
        self._log: IO[bytes] = tempfile.TemporaryFile("ab+", buffering=0)  # noqa: SIM115 (closed by close)
        self._socket, far_end = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    __name__.replace("pool", "worker"),
                    str(far_end.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(far_end.fileno(),),
                env=environment,
                start_new_session=True,
            )
        finally:
            far_end.close()
        self._settings = (config, tuple(domains))

    def wait_until_loaded(self) -> str | None:
        """None once the worker has its reward functions, or the line with which it refuses to have them."""
        self.send(self._settings)
        words = self.receive(START_SECONDS)
        if words is None:
            raise _DiedError
        return words.get("refused")

    def send(self, words: object) -> None:
        try:
            self._socket.send_bytes(pickle.dumps(words))
        except OSError as error:
            raise _DiedError from error

    def receive(self, seconds: float) -> dict | None:
        """The worker's next word; None if it says nothing for so long. Raises _DiedError at its end."""
        try:
            return json.loads(self._socket.recv_bytes()) if self._socket.poll(seconds) else None
        except (EOFError, OSError) as error:
            raise _DiedError from error

    def kill(self) -> None:
        """End the process and whatever it started; also after it has died."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

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
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{end}: {lines[-1][:200]}" if lines else end


class RewardPool:
    """Judges responses in worker processes. Open it with ``RewardPool.open``; submit from any thread.

    Example: ``with RewardPool.open(config.reward, domains={"math"}) as pool: pool.submit(prompt, text).result()``.
    """

    def __init__(self, config: RewardConfig, domains: Collection[str]):
        self._config = config
        self._domains = tuple(sorted(domains))
        self._known = {*BUILT_IN, *parse_reward_functions(config.reward_functions)}
        for domain in self._domains:
            self._check_domain(domain)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._deaths_at_start = 0
        self._broken: RewardError | None = None
        self._closed = False
        self._first_loaded: Future[None] = Future()
        self.num_replaced = 0
        """Workers that were replaced because they hung or died over a response."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, config: RewardConfig, domains: Collection[str] = ()) -> Iterator[RewardPool]:
        """Start ``config.reward_workers`` processes and kill them at the end; what is unjudged then is cancelled.

        Returns when one worker has imported every reward function; with "code" in ``domains`` it has tried the
        sandbox too. What else ``domains`` need is loaded in the background. Raises RewardError in one line for a
        domain without a function, a path that leads nowhere, a sandbox that does not isolate, workers that cannot
        start.
        """
        if config.reward_workers < 1:
            raise RewardError(f"reward_workers={config.reward_workers} must be at least 1; try 2")
        pool = cls(config, domains)
        threads = [
            threading.Thread(target=pool._serve, name=f"reward-{n}", daemon=True)
            for n in range(config.reward_workers)
        ]
        for thread in threads:
            thread.start()
        try:
            pool._first_loaded.result()
            yield pool
        finally:
            pool._close(threads)

    def submit(self, prompt: Prompt, text: str) -> Future[RewardResult]:
        """The verdict on ``text``, in time. The future raises RewardError only if nobody can judge the domain."""
        self._check_domain(prompt.domain)
        future: Future[RewardResult] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._broken is not None:
                raise self._broken
            self._jobs.put(_Job(prompt=prompt, text=text, future=future))
        return future

    def _check_domain(self, domain: str) -> None:
        if domain not in self._known:
            raise RewardError(
                f"domain={domain} has no reward function, only {', '.join(sorted(self._known))} have; add "
                f"--reward-functions {domain}=module:function"
            )

    def _serve(self) -> None:
        """One worker's thread: keep a process alive, and give it one response after another."""
        worker = self._start()
        while worker is not None:
            job = self._jobs.get()
            if job is None:
                break
            if not job.future.set_running_or_notify_cancel():
                continue
            while worker is not None and not job.future.done():
                if not self._judge(worker, job):
                    worker = self._start()
            if worker is None and not job.future.done():
                job.future.set_exception(self._broken or CancelledError())
        if worker is not None:
            self._end(worker, 0.0)

    def _judge(self, worker: _Worker, job: _Job) -> bool:
        """Settle the job's future, or leave it unsettled for another worker; False if this worker is gone."""
        started = False
        try:
            worker.send((job.prompt, job.text))
            words = worker.receive(START_SECONDS)
            if words is None:
                raise _DiedError
            if "refused" in words:
                job.future.set_exception(RewardError(words["refused"]))
                return True
            started = True
            self._deaths_at_start = 0
            words = worker.receive(self._config.reward_timeout)
        except _DiedError:
            how = self._end(worker, _DYING_SECONDS)
            if self._closed:
                job.future.set_exception(CancelledError())
            elif started:
                self._settle(
                    job, RewardResult(score=0.0, status="verifier_error", detail=f"verifier died: {how}")
                )
            else:
                self._count_death(how)
            return False
        if words is None:
            self._end(worker, 0.0)
            detail = f"verifier killed after {self._config.reward_timeout:g} s"
            self._settle(job, RewardResult(score=0.0, status="timeout", detail=detail))
            return False
        score, status, detail = words["result"]
        job.future.set_result(RewardResult(score=score, status=status, detail=detail))
        return True

    def _settle(self, job: _Job, result: RewardResult) -> None:
        with self._lock:
            self.num_replaced += 1
        job.future.set_result(result)

    def _start(self) -> _Worker | None:
        """A process that has its reward functions; None if the pool is closed or cannot keep one alive."""
        while True:
            with self._lock:
                if self._closed or self._broken is not None:
                    return None
                try:
                    worker = _Worker(self._config, self._domains)
                except OSError as error:
                    line = f"a reward worker cannot be started: {error}; lower reward_workers or free memory"
                    return self._break(RewardError(line))
                self._workers.add(worker)
            try:
                refused = worker.wait_until_loaded()
            except _DiedError:
                self._count_death(self._end(worker, _DYING_SECONDS))
                continue
            with self._lock:
                if refused is None:
                    if not self._first_loaded.done():
                        self._first_loaded.set_result(None)
                    return worker
            self._end(worker, _DYING_SECONDS)
            with self._lock:
                return self._break(RewardError(refused))

    def _end(self, worker: _Worker, wait: float) -> str:
        with self._lock:
            # from here on only this thread touches it: its process id may belong to another soon
            self._workers.discard(worker)
        return worker.close(wait)

    def _count_death(self, how: str) -> None:
        with self._lock:
            self._deaths_at_start += 1
            if self._deaths_at_start >= MAX_DEATHS_AT_START and not self._closed:
                self._break(
                    RewardError(
                        f"reward workers died {self._deaths_at_start} times in a row before they could judge "
                        f"({how}); run python -m megatron_ring.rl.reward.worker by hand, or free memory"
                    )
                )

    def _break(self, error: RewardError) -> None:
        """With the lock held: give up, and tell everyone who waits."""
        if self._broken is None and not self._closed:
            self._broken = error
            if not self._first_loaded.done():
                self._first_loaded.set_exception(error)
            self._drain(error)

    def _drain(self, error: BaseException) -> None:
        """With the lock held: settle what no worker has taken, and let every thread find its end."""
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)
        for _ in range(self._config.reward_workers):
            self._jobs.put(None)

    def _close(self, threads: list[threading.Thread]) -> None:
        with self._lock:
            self._closed = True
            self._drain(CancelledError())
            for worker in self._workers:
                worker.kill()
        for thread in threads:
            thread.join()

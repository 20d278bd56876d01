"""A pool of reward workers beside the trainer: scores arrive while generation continues, and no response can
stop a run.

Each worker has a thread here, which sends it one response at a time and waits for the result. A verifier that exceeds
its time limit is killed, and a worker that dies is replaced; only the response that it had loses its score. The time
limit counts from the call of the reward function: imports do not count. Which verifiers run in isolation:
:func:`~megatron_ring.rl.reward.registry.worker_kind`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import signal
import threading
import typing
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from megatron_ring.config.rl import RewardConfig
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.registry import (
    BUILT_IN,
    WorkerKind,
    needs_isolation,
    parse_reward_functions,
    worker_kind,
)
from megatron_ring.rl.reward.sandbox.cgroup import sweep
from megatron_ring.rl.reward.workers.isolation import find_isolation
from megatron_ring.rl.reward.workers.verifier_process import Task
from megatron_ring.rl.reward.workers.worker import START_SECONDS
from megatron_ring.rl.reward.workers.worker_handle import DiedError, WorkerHandle
from megatron_ring.rl.types import RewardResult, RewardStatus

log = logging.getLogger("megatron_ring")

_EXIT_SECONDS = 0.5
"""Wait for the exit of a process whose socket has closed: its own exit code tells more than our kill."""
_SILENCE_SECONDS = 10.0
"""After this long without a message a worker counts as stopped, if it has nothing to load and no time limit runs."""
MAX_DEATHS_AT_START = 3
_STATUSES = frozenset(typing.get_args(RewardStatus))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    task: Task
    kind: WorkerKind
    future: Future[RewardResult]


class RewardPool:
    """Scores responses in worker processes. Open it with ``RewardPool.open``; submit from any thread.

    Example: ``with RewardPool.open(config.reward, domains={"math"}) as pool: pool.submit(prompt, text).result()``.
    """

    def __init__(self, config: RewardConfig, domains: Collection[str]):
        self._config = config
        self._domains = tuple(sorted(domains))
        self._own = parse_reward_functions(config.reward_functions)
        self._known = {*BUILT_IN, *self._own}
        for domain in self._domains:
            self._check_domain(domain)
        kinds: set[WorkerKind] = {worker_kind(domain, self._own) for domain in self._domains}
        if config.reward_functions:
            # users' functions are imported whatever the problems are, so that a mistake shows at the start
            kinds.add("trusted")
        self._kinds: list[WorkerKind] = sorted(kinds) or ["isolated"]
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: set[WorkerHandle] = set()
        self._deaths_at_start = 0
        self._broken: Exception | None = None
        self._closed = False
        self._first_loaded: dict[WorkerKind, Future[None]] = {kind: Future() for kind in self._kinds}
        self.num_replaced = 0
        """Processes that were replaced because they hung or died with a response."""

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: RewardConfig, domains: Collection[str] = (), *, warns: bool = True
    ) -> Iterator[RewardPool]:
        """Start ``config.reward_workers`` workers; at the end kill them and cancel the futures without a result.

        Returns when one worker has imported every reward function and, with "code" in ``domains``, has checked the
        sandbox. Other libraries that ``domains`` need load in the background. With ``warns`` (one process of a job) it
        logs a warning if this machine offers no isolation.

        Raises:
            RewardError: a domain has no reward function, an import path is wrong, the sandbox does not isolate, or
                workers cannot start. One line.
        """
        if config.reward_workers < 1:
            raise RewardError(f"reward_workers={config.reward_workers} must be at least 1; try 2")
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            # every child process inherits it, and bwrap then waits for its own child forever
            raise RewardError(
                "SIGCHLD is ignored in this process, so the end of a reward worker goes unnoticed; set it to SIG_DFL "
                "first (in a shell: trap - CHLD)"
            )
        pool = cls(config, domains)
        if warns and "isolated" in pool._kinds and find_isolation().missing:
            log.warning("%s", _no_isolation())
        threads = [
            threading.Thread(target=pool._serve, name=f"reward-{n}", daemon=True)
            for n in range(config.reward_workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for loaded in pool._first_loaded.values():
                loaded.result()
            yield pool
        finally:
            pool._close(threads)

    def submit(self, prompt: Prompt, text: str) -> Future[RewardResult]:
        """The result for ``text``, as a future. It raises RewardError only if the domain's verifier cannot be loaded."""
        self._check_domain(prompt.domain)
        kind = worker_kind(prompt.domain, self._own)
        alone = kind == "isolated" and needs_isolation(prompt)
        if alone and find_isolation().missing:
            raise RewardError(
                f"{prompt.reference.get('dataset')} evaluates answers, which is allowed in isolation only, and there is "
                f"none here: {find_isolation().missing}; take other problems or make isolation possible"
            )
        task = Task(prompt=prompt, text=text, timeout=self._config.reward_timeout, alone=alone)
        future: Future[RewardResult] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._broken is not None:
                raise self._broken
            self._jobs.put(_Job(task=task, kind=kind, future=future))
        return future

    def _check_domain(self, domain: str) -> None:
        if domain not in self._known:
            raise RewardError(
                f"domain={domain} has no reward function, only {', '.join(sorted(self._known))} have; add "
                f"--reward-functions {domain}=module:function"
            )

    def _serve(self) -> None:
        """One thread. A bug in it ends the pool with its exception, so that nobody waits for a result forever."""
        try:
            self._serve_jobs()
        except Exception as error:
            with self._lock:
                self._break(error)

    def _serve_jobs(self) -> None:
        """Keep a worker of each kind alive and send them one response after another."""
        workers: dict[WorkerKind, WorkerHandle] = {}
        for kind in self._kinds:
            worker = self._start(kind)
            if worker is not None:
                workers[kind] = worker
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                while not job.future.done():
                    worker = workers.pop(job.kind, None) or self._start(job.kind)
                    if worker is None:
                        job.future.set_exception(self._broken or CancelledError())
                    elif self._verify(worker, job):
                        workers[job.kind] = worker
            except Exception as error:
                if not job.future.done():
                    job.future.set_exception(error)
                raise
        for worker in workers.values():
            self._end(worker, 0.0)

    def _verify(self, worker: WorkerHandle, job: _Job) -> bool:
        """Set the job's future, or leave it open for another worker. False if this worker has ended."""
        timeout = None
        try:
            timeout = self._send(worker, job)
            if timeout is None:
                return True
            self._deaths_at_start = 0
            message = worker.receive(timeout + _SILENCE_SECONDS)
            if message is not None:
                worker.is_ready = bool(message.get("ready"))
                self._settle(job, message, timeout)
                return True
        except DiedError:
            how = self._end(worker, _EXIT_SECONDS)
            if self._closed:
                job.future.set_exception(CancelledError())
            elif timeout is not None:
                self._settle(job, {"died": how}, timeout)
            else:
                self._count_death(how)
            return False
        except TimeoutError:  # the worker is stopped and has not received the job
            self._end(worker, 0.0)
            return False
        self._end(worker, 0.0)
        self._settle(job, {"timeout": True}, timeout or 0.0)
        return False

    def _send(self, worker: WorkerHandle, job: _Job) -> float | None:
        """Send the job; its time limit in seconds once it has started, None if it is settled already.

        Raises:
            TimeoutError: the worker sends no message.
        """
        if not worker.is_ready:
            self._next(worker, START_SECONDS)
        worker.is_ready = False
        worker.send(job.task)
        message = self._next(worker, _SILENCE_SECONDS)
        while "loading" in message:
            message = self._next(worker, START_SECONDS)
        if "started" in message:
            return float(message["started"])
        worker.is_ready = bool(message.get("ready"))
        if "refused" in message:
            job.future.set_exception(RewardError(str(message["refused"])))
        else:
            self._settle(job, message, job.task.timeout)
        return None

    @staticmethod
    def _next(worker: WorkerHandle, seconds: float) -> dict[str, Any]:
        message = worker.receive(seconds)
        if message is None:
            raise TimeoutError
        return message

    def _settle(self, job: _Job, message: Mapping[str, Any], timeout: float) -> None:
        result = _result(message, timeout)
        if "result" not in message:
            with self._lock:
                self.num_replaced += 1
        job.future.set_result(result)

    def _start(self, kind: WorkerKind) -> WorkerHandle | None:
        """A worker that has loaded its reward functions; None if the pool is closed or no worker stays alive."""
        while True:
            with self._lock:
                if self._closed or self._broken is not None:
                    return None
                try:
                    domains = [d for d in self._domains if worker_kind(d, self._own) == kind]
                    worker = WorkerHandle(self._config, domains, kind)
                except OSError as error:
                    line = f"a reward worker cannot be started: {error}; lower reward_workers or free memory"
                    return self._break(RewardError(line))
                self._workers.add(worker)
            try:
                refused = worker.wait_until_loaded(START_SECONDS)
            except DiedError:
                self._count_death(self._end(worker, _EXIT_SECONDS))
                continue
            with self._lock:
                if refused is None:
                    loaded = self._first_loaded.get(kind)
                    if loaded is not None and not loaded.done():
                        loaded.set_result(None)
                    return worker
            self._end(worker, _EXIT_SECONDS)
            with self._lock:
                return self._break(RewardError(refused))

    def _end(self, worker: WorkerHandle, wait: float) -> str:
        with self._lock:
            # from here on only this thread may use its process id, which can be reused after wait()
            self._workers.discard(worker)
        return worker.close(wait)

    def _count_death(self, how: str) -> None:
        with self._lock:
            self._deaths_at_start += 1
            if self._deaths_at_start >= MAX_DEATHS_AT_START and not self._closed:
                self._break(
                    RewardError(
                        f"reward workers died {self._deaths_at_start} times in a row before they took a response "
                        f"({how}); run python -m megatron_ring.rl.reward.workers.worker by hand, or free memory"
                    )
                )

    def _break(self, error: Exception) -> None:
        """Give up: every open and later future raises ``error``. The caller holds the lock."""
        if self._broken is None and not self._closed:
            self._broken = error
            for loaded in self._first_loaded.values():
                if not loaded.done():
                    loaded.set_exception(error)
            self._drain(error)

    def _drain(self, error: BaseException) -> None:
        """Fail all jobs that no worker has taken, and tell every thread to end. The caller holds the lock."""
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
        # the memory cgroups of their sandboxes: a killed worker cannot remove them
        sweep()


def _result(message: Mapping[str, Any], timeout: float) -> RewardResult:
    """The result in a worker's message. An isolated worker is not trusted: its message may have any form."""
    if "timeout" in message:
        return RewardResult(score=0.0, status="timeout", detail=f"verifier killed after {timeout:g} s")
    if "died" in message:
        return RewardResult(
            score=0.0, status="verifier_error", detail=f"verifier died: {message['died']}"[:400]
        )
    match message.get("result"):
        case [int() | float() as score, str() as status, str() as detail] if (
            math.isfinite(score) and status in _STATUSES
        ):
            return RewardResult(score=float(score), status=typing.cast(RewardStatus, status), detail=detail)
    return RewardResult(score=0.0, status="verifier_error", detail="the verifier's message holds no result")


def _no_isolation() -> str:
    isolation = find_isolation()
    left = (
        "under resource limits and a seccomp filter"
        if isolation.filter_bytes
        else "under resource limits alone"
    )
    return (
        f"no isolation for verifiers here ({isolation.missing}): they run {left}, and scorers that evaluate answers "
        "are refused"
    )

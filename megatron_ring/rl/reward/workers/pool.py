"""Verifiers beside the trainer: scores arrive while generation goes on, and no response can stop a run.

Each worker has a thread here that hands it one response at a time and waits. A verifier that takes longer than its
time is killed and replaced; one that dies is replaced. Either is the value of that response alone. The clock of a
response starts when its verifier is called: imports do not count. Where a verifier lives, see :mod:`walls`.
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
    Place,
    needs_walls,
    parse_reward_functions,
    place_of,
)
from megatron_ring.rl.reward.sandbox.cgroup import sweep
from megatron_ring.rl.reward.workers.judging import Task
from megatron_ring.rl.reward.workers.verifier import DiedError, Verifier
from megatron_ring.rl.reward.workers.walls import raise_walls
from megatron_ring.rl.reward.workers.worker import START_SECONDS
from megatron_ring.rl.types import RewardResult, RewardStatus

log = logging.getLogger("megatron_ring")

_DYING_SECONDS = 0.5
"""A process whose socket has closed is about to end by itself, with an exit code that says more than a kill."""
_SILENCE_SECONDS = 10.0
"""Longest silence of a worker that has a task and nothing to load, or whose task's time is over: it is stopped."""
MAX_DEATHS_AT_START = 3
_STATUSES = frozenset(typing.get_args(RewardStatus))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    task: Task
    place: Place
    future: Future[RewardResult]


class RewardPool:
    """Judges responses in worker processes. Open it with ``RewardPool.open``; submit from any thread.

    Example: ``with RewardPool.open(config.reward, domains={"math"}) as pool: pool.submit(prompt, text).result()``.
    """

    def __init__(self, config: RewardConfig, domains: Collection[str]):
        self._config = config
        self._domains = tuple(sorted(domains))
        self._own = parse_reward_functions(config.reward_functions)
        self._known = {*BUILT_IN, *self._own}
        for domain in self._domains:
            self._check_domain(domain)
        places: list[Place] = [place_of(domain, self._own) for domain in self._domains]
        # what is given by path is imported whatever the problems are, so that a mistake shows at the start
        self._places = sorted({*places, *(["outside"] if config.reward_functions else [])}) or ["inside"]
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: set[Verifier] = set()
        self._deaths_at_start = 0
        self._broken: RewardError | None = None
        self._closed = False
        self._first_loaded: dict[Place, Future[None]] = {place: Future() for place in self._places}
        self.num_replaced = 0
        """Processes that were replaced because they hung or died over a response."""

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: RewardConfig, domains: Collection[str] = (), *, speaks: bool = True
    ) -> Iterator[RewardPool]:
        """Start ``config.reward_workers`` workers and kill them at the end; what is unjudged then is cancelled.

        Returns when one worker has imported every reward function; with "code" in ``domains`` it has tried the
        sandbox too. What else ``domains`` need is loaded in the background. Raises RewardError in one line for a
        domain without a function, a path that leads nowhere, a sandbox that does not isolate, workers that cannot
        start. Says if there are no walls here, where it ``speaks``: one process of a job does.
        """
        if config.reward_workers < 1:
            raise RewardError(f"reward_workers={config.reward_workers} must be at least 1; try 2")
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            # every process that is started inherits it, and bwrap then waits for its child for ever
            raise RewardError(
                "SIGCHLD is ignored in this process, so nobody hears of reward workers' ends; set it to SIG_DFL first "
                "(in a shell: trap - CHLD)"
            )
        pool = cls(config, domains)
        if speaks and "inside" in pool._places and raise_walls().missing:
            log.warning("%s", _without_walls())
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
        """The verdict on ``text``, in time. The future raises RewardError only if nobody can judge the domain."""
        self._check_domain(prompt.domain)
        place = place_of(prompt.domain, self._own)
        alone = place == "inside" and needs_walls(prompt)
        if alone and raise_walls().missing:
            raise RewardError(
                f"{prompt.reference.get('dataset')} evaluates answers, which is done inside walls only, and there are "
                f"none here: {raise_walls().missing}; take other problems or make the walls possible"
            )
        seconds = self._config.reward_timeout
        task = Task(prompt=prompt, text=text, seconds=seconds, alone=alone)
        future: Future[RewardResult] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            if self._broken is not None:
                raise self._broken
            self._jobs.put(_Job(task=task, place=place, future=future))
        return future

    def _check_domain(self, domain: str) -> None:
        if domain not in self._known:
            raise RewardError(
                f"domain={domain} has no reward function, only {', '.join(sorted(self._known))} have; add "
                f"--reward-functions {domain}=module:function"
            )

    def _serve(self) -> None:
        """One worker's thread: keep a process of each place alive, and give them one response after another."""
        verifiers: dict[Place, Verifier] = {}
        for place in self._places:
            verifier = self._start(place)
            if verifier is not None:
                verifiers[place] = verifier
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            while not job.future.done():
                verifier = verifiers.pop(job.place, None) or self._start(job.place)
                if verifier is None:
                    job.future.set_exception(self._broken or CancelledError())
                elif self._judge(verifier, job):
                    verifiers[job.place] = verifier
        for verifier in verifiers.values():
            self._end(verifier, 0.0)

    def _judge(self, verifier: Verifier, job: _Job) -> bool:
        """Settle the job's future, or leave it unsettled for another worker; False if this worker is gone."""
        seconds = None
        try:
            seconds = self._hand_over(verifier, job)
            if seconds is None:
                return True
            self._deaths_at_start = 0
            words = verifier.receive(seconds + _SILENCE_SECONDS)
            if words is not None:
                verifier.is_ready = bool(words.get("ready"))
                self._settle(job, words, seconds)
                return True
        except DiedError:
            how = self._end(verifier, _DYING_SECONDS)
            if self._closed:
                job.future.set_exception(CancelledError())
            elif seconds is not None:
                self._settle(job, {"died": how}, seconds)
            else:
                self._count_death(how)
            return False
        except TimeoutError:  # it is stopped, and has not seen the job
            self._end(verifier, 0.0)
            return False
        self._end(verifier, 0.0)
        self._settle(job, {"timeout": True}, seconds or 0.0)
        return False

    def _hand_over(self, verifier: Verifier, job: _Job) -> float | None:
        """The seconds that a job which has started may take; None if it is settled already.

        Raises TimeoutError if the worker says nothing.
        """
        if not verifier.is_ready:
            self._next(verifier, START_SECONDS)
        verifier.is_ready = False
        verifier.send(job.task)
        words = self._next(verifier, _SILENCE_SECONDS)
        while "loading" in words:
            words = self._next(verifier, START_SECONDS)
        if "started" in words:
            return float(words["started"])
        verifier.is_ready = bool(words.get("ready"))
        if "refused" in words:
            job.future.set_exception(RewardError(str(words["refused"])))
        else:
            self._settle(job, words, job.task.seconds)
        return None

    @staticmethod
    def _next(verifier: Verifier, seconds: float) -> dict[str, Any]:
        words = verifier.receive(seconds)
        if words is None:
            raise TimeoutError
        return words

    def _settle(self, job: _Job, words: Mapping[str, Any], seconds: float) -> None:
        result = _result(words, seconds)
        if "result" not in words:
            with self._lock:
                self.num_replaced += 1
        job.future.set_result(result)

    def _start(self, place: Place) -> Verifier | None:
        """A worker that has its reward functions; None if the pool is closed or cannot keep one alive."""
        while True:
            with self._lock:
                if self._closed or self._broken is not None:
                    return None
                try:
                    domains = [d for d in self._domains if place_of(d, self._own) == place]
                    worker = Verifier(self._config, domains, place)
                except OSError as error:
                    line = f"a reward worker cannot be started: {error}; lower reward_workers or free memory"
                    return self._break(RewardError(line))
                self._workers.add(worker)
            try:
                refused = worker.wait_until_loaded(START_SECONDS)
            except DiedError:
                self._count_death(self._end(worker, _DYING_SECONDS))
                continue
            with self._lock:
                if refused is None:
                    loaded = self._first_loaded.get(place)
                    if loaded is not None and not loaded.done():
                        loaded.set_result(None)
                    return worker
            self._end(worker, _DYING_SECONDS)
            with self._lock:
                return self._break(RewardError(refused))

    def _end(self, worker: Verifier, wait: float) -> str:
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
                        f"({how}); run python -m megatron_ring.rl.reward.workers.worker by hand, or free memory"
                    )
                )

    def _break(self, error: RewardError) -> None:
        """With the lock held: give up, and tell everyone who waits."""
        if self._broken is None and not self._closed:
            self._broken = error
            for loaded in self._first_loaded.values():
                if not loaded.done():
                    loaded.set_exception(error)
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
        # a worker that is killed cannot do it
        sweep()


def _result(words: Mapping[str, Any], seconds: float) -> RewardResult:
    """A worker's verdict; what comes from inside the walls may have any form."""
    if "timeout" in words:
        return RewardResult(score=0.0, status="timeout", detail=f"verifier killed after {seconds:g} s")
    if "died" in words:
        return RewardResult(
            score=0.0, status="verifier_error", detail=f"verifier died: {words['died']}"[:400]
        )
    match words.get("result"):
        case [int() | float() as score, str() as status, str() as detail] if (
            math.isfinite(score) and status in _STATUSES
        ):
            return RewardResult(score=float(score), status=typing.cast(RewardStatus, status), detail=detail)
    return RewardResult(score=0.0, status="verifier_error", detail="the verifier's words are no verdict")


def _without_walls() -> str:
    walls = raise_walls()
    left = (
        "under resource limits and a seccomp filter" if walls.filter_bytes else "under resource limits alone"
    )
    return (
        f"no walls around verifiers here ({walls.missing}): they run {left}, and code and scorers that evaluate "
        "answers are refused"
    )

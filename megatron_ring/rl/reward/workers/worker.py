"""A verifier's program: it keeps a process that judges, and replaces it when it hangs, dies or has done its share.

    python -m megatron_ring.rl.reward.workers.worker FD PARENT_PID

It is a program of its own rather than a multiprocessing child, so that it never imports the entry script, torch or
what else the trainer holds. Over the socket FD come pickled words of the trainer, first the settings, then one
:class:`Task` after another. JSON goes back: loaded (or refused, with an error's line), ready, and for every task
started, then result, timeout, died or refused, with whether it is ready for the next at once; else ready comes once it is.
Before started there is loading, where a task's library has to be loaded first.

The keeper never reads what a model wrote. Inside the walls it loads the libraries once and the process that judges is
a fork of it, so a new one costs milliseconds. Outside, where users' functions live, that process loads them itself,
since what they start may not survive a fork. When it ends, all that it has started ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from megatron_ring.config.rl import RewardConfig
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.registry import Judge, load_judges
from megatron_ring.rl.reward.workers.confine import confine
from megatron_ring.rl.reward.workers.judging import GoneError, Judging, Task, judge_until_told
from megatron_ring.rl.reward.workers.processes import adopt_orphans, die_with_parent, kill_below

START_SECONDS = 120.0
"""Longest load of what a domain needs."""
ANSWER_SECONDS = 4.0
"""Longest silence of a process that has a task and nothing to load: then it is stopped, or gone."""
_LOG_BYTES = 1 << 20


class _Keeper:
    def __init__(self, trainer: Connection):
        config, domains, place, filter_bytes = pickle.loads(trainer.recv_bytes())
        self._trainer = trainer
        self._config: RewardConfig = config
        self._domains: tuple[str, ...] = domains
        self._inside: bool = place == "inside"
        self._filter: bytes = filter_bytes
        self._judges: dict[str, Judge] = {}
        self._loaded: set[str] = set()
        self._judging: Judging | None = None

    def keep(self) -> None:
        """Answer until the trainer closes its end."""
        try:
            if self._inside:
                self._judges = load_judges(self._config, "inside")
            else:
                self._prepare()
        except RewardError as error:
            self._say(refused=str(error))
            return
        self._say(loaded=True)
        with contextlib.suppress(RewardError):  # what needs it says so again
            for domain in self._domains:
                self._load(domain)
            self._prepare()
        self._say(ready=True)
        while True:
            task = pickle.loads(self._trainer.recv_bytes())
            _shorten_log()
            try:
                words = self._do(task)
            except RewardError as error:
                words = {"refused": str(error)}
            self._say(**words, ready=self._judging is not None)
            if self._judging is None:
                with contextlib.suppress(RewardError):
                    self._prepare()
                self._say(ready=True)

    def _do(self, task: Task) -> dict[str, Any]:
        domain = task.prompt.domain
        if self._inside and domain not in self._loaded:
            self._say(loading=True)
            self._load(domain)
        judging, words = self._hand_over(task)
        if words is None or "refused" in words:
            return words or {"died": "it does not start to judge"}
        # inside, a process that has read a model's text has no say in its own time
        seconds = task.seconds if self._inside else float(words["started"])
        self._say(started=seconds)
        try:
            words = judging.receive(seconds)
        except GoneError:
            self._forget(judging)
            return {"died": judging.end()}
        judging.num_judged += 1
        if words is None or task.alone or judging.num_judged == self._config.reward_worker_judgements:
            self._forget(judging)
            judging.end()
        return words or {"timeout": True}

    def _hand_over(self, task: Task) -> tuple[Judging, dict[str, Any] | None]:
        """Who takes the task, and its first word. One that dies or is stopped before it starts is replaced once."""
        for attempt in range(2):
            judging = self._fork() if task.alone else self._prepare()
            try:
                judging.send(task)
                words = judging.receive(ANSWER_SECONDS)
                if words is not None and "loading" in words:
                    self._say(loading=True)
                    words = judging.receive(START_SECONDS)
            except GoneError:
                words = None
            if words is None:
                self._forget(judging)
                judging.end()
            elif "refused" in words and task.alone:
                judging.end()
            if words is not None or attempt:
                return judging, words
        raise AssertionError

    def _forget(self, judging: Judging) -> None:
        if judging is self._judging:
            self._judging = None

    def _fork(self) -> Judging:
        """A process that judges, ready."""
        judging = Judging(self._trainer, self._become_judge)
        try:
            words = judging.receive(START_SECONDS)
        except GoneError:
            # the trainer hears of it as this process's own end
            print(judging.end(), file=sys.stderr)
            sys.exit(1)
        if words is None or "refused" in words:
            judging.end()
            raise RewardError((words or {"refused": "reward functions take too long to load"})["refused"])
        return judging

    def _prepare(self) -> Judging:
        """The process that judges, ready; a new one if there is none or it has died idle."""
        if self._judging is not None and not self._judging.is_alive():
            self._judging.end()
            self._judging = None
        if self._judging is None:
            self._judging = self._fork()
        return self._judging

    def _become_judge(self, keeper: Connection) -> None:
        """The rest of the life of a process that judges."""
        judges = self._judges
        if self._inside:
            confine(self._filter)
        else:
            try:
                judges = load_judges(self._config, "outside")
                for domain in self._domains:
                    judges[domain].load()
            except RewardError as error:
                keeper.send_bytes(json.dumps({"refused": str(error)}).encode())
                return
        keeper.send_bytes(b'{"loaded": true}')
        judge_until_told(keeper, judges, self._loaded if self._inside else self._domains)

    def _load(self, domain: str) -> None:
        if self._inside and domain not in self._loaded:
            self._judges[domain].load()
            self._loaded.add(domain)
            if self._judging is not None:  # it was forked without
                self._judging.end()
                self._judging = None

    def _say(self, **words: object) -> None:
        self._trainer.send_bytes(json.dumps(words).encode())


def _shorten_log() -> None:
    """What a verifier prints stays readable after it dies, but never fills a disk."""
    if os.fstat(2).st_size > _LOG_BYTES:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)


def _stop(*_: object) -> None:
    raise EOFError


def main() -> None:
    fd, parent_pid = map(int, sys.argv[1:])
    adopt_orphans()
    signal.signal(signal.SIGTERM, _stop)
    if parent_pid:  # behind bwrap it ends with the walls
        die_with_parent(parent_pid, signal.SIGTERM)
    try:
        with contextlib.suppress(EOFError, ConnectionError):
            _Keeper(Connection(fd)).keep()
    finally:
        kill_below(os.getpid())


if __name__ == "__main__":
    main()

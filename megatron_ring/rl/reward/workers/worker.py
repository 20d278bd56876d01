"""A worker's program: a supervisor that forks a verifier process, and replaces it when it hangs, dies or is used up.

    python -m megatron_ring.rl.reward.workers.worker FD PARENT_PID

A separate program rather than a multiprocessing child, so that it never imports the entry script, torch or
anything else of the trainer. Protocol on the socket FD: the trainer sends pickles, first the settings, then one
:class:`Task` after another. The worker sends JSON: ``loaded`` (or ``refused`` with an error line), then
``ready``. For each task it sends ``loading`` if a library has to be loaded first, ``started`` with the time
limit, and last ``result``, ``timeout``, ``died`` or ``refused``. That message also tells whether it is
``ready`` for the next task; if not, ``ready`` follows.

The supervisor never reads a model's text. An isolated one loads the libraries once, so that forking a new verifier
process costs milliseconds. In a trusted one, which has users' functions, the verifier process loads them itself, since
threads and connections that they open may not survive a fork. When a verifier process ends, everything that it
started ends too.
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
from megatron_ring.rl.reward.registry import Verifier, load_verifiers
from megatron_ring.rl.reward.workers.confine import confine
from megatron_ring.rl.reward.workers.processes import adopt_orphans, die_with_parent, kill_below
from megatron_ring.rl.reward.workers.verifier_process import GoneError, Task, VerifierProcess, serve_tasks

START_SECONDS = 120.0
"""Time limit for loading what a domain needs."""
ANSWER_SECONDS = 4.0
"""After this long without a message a verifier process that has a task and nothing to load counts as stopped."""
_LOG_BYTES = 1 << 20


class _Supervisor:
    def __init__(self, trainer: Connection):
        config, domains, kind, filter_bytes = pickle.loads(trainer.recv_bytes())
        self._trainer = trainer
        self._config: RewardConfig = config
        self._domains: tuple[str, ...] = domains
        self._isolated: bool = kind == "isolated"
        self._filter: bytes = filter_bytes
        self._verifiers: dict[str, Verifier] = {}
        self._loaded: set[str] = set()
        self._process: VerifierProcess | None = None

    def serve(self) -> None:
        """Serve tasks until the trainer closes its end."""
        try:
            if self._isolated:
                self._verifiers = load_verifiers(self._config, "isolated")
            else:
                self._prepare()
        except RewardError as error:
            self._send(refused=str(error))
            return
        self._send(loaded=True)
        with contextlib.suppress(RewardError):  # a task of that domain raises it again
            for domain in self._domains:
                self._load(domain)
            self._prepare()
        self._send(ready=True)
        while True:
            task = pickle.loads(self._trainer.recv_bytes())
            _truncate_log()
            try:
                message = self._run(task)
            except RewardError as error:
                message = {"refused": str(error)}
            self._send(**message, ready=self._process is not None)
            if self._process is None:
                with contextlib.suppress(RewardError):
                    self._prepare()
                self._send(ready=True)

    def _run(self, task: Task) -> dict[str, Any]:
        domain = task.prompt.domain
        if self._isolated and domain not in self._loaded:
            self._send(loading=True)
            self._load(domain)
        process, message = self._hand_over(task)
        if message is None or "refused" in message:
            return message or {"died": "it does not start to verify"}
        # an isolated process has read a model's text: the time limit it states does not count
        timeout = task.timeout if self._isolated else float(message["started"])
        self._send(started=timeout)
        try:
            message = process.receive(timeout)
        except GoneError:
            self._forget(process)
            return {"died": process.end()}
        process.num_verified += 1
        if message is None or task.alone or process.num_verified == self._config.reward_worker_judgements:
            self._forget(process)
            process.end()
        return message or {"timeout": True}

    def _hand_over(self, task: Task) -> tuple[VerifierProcess, dict[str, Any] | None]:
        """The process that takes the task, and its first message. One that fails before it starts is replaced once."""
        for attempt in range(2):
            process = self._fork() if task.alone else self._prepare()
            try:
                process.send(task)
                message = process.receive(ANSWER_SECONDS)
                if message is not None and "loading" in message:
                    self._send(loading=True)
                    message = process.receive(START_SECONDS)
            except GoneError:
                message = None
            if message is None:
                self._forget(process)
                process.end()
            elif "refused" in message and task.alone:
                process.end()
            if message is not None or attempt:
                return process, message
        raise AssertionError

    def _forget(self, process: VerifierProcess) -> None:
        if process is self._process:
            self._process = None

    def _fork(self) -> VerifierProcess:
        """A new verifier process, ready for a task."""
        process = VerifierProcess(self._trainer, self._become_verifier)
        try:
            message = process.receive(START_SECONDS)
        except GoneError:
            # the trainer sees this process end, and reads the reason in its log
            print(process.end(), file=sys.stderr)
            sys.exit(1)
        if message is None or "refused" in message:
            process.end()
            raise RewardError((message or {"refused": "reward functions take too long to load"})["refused"])
        return process

    def _prepare(self) -> VerifierProcess:
        """The verifier process, ready for a task; a new one if there is none or it died while idle."""
        if self._process is not None and not self._process.is_alive():
            self._process.end()
            self._process = None
        if self._process is None:
            self._process = self._fork()
        return self._process

    def _become_verifier(self, supervisor: Connection) -> None:
        """What a verifier process runs after the fork."""
        verifiers = self._verifiers
        if self._isolated:
            confine(self._filter)
        else:
            try:
                verifiers = load_verifiers(self._config, "trusted")
                for domain in self._domains:
                    verifiers[domain].load()
            except RewardError as error:
                supervisor.send_bytes(json.dumps({"refused": str(error)}).encode())
                return
        supervisor.send_bytes(b'{"loaded": true}')
        serve_tasks(supervisor, verifiers, self._loaded if self._isolated else self._domains)

    def _load(self, domain: str) -> None:
        if self._isolated and domain not in self._loaded:
            self._verifiers[domain].load()
            self._loaded.add(domain)
            if self._process is not None:  # it was forked without the library
                self._process.end()
                self._process = None

    def _send(self, **message: object) -> None:
        self._trainer.send_bytes(json.dumps(message).encode())


def _truncate_log() -> None:
    """Keep what verifiers print readable after they die, and bounded."""
    if os.fstat(2).st_size > _LOG_BYTES:
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)


def _stop(*_: object) -> None:
    raise EOFError


def main() -> None:
    fd, parent_pid = map(int, sys.argv[1:])
    adopt_orphans()
    signal.signal(signal.SIGTERM, _stop)
    if parent_pid:  # 0 behind bwrap, which ends it
        die_with_parent(parent_pid, signal.SIGTERM)
    try:
        with contextlib.suppress(EOFError, ConnectionError):
            _Supervisor(Connection(fd)).serve()
    finally:
        kill_below(os.getpid())


if __name__ == "__main__":
    main()

"""A verifier process: judges one response after another in its main thread, and may be killed at any time.

    python -m megatron_ring.rl.reward.worker FD PARENT_PID

It is a program of its own rather than a multiprocessing child, so that it never imports the entry script, torch or
what else the trainer holds. Over the socket FD come pickled words of the trainer, first the settings, then one
(prompt, text) after another; JSON goes back: loaded, started, then result, or refused with an error's line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection

from megatron_ring.data.prompts import Prompt
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.registry import Judge, load_judges, result_problem
from megatron_ring.rl.types import RewardResult

_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 1 << 20


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the kernel was told
        os._exit(1)


def judge(judges: dict[str, Judge], prompt: Prompt, text: str) -> RewardResult:
    """The verdict of the prompt's domain; whatever its function raises is a value."""
    try:
        result = judges[prompt.domain].function(prompt, text)
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return RewardResult(score=0.0, status="verifier_error", detail=detail)
    problem = result_problem(result)
    if problem is not None:
        return RewardResult(score=0.0, status="verifier_error", detail=problem)
    return result


def serve(trainer: Connection) -> None:
    """Answer until the trainer closes its end."""

    def say(**words: object) -> None:
        trainer.send_bytes(json.dumps(words).encode())

    try:
        config, domains = pickle.loads(trainer.recv_bytes())
        judges = load_judges(config)
        if "code" in domains:
            judges["code"].load()
    except RewardError as error:
        say(refused=str(error))
        return
    say(loaded=True)
    for domain in domains:
        judges[domain].load()
    while True:
        prompt, text = pickle.loads(trainer.recv_bytes())
        # what a verifier prints stays readable after it dies, but never fills a disk
        if os.fstat(2).st_size > _LOG_BYTES:
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
        try:
            judges[prompt.domain].load()
        except RewardError as error:
            say(refused=str(error))
            continue
        say(started=True)
        result = judge(judges, prompt, text)
        say(result=[float(result.score), result.status, str(result.detail)])


def main() -> None:
    fd, parent_pid = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(fd))


if __name__ == "__main__":
    main()

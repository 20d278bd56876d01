"""Tokenise in worker processes, with results in the order of the input."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import TypeVar

from megatron_ring.data.text.tokenizer import Tokenizer, TokenizerType, load_tokenizer
from megatron_ring.errors import DataError

_AHEAD_PER_WORKER = 4

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def map_in_processes(
    function: Callable[[_Task], _Result], tasks: Iterable[_Task], workers: int
) -> Iterator[_Result]:
    """``function`` of each task, in order; with 0 workers, in this process. At most 4 tasks per worker are in memory.

    ``function`` is pickled with every task, so it should be small (see :func:`open_tokenizer`).

    Raises:
        DataError: a worker was killed.
    """
    if workers < 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending: deque[Future[_Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) >= _AHEAD_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} tokenizer processes died, perhaps for lack of memory; use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=2)
def open_tokenizer(tokenizer_type: TokenizerType, tokenizer_model: str) -> Tokenizer:
    """The tokenizer, loaded once per process. Raises DataError as :func:`load_tokenizer`."""
    return load_tokenizer(tokenizer_type, tokenizer_model)

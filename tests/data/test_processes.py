import itertools
import os

import pytest

from megatron_ring.data.processes import map_in_processes
from megatron_ring.errors import DataError


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int):
    assert list(map_in_processes(abs, range(-30, 0), workers)) == list(range(30, 0, -1))


def test_an_endless_input_is_not_read_ahead_of_the_workers():
    read = itertools.count()
    results = map_in_processes(abs, read, 1)
    assert [next(results), next(results)] == [0, 1]
    assert next(read) == 5, "four tasks for the worker, and one after the first result"
    results.close()


def test_a_killed_worker_is_one_line():
    with pytest.raises(DataError, match=r"one of 1 tokenizer processes died, .* use fewer workers"):
        list(map_in_processes(os._exit, [1], 1))

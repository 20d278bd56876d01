"""A world that hangs ends, says where each process was, and leaves none."""

import psutil
import pytest

from tests.helpers.parallel.spawning import spawn
from tests.helpers.parallel.watching import HUNG, assert_ended_well


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_a_world_that_hangs_says_where():
    result = spawn(2, "tests.helpers.parallel.hanging_worker", standstill=20)
    assert result.returncode == HUNG
    with pytest.raises(AssertionError) as caught:
        assert_ended_well(result)
    before, first, second = str(caught.value).partition("rank ")[2].split("rank ")[-3:]
    ranks = {text[0]: text for text in (before, first, second)}
    assert "in barrier" in ranks["0"] and "in wait_for_nobody" not in ranks["0"]
    assert "in wait_for_nobody" in ranks["1"] and "in barrier" not in ranks["1"]
    assert "torch/distributed/run.py" in ranks["n"], "the launcher's own stacks"
    pids = [int(line) for line in result.stdout.split()]
    assert len(pids) == 2 and all(map(has_ended, pids))

"""A world that hangs ends, says where each process was, and leaves none."""

import re

import psutil
import pytest

from tests.helpers.e2e.runs import ROOT, environment, launcher
from tests.helpers.parallel.watching import HUNG, assert_ended_well, run_preloaded, run_to_the_end


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "preloaded"])
def test_a_world_that_hangs_says_where(how):
    words, common = ["-m", "tests.helpers.parallel.hanging_worker"], {"cwd": ROOT, "env": environment()}
    if how == "torchrun":
        result = run_to_the_end([*launcher(2), *words], standstill=20, **common)
    else:
        result = run_preloaded(words, 2, standstill=20, **common)
    assert result.returncode == HUNG
    with pytest.raises(AssertionError) as caught:
        assert_ended_well(result)
    said = re.split(r"\nrank (\w+), process ", str(caught.value))
    ranks = dict(zip(said[1::2], said[2::2], strict=True))
    assert "in barrier" in ranks["0"] and "in wait_for_nobody" not in ranks["0"]
    assert "in wait_for_nobody" in ranks["1"] and "in barrier" not in ranks["1"]
    launches = {"torchrun": "torch/distributed/run.py", "preloaded": "in _wait_for"}
    assert launches[how] in ranks["none"], "the launcher's own stacks"
    pids = [int(line) for line in result.stdout.split()]
    assert len(pids) == 2 and all(map(has_ended, pids))

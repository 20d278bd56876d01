"""The sandbox where the machine can have one, and a module of reward functions that workers import."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.sandbox.sandbox import Sandbox
from tests.helpers.reward.judging import PLUGIN, stood_before

_PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(autouse=True, scope="module")
def adopting() -> Iterator[None]:
    """What these tests start stays below this process though its parents die, and is told from other runs' by that."""
    stood_before.clear()
    stood_before.update(psutil.Process().children(recursive=True))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    try:
        return Sandbox.open()
    except RewardError as error:
        # a sandbox that starts and does not isolate is a failure, not a machine without one
        if "is not installed" in str(error) or "did not start" in str(error):
            pytest.skip(f"no sandbox on this machine: {error}")
        raise


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module of reward functions, good and bad, that workers can import."""
    name = "ring_test_rewards"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    import sys

    sys.modules.pop(name, None)

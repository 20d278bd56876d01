"""An exception in a user's own code is one line that says where; one of ours keeps its traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_ring.errors import ConfigError, DataError, RolloutError
from megatron_ring.rl.own_code import own_code


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ring_faulty.py").write_text("def mine(text):\n\n    return 1 + int(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import ring_faulty

    yield ring_faulty
    sys.modules.pop("ring_faulty")


def test_an_exception_is_one_line_with_its_place(own):
    with pytest.raises(ConfigError) as caught, own_code("objective", "ring_faulty:mine"):
        own.mine("a\nb")
    assert str(caught.value) == (
        "objective=ring_faulty:mine raised ValueError: invalid literal for int() with base 10: 'a\\nb' "
        "(ring_faulty.py, line 3); correct it (--log-level debug shows the traceback)"
    )
    # a user's server that cannot be reached is no lost rank
    match = "ConnectionError: nobody there; correct"
    with (
        pytest.raises(RolloutError, match=match),
        own_code("rollout_engine", "ring_faulty:mine", RolloutError),
    ):
        raise ConnectionError("nobody there")


def test_an_exit_is_no_end_of_the_run(own):
    for given, said in (((), ""), ((0,), ": 0"), (("stop",), ": stop")):
        line = f"^objective=ring_faulty:mine raised SystemExit{said}; correct it"
        with pytest.raises(ConfigError, match=line), own_code("objective", "ring_faulty:mine"):
            raise SystemExit(*given)


def test_an_error_of_ours_passes(own):
    with pytest.raises(ValueError, match="invalid literal"), own_code("objective", "c3po"):
        own.mine("a")
    with pytest.raises(DataError, match="is missing"), own_code("objective", "ring_faulty:mine"):
        raise DataError("is missing")
    gone = "Connection closed by peer [127.0.0.1]:4000"
    with pytest.raises(RuntimeError, match="closed by peer"), own_code("objective", "ring_faulty:mine"):
        raise RuntimeError(gone)

"""What a setting names as ``module:name`` is found, or is one line."""

import sys
from pathlib import Path

import pytest

from megatron_ring.config.check import check_inputs, validate
from megatron_ring.config.importable import resolve
from megatron_ring.config.load import load_config
from megatron_ring.config.settings import is_importable, settings
from megatron_ring.errors import ConfigError


def number(found: object) -> str | None:
    return None if isinstance(found, int) else f"is {type(found).__name__}, not a number; name a number"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "ring_own.py").write_text("right = 7\nwrong = 'seven'\ngrpo = 8\n")
    (tmp_path / "ring_broken.py").write_text("import torch_of_another_age\n")
    (tmp_path / "ring_script.py").write_text("import sys\nx = 1\nsys.exit()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ring_own", raising=False)
    return "ring_own"


def test_a_registered_name_and_a_path_give_their_object(module: str):
    assert resolve("objective", "c3po", {"c3po": 1}, number) == 1
    assert resolve("objective", f"{module}:right", {"c3po": 1}, number) == 7
    # a built-in name behind a module is the module's own
    assert resolve("objective", f"{module}:grpo", {"grpo": 1}, number) == 8
    # a name that is not built in is what the module has registered
    assert resolve("objective", f"{module}:mine", {"mine": 9}, number) == 9
    assert resolve("objective", f"{module}:wrong", {"wrong": 9}, number) == 9


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("mine", "objective=mine does not exist; try one of c3po, or module:name of your own"),
        ("gone:mine", "objective=gone:mine: no module gone; install it or set PYTHONPATH"),
        (
            "ring_own.deep:x",
            "objective=ring_own.deep:x: no module ring_own.deep; install it or set PYTHONPATH",
        ),
        (
            "ring_own:gone",
            "objective=ring_own:gone: module ring_own neither has nor registers gone; correct the name",
        ),
        (
            "ring_own:c3po",
            "objective=ring_own:c3po: module ring_own neither has nor registers c3po; correct the name",
        ),
        ("ring_own:wrong", "objective=ring_own:wrong is str, not a number; name a number"),
        (
            "ring_broken:x",
            "objective=ring_broken:x cannot be imported (ModuleNotFoundError: No module named 'torch_of_another_age'); "
            "import ring_broken by hand to see why",
        ),
        (
            "ring_script:x",
            "objective=ring_script:x cannot be imported (SystemExit); import ring_script by hand to see why",
        ),
    ],
)
def test_what_leads_nowhere_is_one_line(module: str, value: str, line: str):
    with pytest.raises(ConfigError) as caught:
        resolve("objective", value, {"c3po": 1}, number)
    assert str(caught.value) == line


def test_the_form_is_checked_with_the_config_and_the_module_found_before_a_process_starts(
    module: str, tmp_path: Path
):
    flags = f"--prompt-data {tmp_path} --tokenizer-model {tmp_path} --max-position-embeddings 32768"
    for own in ("--objective", "--advantage-estimator"):
        good = load_config([*flags.split(), own, f"{module}:right"])
        validate(good, 1, "rl")
        check_inputs(good, "rl")
        assert module not in sys.modules, "it is imported on the ranks: it may need torch"
        with pytest.raises(ConfigError, match="no module gone; install it or set PYTHONPATH"):
            check_inputs(load_config([*flags.split(), own, "gone:right"]), "rl")
    with pytest.raises(ConfigError, match=r"reward_functions=poem=gone:rhymes: no module gone; install it"):
        check_inputs(load_config([*flags.split(), "--reward-functions", "poem=gone:rhymes"]), "rl")
    with pytest.raises(
        ConfigError, match=r"--objective mine: the value must be one of c3po, .*, or module:name of"
    ):
        load_config(["--objective", "mine"])


def test_the_form_of_a_path():
    assert is_importable("a:b") and is_importable("a.b_c:d")
    assert not any(map(is_importable, ("a", "a:", ":b", "a:b.c", "a b:c", "a..b:c", "a:b:c", 3, None)))
    own = {"objective", "advantage_estimator", "rollout_engine"}
    assert {s.name for s in settings().values() if s.importable} == own

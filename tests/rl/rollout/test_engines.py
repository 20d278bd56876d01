"""A rollout engine is opened by its name, and a setting that needs more than it guarantees is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_ring.config.load import config_from_mapping
from megatron_ring.errors import ConfigError, RingError
from megatron_ring.rl.rollout import engines
from megatron_ring.rl.rollout.engines import open_rollout_engine, require_guarantees
from megatron_ring.rl.rollout.protocol import Guarantees
from megatron_ring.rl.rollout.relay import Relay
from tests.helpers.rl.collecting import ScriptedEngine


class Shut(ScriptedEngine):
    @classmethod
    def open(cls, trainer, config):
        raise ConnectionError("nobody at port 1")


class Vague(Shut):
    guarantees = None  # pyright: ignore[reportAssignmentType]


class Older(Shut):
    def generate(self, requests, sampling):  # pyright: ignore[reportIncompatibleMethodOverride]
        yield from ()


ALL = {"exact_seeds": True, "logprobs": True, "routes": True, "token_budget": True}


@pytest.mark.parametrize(
    ("missing", "settings"),
    [
        ("routes", {"routing_replay": "R3"}),
        ("logprobs", {"old_logprobs": "rollout"}),
        ("logprobs", {"mismatch_correction": "icepop"}),
        ("token_budget", {"rollout_token_budget": 100}),
    ],
)
def test_what_an_engine_does_not_guarantee_is_refused(missing, settings):
    config = config_from_mapping(settings)
    require_guarantees(Guarantees(**ALL), config)
    require_guarantees(Guarantees(**ALL | {missing: False}), config_from_mapping({}))
    (name, value) = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"^{name}={value} needs .* rollout_engine=inprocess does not give"):
        require_guarantees(Guarantees(**ALL | {missing: False}), config)


def test_an_engine_that_one_rank_speaks_to_is_relayed(monkeypatch):
    class Server(ScriptedEngine):
        @classmethod
        def open(cls, trainer, config):
            assert config.rollout_slots == 7
            return cls(slots=config.rollout_slots)

    monkeypatch.setitem(engines.ENGINES, "inprocess", Server)
    trainer = SimpleNamespace(session=SimpleNamespace(is_log_rank=False))
    engine = open_rollout_engine(config_from_mapping({"rollout_slots": 7}), trainer)
    assert isinstance(engine, Relay) and engine.guarantees is Server.guarantees
    engine.publish(3)
    assert engine.version == engine.engine.version == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "does not exist; try one of inprocess, or module:name of your own"),
        ("tests.helpers.rl.collecting:Gone", "neither has nor registers Gone"),
        (
            "tests.helpers.rl.collecting:Stream",
            "lacks open, guarantees, on_every_rank, publish, generate, close; name a",
        ),
        (f"{__name__}:Vague", "has guarantees=None, not Guarantees; name a"),
        (f"{__name__}:Older", "has a generate that does not take .*: too many positional .*; name a"),
        (f"{__name__}:Shut", r"raised ConnectionError: nobody at port 1 \(test_engines.py, line "),
    ],
)
def test_an_engine_of_ones_own_is_checked(name, said):
    config = config_from_mapping({})
    config = replace(config, rollout=replace(config.rollout, rollout_engine=name))
    with pytest.raises(RingError, match=f"^rollout_engine={name}.*{said}"):
        session = SimpleNamespace(is_log_rank=False)
        open_rollout_engine(config, SimpleNamespace(session=session))

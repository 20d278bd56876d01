"""Rollout engines by name: ``--rollout-engine inprocess``, or ``module:name`` of your own class."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from megatron_ring.config.importable import resolve
from megatron_ring.config.rl import ObjectiveConfig
from megatron_ring.config.run import RunConfig
from megatron_ring.config.settings import is_importable
from megatron_ring.errors import ConfigError, RolloutError
from megatron_ring.rl.own_code import own_code
from megatron_ring.rl.rollout.checked import Checked
from megatron_ring.rl.rollout.inprocess import InProcessEngine
from megatron_ring.rl.rollout.protocol import Guarantees, RolloutEngine
from megatron_ring.rl.rollout.relay import Relay
from megatron_ring.train.engine import Engine

log = logging.getLogger("megatron_ring")

ENGINES: dict[str, Any] = {"inprocess": InProcessEngine}
"""Engine classes by name."""

METHODS = ("publish", "generate", "close")


def open_rollout_engine(config: RunConfig, trainer: Engine) -> RolloutEngine:
    """The engine that ``rollout_engine`` names, for a run that trains ``trainer``. Collective over the world.

    Raises:
        ConfigError: there is no such engine, or a setting needs what it does not guarantee.
    """
    name, session = config.rollout.rollout_engine, trainer.session
    kind = resolve("rollout_engine", name, ENGINES, _problem)
    require_guarantees(kind.guarantees, config)
    if not kind.guarantees.exact_seeds and session.is_log_rank:
        log.info("rollout_engine=%s: a resumed run samples other responses, its seeds are not exact", name)
    with own_code("rollout_engine", name, RolloutError):
        engine = kind.open(trainer, config.rollout)
    if is_importable(name):
        engine = Checked(engine, session, name=name, model=config.model)
    return engine if kind.on_every_rank else Relay(engine, session)


def require_guarantees(given: Guarantees, config: RunConfig) -> None:
    """Raise ConfigError where a setting needs what the engine of ``config`` does not guarantee."""
    objective, rollout = config.objective, config.rollout
    needs = [
        (given.routes, objective.routing_replay == "R3", "routing_replay=R3", "expert ids"),
        *((given.logprobs, True, setting, "log p of its tokens") for setting in logprob_settings(objective)),
        (
            given.token_budget,
            rollout.rollout_token_budget > 0,
            f"rollout_token_budget={rollout.rollout_token_budget}",
            "a stop at a number of tokens",
        ),
    ]
    for has, wanted, setting, what in needs:
        if wanted and not has:
            raise ConfigError(
                f"{setting} needs {what}, which rollout_engine={rollout.rollout_engine} does not give; "
                "choose another engine or drop it"
            )


def logprob_settings(objective: ObjectiveConfig) -> list[str]:
    """Settings of a run that need the engine's log p. Example: ``["old_logprobs=rollout"]``."""
    asked = ["old_logprobs=rollout"] * (objective.old_logprobs == "rollout")
    correction = objective.mismatch_correction
    return asked + [f"mismatch_correction={correction}"] * (correction != "none")


def _problem(found: object) -> str | None:
    form = "name a class that implements megatron_ring.rl.rollout.protocol.RolloutEngine"
    lacking = [name for name in ("open", "guarantees", "on_every_rank", *METHODS) if not hasattr(found, name)]
    if not isinstance(found, type) or lacking:
        return f"lacks {', '.join(lacking)}; {form}" if lacking else f"is no class; {form}"
    engine: Any = found
    for name, kind in (("guarantees", Guarantees), ("on_every_rank", bool)):
        if not isinstance(getattr(engine, name), kind):
            return f"has {name}={getattr(engine, name)!r}, not {kind.__name__}; {form}"
    try:
        inspect.signature(engine.generate).bind(None, (), None, None)
    except TypeError as error:
        return f"has a generate that does not take (requests, sampling, budget): {error}; {form}"
    return None

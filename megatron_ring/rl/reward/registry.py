"""The verifier of each domain: four built-in ones, and any other reward function by import path.

A reward function takes a prompt and the text of a response and returns a RewardResult. It runs in the main thread of a
worker process, one call at a time. It may hang or die there: only its own response loses its score. An exception that
it raises gives the response the status ``verifier_error``.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ring.config.importable import load_object, require_module
from megatron_ring.config.rl import RewardConfig
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.code.verifier import CodeVerifier
from megatron_ring.rl.reward.gym import verifier as gym
from megatron_ring.rl.reward.mathematics import verifier as mathematics
from megatron_ring.rl.types import RewardResult, RewardStatus

RewardFunction = Callable[[Prompt, str], RewardResult]

BUILT_IN = ("math", "science", "code", "reasoning_gym")
_ISOLATED = frozenset({"math", "science", "reasoning_gym"})
WorkerKind = Literal["isolated", "trusted"]
"""Whether a worker's verifiers run in isolation (:mod:`~megatron_ring.rl.reward.workers.isolation`) or as this user."""
_STATUSES = frozenset(typing.get_args(RewardStatus))
_FORM = "write domain=module:function"
HOSTILE_TEXTS = (
    "",
    "no answer",
    "<think>\\boxed{1}</think>",
    "\\boxed{",
    "\\boxed{}",
    "}{" * 50,
    "\0\ud800\N{SNOWMAN}",
    "```python\n",
    "\\boxed{" + "9" * 5000 + "}",
    "x" * 100_000,
)
"""Responses for which every reward function must return a result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verifier:
    """A domain's reward function, and what loads its libraries.

    Example: ``Verifier(function=verify_math, load=mathematics.load)``.
    """

    function: RewardFunction
    load: Callable[[], None]
    """Called once per process, before the first call of ``function``."""
    timeout: Callable[[Mapping[str, Any]], float] | None = None
    """Seconds of wall clock that a call may take, given the problem's reference; None for ``reward_timeout``."""


def parse_reward_functions(words: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{domain: (module, function)} of ``RewardConfig.reward_functions``. Imports nothing but parent packages.

    Example: ``parse_reward_functions(["poem=my_rewards:rhymes"]) == {"poem": ("my_rewards", "rhymes")}``.

    Raises:
        RewardError: an entry has another form, names a domain twice, or its module cannot be found.
    """
    paths: dict[str, tuple[str, str]] = {}
    for word in words:
        domain, equals, path = word.partition("=")
        module, colon, function = path.partition(":")
        if not (equals and colon and domain.strip() and module and function.isidentifier()):
            raise RewardError(f"reward_functions={word} is not domain=module:function; {_FORM}")
        if domain in paths:
            raise RewardError(f"reward_functions={word} names domain {domain} a second time; leave one")
        require_module(f"reward_functions={word}", path, RewardError)
        paths[domain] = (module, function)
    return paths


def worker_kind(domain: str, own: Container[str]) -> WorkerKind:
    """The kind of worker in which a domain's verifier runs. ``own`` are the domains with a user's reward function.

    Libraries that parse answers run isolated. Two verifiers do not: the code verifier, which reads only what programs
    printed and runs each in a sandbox; and users' functions, which may need files, the network or a GPU.
    """
    return "isolated" if domain in _ISOLATED and domain not in own else "trusted"


def needs_isolation(prompt: Prompt) -> bool:
    """Does the built-in verifier of this problem evaluate the response, so that it may run in isolation only?"""
    return prompt.domain == "reasoning_gym" and gym.needs_isolation(str(prompt.reference.get("dataset")))


def load_verifiers(config: RewardConfig, kind: WorkerKind) -> dict[str, Verifier]:
    """The verifiers of one kind of worker. Imports users' reward functions; one of a built-in domain replaces it.

    Raises:
        RewardError: an import path cannot be imported or does not name a reward function.
    """
    if kind == "isolated":
        return {
            "math": Verifier(function=mathematics.verify_math, load=mathematics.load),
            "science": Verifier(function=mathematics.verify_science, load=mathematics.load),
            "reasoning_gym": Verifier(function=gym.verify_reasoning_gym, load=gym.load),
        }
    code = CodeVerifier(config)
    verifiers = {"code": Verifier(function=code, load=code.load, timeout=code.timeout)}
    for domain, (module, name) in parse_reward_functions(config.reward_functions).items():
        where = f"reward_functions={domain}={module}:{name}"
        function = load_object(where, f"{module}:{name}", RewardError)
        if function is None:
            raise RewardError(f"{where}: module {module} has no {name}; {_FORM}")
        try:
            check_reward_function(function)
        except RewardError as error:
            raise RewardError(f"{where}: {error}") from error
        verifiers[domain] = Verifier(function=function, load=lambda: None)
    return verifiers


def check_reward_function(
    function: Callable[..., object], prompt: Prompt | None = None, texts: Iterable[str] = HOSTILE_TEXTS
) -> None:
    """Check that ``function`` keeps the contract of a reward function.

    It must take (prompt, text). With a ``prompt`` of its domain it is also called twice on each of ``texts``: both calls
    must return the same RewardResult, with a finite score and a known status.

    Raises:
        RewardError: it does not.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    if not callable(function):
        raise RewardError(f"{function!r} is not a reward function; give a function of (prompt, text)")
    try:
        inspect.signature(function).bind(object(), "")
    except TypeError as error:
        rule = "a reward function takes (prompt, text) by position"
        raise RewardError(f"{name}: {rule}: {error}; change its parameters") from error
    if prompt is None:
        return
    for text in texts:
        try:
            first, second = function(prompt, text), function(prompt, text)
        except Exception as error:
            raise RewardError(
                f"{name} raised {type(error).__name__} on {text[:20]!r}; return a RewardResult with score 0 instead"
            ) from error
        why = result_problem(first)
        if why is not None:
            raise RewardError(f"{name} {why} on {text[:20]!r}; return RewardResult(score=..., status=...)")
        if first != second:
            raise RewardError(
                f"{name} returned two different results for {text[:20]!r}; make it depend on its arguments alone"
            )


def result_problem(result: object) -> str | None:
    """What is wrong with the return value of a reward function, or None."""
    if not isinstance(result, RewardResult):
        return f"returned {type(result).__name__}, not RewardResult"
    score: Any = result.score
    if not isinstance(score, int | float) or not math.isfinite(score):
        return f"returned score {result.score}, which is not a finite number"
    if result.status not in _STATUSES:
        return f"returned status {result.status}, which is none of {', '.join(sorted(_STATUSES))}"
    return None

"""Which function judges which domain, and where: the built-in four, and any other by import path.

A reward function takes a prompt and the text of a response and returns a RewardResult. It runs alone in a worker
process, in its main thread; it may hang or die there. An exception that it raises is that response's
``verifier_error``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import typing
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ring.config.rl import RewardConfig
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.errors import RewardError
from megatron_ring.rl.reward.code.judge import CodeJudge
from megatron_ring.rl.reward.gym import judge as gym
from megatron_ring.rl.reward.mathematics import judge as mathematics
from megatron_ring.rl.types import RewardResult, RewardStatus

RewardFunction = Callable[[Prompt, str], RewardResult]

BUILT_IN = ("math", "science", "code", "reasoning_gym")
_INSIDE = frozenset({"math", "science", "reasoning_gym"})
Place = Literal["inside", "outside"]
"""Of the walls around verifiers."""
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
"""Responses that every reward function must survive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """A domain's function, and what has to be done once in a process before its first call.

    Example: ``Judge(function=judge_math, load=mathematics.load)``.
    """

    function: RewardFunction
    load: Callable[[], None]
    seconds: Callable[[Mapping[str, Any]], float] | None = None
    """Of a reference: wall clock after which judging by it is ended; None for ``reward_timeout``."""


def parse_reward_functions(words: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{domain: (module, function)} of ``RewardConfig.reward_functions``; nothing is imported but parent packages.

    Example: ``parse_reward_functions(["poem=my_rewards:rhymes"]) == {"poem": ("my_rewards", "rhymes")}``.
    Raises RewardError for words of another form, a domain given twice, or a module that cannot be found.
    """
    paths: dict[str, tuple[str, str]] = {}
    for word in words:
        domain, equals, path = word.partition("=")
        module, colon, function = path.partition(":")
        if not (equals and colon and domain.strip() and module and function.isidentifier()):
            raise RewardError(f"reward_functions={word} is not domain=module:function; {_FORM}")
        if domain in paths:
            raise RewardError(f"reward_functions={word} names domain {domain} a second time; leave one")
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise RewardError(f"reward_functions={word}: no module {module}; install it or set PYTHONPATH")
        paths[domain] = (module, function)
    return paths


def place_of(domain: str, own: Container[str]) -> Place:
    """Where a domain's judge lives: libraries that read answers inside the walls, all else outside.

    The code judge reads nothing but what programs printed, and gives each a sandbox of its own; users' ``own``
    functions may need their files, their network or a GPU.
    """
    return "inside" if domain in _INSIDE and domain not in own else "outside"


def needs_walls(prompt: Prompt) -> bool:
    """Whether the built-in verifier of this problem evaluates what a model wrote."""
    return prompt.domain == "reasoning_gym" and gym.needs_walls(str(prompt.reference.get("dataset")))


def load_judges(config: RewardConfig, place: Place) -> dict[str, Judge]:
    """The judges of one place; what is given by path is imported, and takes the place of a built-in one.

    Raises RewardError if a path cannot be imported or does not lead to a reward function.
    """
    if place == "inside":
        return {
            "math": Judge(function=mathematics.judge_math, load=mathematics.load),
            "science": Judge(function=mathematics.judge_science, load=mathematics.load),
            "reasoning_gym": Judge(function=gym.judge_reasoning_gym, load=gym.load),
        }
    code = CodeJudge(config)
    judges = {"code": Judge(function=code, load=code.load, seconds=code.seconds)}
    for domain, (module, name) in parse_reward_functions(config.reward_functions).items():
        where = f"reward_functions={domain}={module}:{name}"
        try:
            function = getattr(importlib.import_module(module), name)
        except AttributeError as error:
            raise RewardError(f"{where}: module {module} has no {name}; {_FORM}") from error
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise RewardError(
                f"{where} cannot be imported ({why}); import {module} by hand to see why"
            ) from error
        check_reward_function(function)
        judges[domain] = Judge(function=function, load=lambda: None)
    return judges


def check_reward_function(
    function: Callable, prompt: Prompt | None = None, texts: Iterable[str] = HOSTILE_TEXTS
) -> None:
    """Raise RewardError if ``function`` breaks the contract of a reward function.

    It must take (prompt, text). With a ``prompt`` of its domain it is called too: on each of ``texts`` it must return
    a RewardResult with a finite score and a known status, the same when asked again.
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
                f"{name} judged {text[:20]!r} twice and differed; make it a function of its input"
            )


def result_problem(result: object) -> str | None:
    """What is wrong with what a reward function returned, or None."""
    if not isinstance(result, RewardResult):
        return f"returned {type(result).__name__}, not RewardResult"
    if not isinstance(result.score, int | float) or not math.isfinite(result.score):
        return f"returned score {result.score}, which is not a finite number"
    if result.status not in _STATUSES:
        return f"returned status {result.status}, which is none of {', '.join(sorted(_STATUSES))}"
    return None

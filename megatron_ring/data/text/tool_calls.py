"""Convert arguments of tool calls to the form that a chat template expects, and remove null keys added by tables.

OpenAI writes arguments as a JSON string, others as an object. Some templates accept both, some quote the string a
second time (Qwen2.5, gpt-oss) or fail on it (GLM), some print an object as Python does. Each template is tested once
with a dummy call. Tables of data sets give every row the keys of all rows, with null for missing ones; such keys are
removed from tool descriptions and from arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_ring.data.json_text import parse_json
from megatron_ring.errors import DataError

ArgumentForms = tuple[bool, bool]
"""Whether a template writes a call's arguments correctly when they are a string, and when they are an object."""
_PROBE = {"probed_name": "probed_value"}
_MAY_BE_NULL = ("default", "const", "example")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords of a schema whose keys are names."""
_VALUES = ("enum", "examples", *_MAY_BE_NULL)
"""Keywords of a schema whose values are values of the parameter, which may be null."""


def argument_forms(render: Callable[..., list[str]]) -> ArgumentForms:
    """Test the template of ``render`` with a dummy call.

    Example: ``(False, True)`` for ``{{ call.arguments | tojson }}``, which would quote a string again.
    """
    text = json.dumps(_PROBE)
    as_text = _rendered(render, text)
    as_object = _rendered(render, _PROBE)
    shows = all(word in as_object for word in (*_PROBE, *_PROBE.values()))
    return text in as_text, shows and str(_PROBE) not in as_object


def fit_arguments(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    forms: Callable[[], ArgumentForms],
) -> tuple[Mapping[str, Any], ...]:
    """``messages`` with the arguments of their calls in one of the template's ``forms``.

    Raises:
        DataError: the template needs an object, and the arguments are not one.
    """
    if not any(isinstance(message.get("tool_calls"), list) for message in messages):
        return tuple(messages)
    declared = _declared(tools or ())

    def fitted(call: Any, where: str) -> Any:
        inner = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(inner, Mapping):
            return {**call, "function": fitted(inner, where)}
        if not isinstance(call, Mapping) or "arguments" not in call:
            return call
        given = _without_fillers(call["arguments"], declared.get(str(call.get("name"))))
        return {**call, "arguments": _in_form(given, forms(), where)}

    found: list[Mapping[str, Any]] = []
    for number, message in enumerate(messages):
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message = {**message, "tool_calls": [fitted(call, f"message {number}") for call in calls]}
        found.append(message)
    return tuple(found)


def without_nulls(tool: Any, *, named: bool = False) -> Any:
    """A tool's description without null keys, except schema keywords whose value may be null (``default``).

    If keys are names (``named``), as under ``properties``, null is never kept, even under the name ``default``.
    """
    if isinstance(tool, list):
        return [without_nulls(inner) for inner in tool]
    if not isinstance(tool, dict):
        return tool
    return {
        key: value
        if key in _VALUES and not named
        else without_nulls(value, named=key in _NAMED and not named)
        for key, value in tool.items()
        if value is not None or (key in _MAY_BE_NULL and not named)
    }


def _in_form(given: Any, forms: ArgumentForms, where: str) -> Any:
    if isinstance(given, str) and forms == (False, True):
        value = (
            parse_json(given, f"{where}: arguments of a tool call", "write an object", unique=True)
            if given.strip()
            else {}
        )
        if not isinstance(value, dict):
            raise DataError(
                f"{where}: arguments={given[:60]!r} of a tool call must be an object; write {{...}}"
            )
        return value
    if isinstance(given, Mapping) and forms == (True, False):
        return json.dumps(given, ensure_ascii=False)
    return given


def _rendered(render: Callable[..., list[str]], arguments: Any) -> str:
    call = {"id": "call00000", "type": "function", "function": {"name": "probed", "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        return render(messages, [(2, False)])[0]
    except DataError:
        return ""


def _declared(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """The parameters of each tool that declares them."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        schema = inner.get("parameters") if isinstance(inner, Mapping) else None
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if isinstance(properties, Mapping):
            found[str(inner.get("name"))] = properties
    return found


def _without_fillers(arguments: Any, declared: Mapping[str, Any] | None) -> Any:
    if declared is None or not isinstance(arguments, Mapping):
        return arguments
    return {key: value for key, value in arguments.items() if value is not None or key in declared}

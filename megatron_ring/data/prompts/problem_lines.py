"""Read one line of a JSONL file as a problem: which keys are read, ignored or refused.

- Read: ``prompt`` (text) or ``messages``; ``domain``; ``solve_rate``; ``system``, ``tools`` and
  ``chat_template_kwargs`` for the chat template; and the reference, as ``answer``, ``tests`` or a whole ``reference``.
  Keys of :data:`BESIDE_TESTS`, in the line or in the reference, become part of the reference.
- Ignored: keys of :data:`NOTES`; with ``answer``, other unknown keys too.
- Refused by name: keys that look like a reference under another name (:data:`_LOOK_ALIKES`), misspelled keys, and with
  ``tests`` every unknown key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ring.data.json_text import parse_json
from megatron_ring.data.text.messages import Conversation, Message, read_conversation
from megatron_ring.errors import DataError

BESIDE_TESTS = ("mode", "function", "language", "time_limit", "memory_limit_mb", "entry_point")
"""Keys of a problem with tests that set how they are run; the verifier of code reads them."""
_FUNCTION = "fn_name"
"""Key for the tested function's name in TACO, APPS and verl."""
_WHERE_FROM = (
    "id uid uuid idx index name title url source data_source dataset split license model tags topic topics"
)
_WHAT_KIND = "subject category difficulty level rating type metadata meta extra_info info notes comment"
_WORKED_OUT = "solution solutions rationale hint hints"
NOTES = frozenset(f"{_WHERE_FROM} {_WHAT_KIND} {_WORKED_OUT}".split())
"""Keys that are not part of a problem."""
_TESTS = "input_output test test_list test_cases testcases unit_tests public_tests private_tests generated_tests checker"
_HIDDEN_TESTS = "public_test_cases private_test_cases reward_model label labels target gold gold_answer"
_ANSWERS = "ground_truth groundtruth final_answer expected_answer reference_answer reference_solution answers"
_LOOK_ALIKES = frozenset(f"{_TESTS} {_HIDDEN_TESTS} {_ANSWERS}".split())
_READ = ("prompt", "messages", "domain", "solve_rate", "answer", "tests", "reference")
_OF_TEMPLATE = ("system", "tools", "chat_template_kwargs")
_NOT_TEXT = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A problem as it is in its source.

    Example: ``Problem(domain="math", text="1 + 1 = ?", messages=({"role": "user", "content": "1 + 1 = ?"},),
    reference={"answer": "2"})``.
    """

    domain: str
    text: str
    """The last message of the user."""
    messages: tuple[Message, ...]
    reference: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    """The chat template's input besides the messages: tools and chat_template_kwargs, if any."""
    origin: str = field(default="", compare=False)
    """File and line; empty for a generated problem."""

    @property
    def turns(self) -> tuple[str, ...]:
        """The user's messages."""
        return tuple(str(m["content"]) for m in self.messages if str(m["role"]).lower() == "user")

    def conversation(self, suffix: str = "") -> Conversation:
        """The chat template's input, with ``suffix`` on a new line after the problem."""
        messages = with_suffix(self.messages, suffix) if suffix else self.messages
        return Conversation(
            messages=tuple(messages),
            tools=self.notes.get("tools"),
            template_kwargs=self.notes.get("chat_template_kwargs", {}),
        )

    def to_json(self) -> dict[str, Any]:
        """The JSONL line from which :func:`read_problem` reads this problem."""
        problem = {"messages": list(self.messages), "domain": self.domain, "reference": dict(self.reference)}
        return {**problem, **self.notes}


def read_problem(fields: Mapping[str, Any], origin: str) -> Problem:
    """The problem of a line's object.

    Raises:
        DataError: there is no prompt, no domain or no reference, or a key matters and is not supported.
    """
    messages = fields.get("messages") or fields.get("prompt")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    domain = fields.get("domain")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(
            f"{origin}: no prompt (text) and no messages (with role and content); add one of them"
        )
    if str(messages[-1]["role"]).lower() != "user":
        raise DataError(f"{origin}: the last message has role {messages[-1]['role']}, it must have role user")
    if not isinstance(domain, str) or not domain:
        raise DataError(f"{origin}: domain={domain!r} must name a reward function, such as math or code")
    template_fields = {key: fields[key] for key in _OF_TEMPLATE if key in fields}
    conversation = read_conversation(template_fields, origin, messages)
    if not str(conversation.messages[-1]["content"]).strip():
        raise DataError(f"{origin}: the problem is empty; write it, or remove the line")
    _must_ask_the_same(fields, messages, conversation, origin)
    reference = _reference(fields, origin)
    _refuse_unread(fields, "tests" in reference, origin)
    return Problem(
        domain=domain,
        text=conversation.messages[-1]["content"],
        messages=conversation.messages,
        reference=reference,
        notes=conversation.notes(),
        origin=origin,
    )


def with_suffix(messages: Sequence[Message], suffix: str) -> list[Message]:
    """``messages`` with a line added to the last one. Example: "1+1?" and "Be brief." give "1+1?\\nBe brief."."""
    last = {**messages[-1], "content": f"{messages[-1]['content']}\n{suffix}"}
    return [*messages[:-1], last]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _must_ask_the_same(
    fields: Mapping[str, Any], messages: Sequence[Message], conversation: Conversation, origin: str
) -> None:
    """Refuse a prompt that is not part of the line's messages: one of the two would be ignored."""
    prompt = fields.get("prompt")
    if not prompt or not fields.get("messages") or prompt == messages:
        return
    # messages often add instructions to the prompt, and may have their text in parts
    asked = [" ".join(str(message["content"]).split()) for message in conversation.messages]
    if isinstance(prompt, str):
        same = any(f" {' '.join(prompt.split())} " in f" {text} " for text in asked)
    else:
        are_messages = isinstance(prompt, list) and all(map(_is_message, prompt))
        same = (
            are_messages
            and [
                " ".join(str(message["content"]).split())
                for message in read_conversation({}, origin, prompt).messages
            ]
            == asked
        )
    if not same:
        raise DataError(f"{origin}: prompt and messages ask different things; keep one")


def _must_name_one(names: Mapping[str, Any], origin: str) -> None:
    given = {key: name for key, name in names.items() if name}
    if len(set(map(str, given.values()))) > 1:
        shown = ", ".join(f"{key} {name!r:.40}" for key, name in given.items())
        raise DataError(f"{origin}: the tested function has two names ({shown}); keep one")


def _reference(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    whole = fields.get("reference")
    reference = dict(whole) if isinstance(whole, dict) else {}
    if whole is not None and not isinstance(whole, dict):
        reference["answer"] = whole
    for key in ("answer", "tests", *BESIDE_TESTS):
        given, other = fields.get(key), reference.get(key)
        if given is not None and other is not None and given != other and str(given) != str(other):
            raise DataError(f"{origin}: {key} is {given!r:.60} and in the reference {other!r:.60}; keep one")
    reference |= {key: fields[key] for key in ("answer", "tests") if fields.get(key) is not None}
    if not reference:
        raise DataError(
            f"{origin}: there is no answer, tests or reference to verify a response with; add one"
        )
    if "tests" in reference:
        reference |= {key: fields[key] for key in BESIDE_TESTS if fields.get(key) is not None}
        names = {_FUNCTION: fields.get(_FUNCTION), "function": reference.get("function")}
        _must_name_one(names, origin)
        reference |= _as_list(
            reference["tests"], origin, fields.get(_FUNCTION) or reference.get("function") or ""
        )
        if "func_name" in str(fields.get("metadata")):
            # LiveCodeBench names the tested function there
            reference.setdefault("metadata", fields["metadata"])
        if fields.get(_FUNCTION):
            reference = {"mode": "function", "function": fields[_FUNCTION], **reference}
    return reference


def _as_list(tests: Any, origin: str, given_name: str) -> dict[str, Any]:
    """``tests`` as a list, with mode and function if they name one. They may be columns, and may be a JSON string."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = parse_json(tests, f"{origin}: tests", "write a list of tests")
    if not isinstance(tests, dict) or "inputs" not in tests:
        return {"tests": tests}
    inputs, outputs, name = tests["inputs"], tests.get("outputs"), tests.get("fn_name")
    others = [key for key in tests if key not in ("inputs", "outputs", "fn_name")]
    if others:
        raise DataError(
            f"{origin}: tests have a key {others[0]}, which is not supported together with inputs; drop it"
        )
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise DataError(
            f"{origin}: tests must have as many outputs as inputs, as two lists; add what is missing"
        )
    _must_name_one({"in the line": given_name, "in the tests": name}, origin)
    name = name or given_name
    pairs = paired_columns(inputs, outputs, is_function=bool(name))
    return {"tests": pairs, **({"mode": "function", "function": name} if name else {})}


def paired_columns(
    inputs: Sequence[Any], outputs: Sequence[Any], *, is_function: bool
) -> list[dict[str, Any]]:
    """One test for each input and its output, in the meaning of APPS and TACO.

    For standard input, a list of strings is the lines of one input. If every output of a function is a list with one
    value, the value itself is accepted too: about half of such rows wrap the value in a list, and the other half test
    functions that return a list with one value.

    Example: ``paired_columns([[1, 2]], [[3]], is_function=True) == [{"input": [1, 2], "output": [3], "or": 3}]``.
    """
    pairs = list(zip(inputs, outputs, strict=True))
    if not is_function:
        return [{"input": _joined(given), "output": _joined(wanted)} for given, wanted in pairs]
    also = bool(pairs) and all(isinstance(wanted, list) and len(wanted) == 1 for wanted in outputs)
    return [
        {"input": given, "output": wanted, **({"or": wanted[0]} if also else {})} for given, wanted in pairs
    ]


def _joined(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value


def _refuse_unread(fields: Mapping[str, Any], with_tests: bool, origin: str) -> None:
    known = {*_READ, *_OF_TEMPLATE, *BESIDE_TESTS, _FUNCTION}
    unread: list[str] = []
    meant: list[str] = []
    for key, value in fields.items():
        if key in known or value is None or value in ("", [], {}):
            continue
        if key in _NOT_TEXT:
            raise DataError(f"{origin}: {key} is not read, only text is supported; leave the line out")
        if key in NOTES:
            continue
        close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.85)
        # solve_rate_8b is a deliberate other key, solve_rates a misspelling
        close = [word for word in close if len(key) <= len(word) + 1]
        if key in _LOOK_ALIKES or close or with_tests:
            unread.append(key)
            meant += close
    if unread:
        # name all of them at once: a public data set can have ten
        are = "is" if len(unread) == 1 else "are"
        hint = f"did you mean {', '.join(meant)}? if not, " if meant else ""
        raise DataError(
            f"{origin}: {', '.join(unread)} {are} not read; {hint}put the reference under answer, tests or reference, and "
            "everything else under metadata"
        )

"""Read one line of a chat file or a problem as a conversation: which keys are read, ignored or refused.

Keys of a message that are read:

- ``role`` and ``content``;
- ``reasoning_content`` (or ``reasoning``, ``thinking``) of an answer, which comes before its content;
- ``weight`` (or ``loss``, ``train``, ``trainable``, ``loss_mask``) of an answer: with 0 or false it is context
  without loss;
- keys that the chat template reads, such as ``tool_calls`` or ``name``. A tool's result may have ``name`` and
  ``tool_call_id`` even if the template does not read them.

Keys of a line that are read: ``messages``, ``tools``, ``system`` and ``chat_template_kwargs``. The keys in
:data:`NOTES` and keys with empty values are ignored. Every other key of a message is refused by name, and so are the
keys of a line in :data:`_NOT_READ`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ring.data.json_text import parse_json
from megatron_ring.data.text.tool_calls import without_nulls
from megatron_ring.errors import DataError

Message = Mapping[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss", "train", "trainable", "loss_mask")
_NAMES = (
    "id uuid message_id parent_id index turn turn_id turn_identifier source hash content_hash annotations"
)
_FIGURES = "timestamp created created_at date model language lang finish_reason tokens num_tokens token_count"
NOTES = frozenset(f"{_NAMES} {_FIGURES}".split())
"""Keys of a message that do not affect the text."""

_NOT_READ = {
    "functions": "write them under tools",
    "function_call": "write them under tools",
    "enable_thinking": "write it under chat_template_kwargs",
    "thinking": "write it into the answer's message",
    "reasoning_content": "write it into the answer's message",
    "reasoning": "write a text into the answer's message, a switch (on, off) under chat_template_kwargs or system",
    "weight": "write it into the answer's message",
    "loss": "write it into the answer's message",
    "train": "write it into the answer's message",
    "trainable": "write it into the answer's message",
    "loss_mask": "write it into the answer's message",
    "label": "drop it, and the lines that must not be imitated",
    "chosen": "write the answer to imitate into messages, and drop it",
    "rejected": "write the answer to imitate into messages, and drop it",
    "images": "only text can be learned; leave the line out",
    "videos": "only text can be learned; leave the line out",
    "audios": "only text can be learned; leave the line out",
    "documents": "write them into the messages",
    "conversations": "keep either messages or conversations",
    "system_prompt": "write it under system",
    "system_message": "write it under system",
    "reasoning_effort": "write it under chat_template_kwargs",
    "kto_tag": "drop it, and the lines that must not be imitated",
}
"""Keys of a line that are not supported, and the remedy for each."""

_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("thinking", "reasoning")
_OURS = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """The input of a chat template.

    Example: ``Conversation(messages=({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}))``.
    """

    messages: tuple[Message, ...]
    """Content is text; so is reasoning, under the first name of :data:`REASONING`."""
    unlearned: frozenset[int] = frozenset()
    """Indices of the answers with weight 0."""
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Other variables of the template, such as ``{"enable_thinking": False}``."""

    def notes(self) -> dict[str, Any]:
        """The keys of a line besides its messages."""
        found: dict[str, Any] = {"tools": self.tools} if self.tools else {}
        return found | ({"chat_template_kwargs": dict(self.template_kwargs)} if self.template_kwargs else {})


def read_conversation(fields: Mapping[str, Any], origin: str, messages: Any = None) -> Conversation:
    """The conversation of a line's object; ``messages``, if given, replaces its messages.

    Raises:
        DataError: no list of messages with role and content, or a key that matters and is not supported.
    """
    messages = fields.get("messages") if messages is None else messages
    if not isinstance(messages, list) or not messages:
        raise _no_messages(fields, origin)
    for key, remedy in _NOT_READ.items():
        if not _empty(fields.get(key)):
            raise DataError(f"{origin}: {key}={_shown(fields[key])} is not read; {remedy}")
    system = fields.get("system")
    if not _empty(system):
        if not isinstance(system, str) or any(_role(message) == "system" for message in messages):
            raise DataError(
                f"{origin}: system must be text, without a message of role system; keep one of the two"
            )
        messages = [{"role": "system", "content": system}, *messages]
    read: list[Message] = []
    unlearned: set[int] = set()
    for number, message in enumerate(messages):
        where = f"{origin}: message {number}"
        read.append(_message(message, where))
        if not _learned(message, where) and _role(message) == "assistant":
            unlearned.add(number)
    return Conversation(
        messages=tuple(read),
        unlearned=frozenset(unlearned),
        tools=_tools(fields.get("tools"), origin),
        template_kwargs=_template_kwargs(fields.get("chat_template_kwargs"), origin),
    )


def parse_template_kwargs(text: str) -> dict[str, Any]:
    """The setting chat_template_kwargs: a JSON object. Raises DataError for anything else."""
    return _template_kwargs(text.strip(), "the setting")


def _no_messages(fields: Mapping[str, Any], origin: str) -> DataError:
    line = f'{origin} has no list under "messages"; write {{"messages": [...]}} per line'
    if isinstance(fields.get("conversations"), list):
        line += ", of conversations (ShareGPT) each from as role (human is user, gpt is assistant) and value as content"
    elif fields:
        line += f" (found keys: {', '.join(fields)[:80]})"
    return DataError(line)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} must have a role and a content, both text")
    answers = _role(message) == "assistant"
    content, reasoning = _content(message.get("content"), where, answers)
    given = [(key, message[key]) for key in REASONING if not _empty(message.get(key))]
    if reasoning:
        given.append(("a part of the content", reasoning))
    if given and not answers:
        raise DataError(
            f"{where}: {given[0][0]} belongs to an answer, the role is {message['role']}; drop it"
        )
    if len({str(value) for _, value in given}) > 1:
        raise DataError(f"{where} has {' and '.join(key for key, _ in given)}, which differ; keep one")
    if given and not isinstance(given[0][1], str):
        raise DataError(f"{where}: {given[0][0]}={_shown(given[0][1])} must be text")
    if content is None:
        if not (answers and (given or not _empty(message.get("tool_calls")))):
            raise DataError(f"{where} must have a role and a content, both text")
        content = ""
    skipped = {"role", "content", *REASONING, *WEIGHTS, *NOTES}
    others = {key: value for key, value in message.items() if key not in skipped and not _empty(value)}
    own = {REASONING[0]: given[0][1]} if given else {}
    return {"role": message["role"], "content": content, **own, **others}


def _content(content: Any, where: str, answers: bool) -> tuple[str | None, str]:
    """The text of a content, and the reasoning in its parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise DataError(f"{where} must have a role and a content, both text")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        thinks = answers and kind in _THINKING_PARTS
        value = part.get(kind if thinks else "text") if isinstance(part, dict) else part
        if not isinstance(value, str) or not (thinks or kind in _TEXT_PARTS):
            raise DataError(
                f"{where}: a part of the content is of type {kind}; only text can be read, as "
                '{"type": "text", "text": "..."}'
            )
        (thoughts if thinks else texts).append(value)
    return "".join(texts), "".join(thoughts)


def _learned(message: Mapping[str, Any], where: str) -> bool:
    given = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1) or isinstance(value, str):
            raise DataError(f"{where}: {key}={_shown(value)} must be 0 or 1; other weights are not supported")
        if value and _role(message) != "assistant":
            raise DataError(
                f"{where}: {key}={_shown(value)}, but only answers carry loss; drop it or set it to 0"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise DataError(f"{where} has {' and '.join(given)}, which differ; keep one")
    return all(given.values())


def _tools(tools: Any, origin: str) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        # tables of data sets store it as a JSON string, since a column has one type
        tools = parse_json(tools, f"{origin}: tools")
    if _empty(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{origin}: tools must be a list of objects, one per function")
    return without_nulls(tools)


def _template_kwargs(values: Any, origin: str) -> dict[str, Any]:
    if isinstance(values, str) and values.strip():
        values = parse_json(values, f"{origin}: chat_template_kwargs", "write an object")
    if _empty(values):
        return {}
    if not isinstance(values, dict):
        raise DataError(
            f"{origin}: chat_template_kwargs={_shown(values)} must be a JSON object, such as "
            '{"enable_thinking": false}'
        )
    for name in values:
        if name in _OURS or not name.isidentifier():
            raise DataError(f"{origin}: chat_template_kwargs must not set {name}; drop it")
    return values


def _role(message: Any) -> str:
    return str(message.get("role")).lower() if isinstance(message, dict) else ""


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict | Sequence) and not value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

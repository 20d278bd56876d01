"""Conversations as text, and as token ids with a mask of what the model is to learn.

A message is a mapping with ``role`` (system, user, assistant) and ``content``. Reasoning stays in the
content, between ``<think>`` and ``</think>``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ring.errors import DataError

if TYPE_CHECKING:
    from megatron_ring.data.tokenizer import Tokenizer

Message = Mapping[str, Any]

CHAT_SYMBOLS = (
    "<role>SYSTEM</role>",
    "<role>HUMAN</role>",
    "<role>ASSISTANT</role>",
    "<role>",
    "</role>",
    "<think>",
    "</think>",
)
"""Symbols that our tokenizers hold as single tokens; the longest that fits is taken."""

BAILING_TEMPLATE = """\
{%- for message in messages -%}
{%- set role = message['role'] | lower -%}
{%- if role not in ('system', 'user', 'assistant') -%}
{{- raise_exception('role ' ~ message['role'] ~ ' is unknown; use system, user or assistant') -}}
{%- endif -%}
{%- if message['content'] is not string -%}
{{- raise_exception('content of a message must be a string') -}}
{%- endif -%}
{{- '<role>' ~ ('HUMAN' if role == 'user' else role | upper) ~ '</role>' ~ message['content'] -}}
{%- if role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}
"""
"""Ling's and Ring's turns, ``<role>HUMAN</role>...<role>ASSISTANT</role>...``, each answer ended."""


def render_template(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """A conversation as text. The template runs in jinja2's immutable sandbox, as it may come from anywhere.

    Args:
        template: jinja2 source, with the names that Hugging Face gives a template.
        messages: the conversation.
        add_generation_prompt: end with what precedes an answer.
        special_tokens: e.g. ``{"eos_token": "<|endoftext|>"}``.

    Raises:
        DataError: the template is broken, reaches for what the sandbox forbids, or refuses the messages.
    """
    try:
        return _compile(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, **special_tokens
        )
    except (TemplateError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"chat template failed: {_one_line(error)}; "
            "check the messages' role and content, and the template"
        ) from error


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, and for each whether it is the assistant's: what fine-tuning learns.

    Each answer counts from behind its generation prompt to its end of sequence, which is added where the
    template has none: the model has to learn to stop. Prompt and answer are encoded apart, so that a prompt
    has the same ids here and when an answer is sampled from it (:func:`render_prompt`).

    Example, with one token per word: ``user: "hi"``, ``assistant: "yes"`` gives
    ids of ``<role> HUMAN </role> hi <role> ASSISTANT </role> yes <eos>`` and mask ``0 0 0 0 0 0 0 1 1``.

    Raises:
        DataError: the template rewrites earlier turns as a conversation grows, so that what the assistant
            said cannot be told apart; or a message spells out the end-of-sequence token.
    """
    ids, mask, done = _answered_turns(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    tail = _encode(tokenizer, _suffix(whole, done))
    return ids + tail, mask + [False] * len(tail)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation and the generation prompt: what an answer is sampled from.

    They are the first ids of :func:`render_chat` for the conversation with the answer.

    Raises:
        DataError: as :func:`render_chat`.
    """
    ids, _, done = _answered_turns(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return ids + _encode(tokenizer, _suffix(whole, done))


def _answered_turns(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool], str]:
    """Ids and mask up to the last answer's end of sequence, and the text they stand for."""
    _refuse_spelled_eos(tokenizer, messages)
    ids: list[int] = []
    mask: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if str(message.get("role")).lower() != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], add_generation_prompt=False)
        prompt_ids = _encode(tokenizer, _suffix(before, done))
        answer, _, rest = _suffix(after, before).partition(tokenizer.eos_token)
        answer_ids = [*tokenizer.encode(answer), tokenizer.eos_id]
        ids += prompt_ids + answer_ids
        mask += [False] * len(prompt_ids) + [True] * len(answer_ids)
        # what a template puts behind the end of sequence (Qwen's newline) opens the next turn
        done = after[: len(after) - len(rest)]
    return ids, mask, done


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a template's text, in which the end of sequence is one id whatever the tokenizer."""
    first, *others = text.split(tokenizer.eos_token)
    ids = tokenizer.encode(first)
    for part in others:
        ids += [tokenizer.eos_id, *tokenizer.encode(part)]
    return ids


def _suffix(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise DataError(
            "chat template rewrites earlier turns when a conversation grows, so answers cannot be masked; "
            "use a template that only appends, or single-turn conversations"
        )
    return text[len(prefix) :]


def _refuse_spelled_eos(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if tokenizer.eos_token in str(message.get("content")):
            raise DataError(
                f"message {index} spells out the end-of-sequence token {tokenizer.eos_token}, which would "
                "end the conversation early; remove it from the content"
            )


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}``, with which some templates mark answers: its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(template: str):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationBlock]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""A tokenizer's chat template: which variables it reads, and rendering."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from megatron_ring.data.text.chat_template import Text, render_texts
from megatron_ring.data.text.messages import Message
from megatron_ring.data.text.template_process import TemplateProcess, failed
from megatron_ring.data.text.tool_calls import argument_forms
from megatron_ring.errors import DataError

CHAT_SYMBOLS = (
    "<role>SYSTEM</role>",
    "<role>HUMAN</role>",
    "<role>ASSISTANT</role>",
    "<role>",
    "</role>",
    "<think>",
    "</think>",
)
"""Symbols that are single tokens in our tokenizers; the longest match is taken."""

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
"""The format of Ling and Ring, ``<role>HUMAN</role>...<role>ASSISTANT</role>...``, an end of sequence after answers."""


class ChatTemplate:
    """Example: ``ChatTemplate("{{ messages[0].content }}", {}).render(messages, [(1, True)])``.

    A template from a tokenizer's files is rendered in a process with limits, our own (``trusted``) in this process.
    """

    def __init__(
        self, source: str | None, special_tokens: Mapping[str, str], *, trusted: bool = False, where: str = ""
    ):
        """
        Args:
            source: jinja2 text; None if there is no template, which is an error only when one is needed.
            special_tokens: e.g. ``{"eos_token": "<|endoftext|>"}``.
            trusted: the template is part of this package.
            where: the tokenizer's file, for messages.
        """
        self._source, self._special_tokens, self._where = source, dict(special_tokens), where
        self._process = None if trusted else TemplateProcess()
        self._names: dict[str, Any] = {}
        self.reads = lru_cache(maxsize=None)(self._reads)
        self.mentions = lru_cache(maxsize=None)(self._mentions)

    @property
    def source(self) -> str:
        """The template's text. Raises DataError if there is no template."""
        if self._source is None:
            raise DataError(
                f"no chat template in the folder of {self._where}; put chat_template.jinja or a tokenizer_config.json "
                "with chat_template there"
            )
        return self._source

    @cached_property
    def argument_forms(self) -> tuple[bool, bool]:
        """See :data:`megatron_ring.data.text.tool_calls.ArgumentForms`."""
        return argument_forms(self.render)

    def use(self, names: Mapping[str, Any]) -> None:
        """Set these variables for every conversation. Raises DataError for one that the template does not read."""
        for name in names:
            if not self.mentions(name):
                raise DataError(f"chat_template_kwargs: this chat template does not read {name}; drop it")
        self._names = dict(names)

    def render(
        self,
        messages: Sequence[Message],
        texts: Sequence[Text],
        *,
        tools: Sequence[Any] | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """The first messages as text, for each of ``texts``.

        Raises:
            DataError: the template is broken, uses what the sandbox forbids, refuses the messages, or exceeds its time or
                memory.
        """
        given = {**self._special_tokens, **self._names, **(names or {}), "tools": tools}
        if self._process is not None:
            return self._process.render(self.source, list(messages), list(texts), given)
        try:
            return render_texts(self.source, messages, texts, given)
        except Exception as error:  # jinja2 passes on whatever an expression raises
            raise failed(" ".join(str(error).split()) or type(error).__name__) from error

    def _mentions(self, name: str) -> bool:
        """Does ``name`` occur in the template as a word?"""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def _reads(self, key: str) -> bool:
        """Does the template read ``key`` of a message (not of a tool or a parameter)?"""
        owner = r"(?<!\w)(?!tool|func|param|arg)\w+"
        word = re.escape(key)
        form = rf"{owner}(?:\.{word}\b(?!\s*\()|\[\s*['\"]{word}['\"]\s*\]|\.get\(\s*['\"]{word}['\"])"
        quoted = rf"['\"]{word}['\"]\s+in\s+"
        return re.search(f"{form}|{quoted}", self.source) is not None

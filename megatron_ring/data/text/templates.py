"""A tokenizer's chat template: what it reads, and the texts that it makes."""

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


class ChatTemplate:
    """Example: ``ChatTemplate("{{ messages[0].content }}", {}).render(messages, [(1, True)])``.

    A template that came with a tokenizer is rendered in a process with limits, ours (``trusted``) in this one.
    """

    def __init__(
        self, source: str | None, special_tokens: Mapping[str, str], *, trusted: bool = False, where: str = ""
    ):
        """
        Args:
            source: jinja2; None where there is no template, which is said when one is needed.
            special_tokens: e.g. ``{"eos_token": "<|endoftext|>"}``.
            trusted: it is ours.
            where: the tokenizer's file, for messages.
        """
        self._source, self._special_tokens, self._where = source, dict(special_tokens), where
        self._process = None if trusted else TemplateProcess()
        self._names: dict[str, Any] = {}
        self.reads = lru_cache(maxsize=None)(self._reads)
        self.mentions = lru_cache(maxsize=None)(self._mentions)

    @property
    def source(self) -> str:
        """Raises DataError where there is none."""
        if self._source is None:
            raise DataError(
                f"no chat template beside {self._where}; put chat_template.jinja or a tokenizer_config.json "
                "with chat_template there"
            )
        return self._source

    @cached_property
    def argument_forms(self) -> tuple[bool, bool]:
        """Does it take a call's arguments as a text, and as an object? See :mod:`megatron_ring.data.text.tool_calls`."""
        return argument_forms(self.render)

    def use(self, names: Mapping[str, Any]) -> None:
        """Give the template these names with every conversation. Raises DataError for one that it does not read."""
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
            DataError: the template is broken, reaches for what the sandbox forbids, refuses the messages, or takes
                more time or memory than a template may.
        """
        given = {**self._special_tokens, **self._names, **(names or {}), "tools": tools}
        if self._process is not None:
            return self._process.render(self.source, list(messages), list(texts), given)
        try:
            return render_texts(self.source, messages, texts, given)
        except Exception as error:  # jinja2 lets through whatever an expression raises
            raise failed(" ".join(str(error).split()) or type(error).__name__) from error

    def _mentions(self, name: str) -> bool:
        """Is ``name`` a word of the template?"""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def _reads(self, key: str) -> bool:
        """Does it ask a message for ``key``? A tool's or a parameter's own name is not a message's."""
        owner = r"(?<!\w)(?!tool|func|param|arg)\w+"
        word = re.escape(key)
        form = rf"{owner}(?:\.{word}\b(?!\s*\()|\[\s*['\"]{word}['\"]\s*\]|\.get\(\s*['\"]{word}['\"])"
        quoted = rf"['\"]{word}['\"]\s+in\s+"
        return re.search(f"{form}|{quoted}", self.source) is not None

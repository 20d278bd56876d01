"""Render chat templates in jinja2's immutable sandbox; run as a program, render untrusted ones within limits.

It imports the standard library and jinja2 only, because :mod:`megatron_ring.data.text.template_process` starts this file
by its path. The sandbox stops a template from reaching Python objects; limits on memory and time need a process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2 << 30
"""Address space of the rendering process."""
MAX_CHARACTERS = 1 << 23
"""Longest text of a conversation, several times the longest context: tokenising more would take minutes."""
MAX_TEMPLATE = 1 << 20
"""Longest template; published ones have a few thousand characters."""

Text = tuple[int, bool]
"""One text of a conversation: how many messages it has, and whether it ends with the generation prompt."""


def render_texts(
    template: str, messages: Sequence[Mapping[str, Any]], texts: Sequence[Text], names: Mapping[str, Any]
) -> list[str]:
    """The first messages of a conversation as text, for each of ``texts``; ``names`` are the template's other variables.

    Example: ``render_texts("{{ messages[0].content }}", [{"role": "user", "content": "hi"}], [(1, True)], {})``
    is ``["hi"]``. Exceptions of jinja2 are passed on.
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"has {len(template):,} characters, more than {MAX_TEMPLATE:,}")
    compiled = _compile(template)
    found: list[str] = []
    for count, add_generation_prompt in texts:
        text = compiled.render(
            messages=list(messages[:count]), add_generation_prompt=add_generation_prompt, **names
        )
        if len(text) > MAX_CHARACTERS:
            raise TemplateError(f"made a text of {len(text):,} characters, more than {MAX_CHARACTERS:,}")
        found.append(text)
    return found


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks answers in some templates; renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(template: str):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationBlock]
    )
    environment.filters["tojson"] = lambda value, indent=None, ensure_ascii=False: json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent
    )
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def write_message(stream: IO[bytes], value: Any) -> None:
    """Write one message between this process and its parent: length, then JSON (lone surrogates are kept)."""
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def read_message(stream: IO[bytes]) -> Any:
    """The other side's next message; None when its end is closed."""
    head = stream.read(8)
    if head is None or len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    data = stream.read(size)
    return None if data is None or len(data) < size else json.loads(data)


def main() -> None:
    """Answer requests ``[template, messages, texts, names]`` with ``{"texts": [...]}`` or ``{"error": reason}``.

    The first argument is the CPU seconds that one request may take.
    """
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox, outbox = sys.stdin.buffer, sys.stdout.buffer
    while (request := read_message(inbox)) is not None:
        # no Python handler on purpose: it would run only after a long multiplication ends; the default action kills
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            answer: dict[str, Any] = {"texts": render_texts(*request)}
        except MemoryError:
            answer = {"error": f"took more than {MEMORY_BYTES >> 30} GiB of memory"}
        except RecursionError:
            answer = {"error": "is nested too deeply"}
        except Exception as error:
            answer = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        write_message(outbox, answer)


if __name__ == "__main__":
    main()

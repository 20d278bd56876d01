"""Which part of a response is the program: pure functions on text.

Fences are CommonMark's (``` or ~~~, at any depth of a list), and two that people write besides: behind text with the
language's name (``So:```python``), and the closing one behind the program's last line. One that is never closed runs
to the end of the text: a program that was cut off fails its tests by itself. Among the blocks of the answer part
(after the last ``</think>``):

1. blocks marked with the problem's language; without one, blocks that are marked with nothing;
2. of these, such as can be the solution: they define the names that are asked for, or, for a whole program, print
   (Python) or have a main (C++, Java); a Python session (``>>>``) never is. Where no block can, all count;
3. the last one: people correct themselves.

Blocks marked as something else (output, text, bash, another language) are never taken.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass

from megatron_ring.rl.reward.answers import answer_part

TAGS = {
    "python": {"python", "py", "python2", "py2", "python3", "py3", "pypy", "pypy3", "cpython"},
    "cpp": {"cpp", "c++", "cxx", "cc", "c", "cplusplus", "hpp", "h++", "g++"},
    "java": {"java", "openjdk", "jdk"},
}
"""Words behind the opening fence, in lower case and without a version, that mean a language."""

_OPENING = re.compile(
    r"^(?P<indent>[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+|>[ \t]?)*)(?P<fence>`{3,}|~{3,})(?P<info>.*)$"
)
_BEHIND_TEXT = re.compile(
    r"^(?P<indent>)(?=\s*+[^`\s])[^`]*+(?P<fence>`{3,}+)(?P<info>[ \t]*+[\w+#.-]++[ \t]*+)$"
)
_INFO = re.compile(r"[\w+#-]+")
_VERSION = re.compile(r"(?<=[a-z+])[-.]?\d+[\w.]*$")
_DEEPEST = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block: its tag in lower case, and its lines, dedented.

    Example: ``Block(tag="python", source="print(1)\\n")``.
    """

    tag: str
    source: str


def code_blocks(text: str, deepest: int = _DEEPEST) -> list[Block]:
    """The fenced blocks of ``text`` in their order; a markdown block counts as the blocks inside it, ``deepest`` deep.

    Example: ``code_blocks("1. So:\\n   ```py\\n   print(1)\\n   ```") == [Block(tag="py", source="print(1)\\n")]``.
    """
    blocks: list[Block] = []
    fence, tag, quote = "", "", ""
    indent = 0
    lines: list[str] = []

    def close() -> None:
        source = textwrap.dedent("".join(line + "\n" for line in lines))
        if tag in ("markdown", "md") and deepest:
            blocks.extend(code_blocks(source, deepest - 1))
        else:
            blocks.append(Block(tag=tag, source=source))

    for line in re.split(r"\r\n|\n|\r", text):
        if fence:
            line = line[1:] if quote and line.startswith(">") else line
            word = line.strip()
            if word and set(word) == {fence[0]} and len(word) >= len(fence):
                close()
                fence = ""
                continue
            line = line[min(indent, len(line) - len(line.lstrip(" \t"))) :]
            behind = fence[0] == "`" and re.search(rf"(?<=[^`]){fence}\s*$", line)
            lines.append(line[: behind.start()] if behind else line)
            if behind:
                close()
                fence = ""
            continue
        match = _OPENING.match(line) or _behind_text(line)
        if match is None or (match["fence"][0] == "`" and "`" in match["info"]):
            continue
        fence, quote, indent, lines = match["fence"], ">" in match["indent"], len(match["indent"]), []
        info = _INFO.search(match["info"])
        tag = info[0].lower() if info else ""
    if fence:
        # splitting leaves an empty piece behind the last line break
        lines = lines[:-1] if lines and not lines[-1] else lines
        close()
    return blocks


def _behind_text(line: str) -> re.Match[str] | None:
    match = _BEHIND_TEXT.match(line)
    return (
        match
        if match and any(_is_of(match["info"].strip().lower(), tags) for tags in TAGS.values())
        else None
    )


def _is_of(tag: str, tags: Collection[str]) -> bool:
    return tag in tags or _VERSION.sub("", tag) in tags


def solution_block(text: str, language: str, names: Collection[str] = ()) -> str | None:
    """The source of the block that is the solution by the rules above; None without one.

    Example: ``solution_block("```python\\ndef f(): ...\\n```\\n```\\n>>> f()\\n```", "python") == "def f(): ...\\n"``.
    """
    blocks = [block for block in code_blocks(answer_part(text)) if block.source.strip()]
    tags = TAGS[language]
    own = [block for block in blocks if _is_of(block.tag, tags)]
    sources = [block.source for block in own or blocks if own or not block.tag]
    if language == "python":
        sources = [source for source in sources if not source.lstrip().startswith(">>>")]
    likely = [source for source in sources if _can_be_solution(source, language, names)]
    return (likely or sources or [None])[-1]


def _can_be_solution(source: str, language: str, names: Collection[str]) -> bool:
    if language != "python":
        return re.search(r"\bmain\b", source) is not None
    if not names:
        return re.search(r"\b(print|write|writelines)\b", source) is not None
    return all(_gives(source, name) for name in names)


def _gives(source: str, name: str) -> bool:
    """Whether ``source`` defines, binds or imports ``name``, as far as its words tell."""
    name = re.escape(name)
    bound = rf"^[ \t]*+(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*[:=]"
    if re.search(bound, source, re.MULTILINE):
        return True
    # by line, and from the first import on: a pattern would look for the name anew behind each
    imports = (re.search(r"\bimport\b", line) for line in source.splitlines() if "import" in line)
    return any(word and re.search(rf"\b{name}\b", word.string[word.end() :]) for word in imports)

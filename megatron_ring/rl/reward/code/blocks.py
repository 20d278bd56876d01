"""Find the program in a response: pure functions on text.

Fences are those of CommonMark (``` or ~~~, at any depth of a list), and two more that people write: an opening fence with
the language's name after text on its line (``So:```python``), and a closing fence after the program's last line. A block
that is never closed ends with the text; a program that was cut off then fails its tests. The solution is chosen among the
blocks of the answer part (after the last ``</think>``):

1. blocks tagged with the problem's language; if there is none, blocks without a tag;
2. of these, blocks that can be the solution: they define the required names or, for a whole program, print (Python) or
   have a main (C++, Java). A Python session (``>>>``) never can. If no block can, all of them stay;
3. the last of these: people correct themselves.

Blocks with another tag (output, text, bash, another language) are never taken.
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
"""Tags of a language: the word after the opening fence, in lower case and without a version."""

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
    """The fenced blocks of ``text`` in order. A markdown block is replaced by the blocks in it, ``deepest`` levels deep.

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
        # splitting leaves an empty piece after the last line break
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
    """The source of the block that is the solution by the rules above; None if there is none.

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
    """Does ``source`` seem to define, bind or import ``name``? It is not parsed: it may not be valid Python."""
    name = re.escape(name)
    bound = rf"^[ \t]*+(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*[:=]"
    if re.search(bound, source, re.MULTILINE):
        return True
    # line by line, after the first import: one pattern would search for the name again after every import
    imports = (re.search(r"\bimport\b", line) for line in source.splitlines() if "import" in line)
    return any(word and re.search(rf"\b{name}\b", word.string[word.end() :]) for word in imports)

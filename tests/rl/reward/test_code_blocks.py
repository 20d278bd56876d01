"""The block that is the solution is found by its language and what it defines, wherever it stands."""

from __future__ import annotations

import pytest

from megatron_ring.rl.reward.code.blocks import Block, code_blocks, solution_block

GOOD = "```python\nprint(1)\n```\n"


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("```python\na\n```\nthen\n```CPP linenums\nint b;\n  ```\n", [("python", "a\n"), ("cpp", "int b;\n")]),
        ("```\nx = '```'\n```", [("", "x = '```'\n")]),
        ("````py\n```\na\n```\n````", [("py", "```\na\n```\n")]),
        ("~~~py\n```\na\n~~~", [("py", "```\na\n")]),
        ("1. So:\n\n   ```py\n   if a:\n       b\n   ```\n", [("py", "if a:\n    b\n")]),
        ("- ```py\n  a\n  ```\n", [("py", "a\n")]),
        ("    ```py\n    a\n      b\n    ```", [("py", "a\n  b\n")]),
        ("```py\n    a\n    b\n```", [("py", "a\nb\n")]),
        ("```{.python .numberLines}\na\n```", [("python", "a\n")]),
        ("```python:main.py\na\n```", [("python", "a\n")]),
        ("``` python title='x'\r\na\r\n```\r\n", [("python", "a\n")]),
        ("see ```x``` and\n```x``` too", []),
        ("```py\ncut off\n", [("py", "cut off\n")]),
        ("````markdown\n```py\na\n```\n````", [("py", "a\n")]),
        ("> ```py\n> a\n> ```\n", [("py", "a\n")]),
        ("So:```python\na\n```\nand ```C++17 \nint b;\n```", [("python", "a\n"), ("c++17", "int b;\n")]),
        ("  ```py\n  a\n    b```\nthen\n```py\nc``` \n", [("py", "a\n  b\n"), ("py", "c\n")]),
        ("open with ```python and end with ```\nor ```js\na\n", []),
    ],
)  # fmt: skip
def test_fences_are_read_as_people_write_them(text: str, blocks: list[tuple[str, str]]):
    assert code_blocks(text) == [Block(tag=tag, source=source) for tag, source in blocks]


@pytest.mark.parametrize(
    ("text", "language", "names", "source"),
    [
        (GOOD + "Output:\n```\n1\n```\n", "python", (), "print(1)\n"),
        (GOOD + "```text\n1\n```\n```bash\npython x.py\n```", "python", (), "print(1)\n"),
        (GOOD + "```py3\nprint(2)\n```", "python", (), "print(2)\n"),
        (GOOD + "```python3.11\nprint(2)\n```", "python", (), "print(2)\n"),
        (GOOD + "```cpp\nint main() {}\n```", "python", (), "print(1)\n"),
        (GOOD + "```c++17\nint main() {}\n```", "cpp", (), "int main() {}\n"),
        ("```cc\nint main() {}\n```\n```\n5\n```", "cpp", (), "int main() {}\n"),
        ("```java\nclass A { void main() {} }\n```\n```java\nint x;\n```", "java", (), "class A { void main() {} }\n"),
        ("```\nprint(1)\n```\nwhich gives\n```\n1\n```", "python", (), "print(1)\n"),
        ("```python\ndef f(): ...\n```\nUse it:\n```python\nprint(f())\n```", "python", ("f",), "def f(): ...\n"),
        ("```py\nclass S:\n  def f(): 1\n```\n```py\nS().f()\n```", "python", ("f",), "class S:\n  def f(): 1\n"),
        ("```python\ndef f(): ...\n```\n```python\n>>> f()\n1\n```", "python", (), "def f(): ...\n"),
        ("```python\ndef f(): 1\n```\nBetter:\n```python\ndef f(): 2\n```", "python", ("f",), "def f(): 2\n"),
        ("```python\nf = lambda: 1\n```\n```python\nf()\n```", "python", ("f",), "f = lambda: 1\n"),
        ("```python\nprint(1)", "python", (), "print(1)\n"),
        ("<think>\n" + GOOD + "</think> none", "python", (), None),
        ("```python\n\n```", "python", (), None),
        ("```text\nprint(1)\n```", "python", (), None),
        ("print(1)", "python", (), None),
        ("```python\nprint(1)\n```", "cpp", (), None),
    ],
)  # fmt: skip
def test_the_solution_is_the_last_block_that_can_be(
    text: str, language: str, names: tuple[str, ...], source: str | None
):
    assert solution_block(text, language, names) == source


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        "```python\n" + "import " * 20_000,
        "```python\nx = 1" + "\n" * 100_000 + "```",
        "".join("`" * length + "md\n" for length in range(600, 2, -1)),
    ],
    ids=["a long word", "imports on a line", "empty lines", "markdown in markdown"],
)
@pytest.mark.timeout(20)
def test_junk_is_read_in_one_pass(text: str):
    """Each took half a minute and more, or all of Python's stack."""
    source = solution_block(text, "python", ("f",))
    assert source is None or source.strip() == text.strip("`").removeprefix("python").strip()
    assert solution_block(text, "cpp") is None

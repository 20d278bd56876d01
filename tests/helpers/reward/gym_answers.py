"""reasoning-gym's problems, and answers to them that must not pay."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from megatron_ring.data.prompts.sources import GymSource
from megatron_ring.data.prompts.stream import Prompt
from megatron_ring.rl.reward.gym.readers import rational
from megatron_ring.rl.reward.gym.table import SCORERS
from megatron_ring.rl.reward.gym.verifier import verify_reasoning_gym
from tests.helpers.reward.judging import problem

ADMITTED = sorted(set(SCORERS) - {"acre"})
SLOW_TO_MAKE = {"futoshiki": 6, "knight_swap": 12, "puzzle24": 15, "sokoban": 15, "zebra_puzzles": 12}
"""Most problems of the generators that take longest."""
SMALL = {
    "base_conversion": "min_value=0&max_value=9",
    "basic_arithmetic": "min_terms=2&max_terms=2&min_digits=1&max_digits=1",
    "binary_matrix": "min_n=3&max_n=3",
    "calendar_arithmetic": "year=2020",
    "chain_sum": "min_terms=2&max_terms=2&min_digits=1&max_digits=1",
    "coin_flip": "min_trials=14&max_trials=18",
    "complex_arithmetic": "min_real=-2&max_real=2&min_imag=-2&max_imag=2",
    "countdown": "min_numbers=3&max_numbers=3&max_value=20&min_target=10&max_target=60",
    "decimal_arithmetic": "min_num_decimal_places=1&max_num_decimal_places=1",
    "fraction_simplification": "max_value=9&max_factor=3",
    "kakurasu": "min_rows=4&max_rows=4&min_cols=4&max_cols=4",
    "knights_knaves": "n_people=3",
    "n_queens": "n=4&min_remove=1&max_remove=2",
    "number_format": "max_delta=0.1",
    "number_sorting": "min_numbers=3&max_numbers=3&min_value=0&max_value=3",
    "polynomial_equations": "min_degree=2&max_degree=2&max_value=5",
    "power_function": "min_base=-2&max_base=2&min_exponent=1&max_exponent=3",
    "prime_factorization": "min_value=2&max_value=20",
    "puzzle24": "min_value=1&max_value=6",
    "shortest_path": "min_rows=5&max_rows=5&min_cols=5&max_cols=5",
    "string_manipulation": "min_string_length=5&max_string_length=6",
    "survo": "min_board_size=4&max_board_size=4&min_empty=3&max_empty=3",
    "tower_of_hanoi": "min_disks=3&max_disks=3&min_pegs=3&max_pegs=3",
    "word_ladder": "min_word_length=3&max_word_length=3",
}
"""Parameters that make answers few and small, where a constant wins most."""

MANY_ANSWERS = frozenset(
    {"jugs", "kakurasu", "knight_swap", "n_queens", "quantum_lock", "shortest_path", "sokoban"}
)
"""Data sets where the answer to one problem may solve another, whose own answer is a different one."""
EXPRESSIONS = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})
"""Data sets where numbers beside an answer make another right one."""
EMPTY_BOX = "\\boxed{}"
CONSTANTS = (
    *(
        "",
        "0",
        "-0",
        "1",
        "-1",
        "24",
        "0.0",
        "nan",
        "NaN",
        "-nan",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "1e-999",
    ),
    *(
        "True",
        "False",
        "true",
        "None",
        "null",
        "[]",
        "[[]]",
        "{}",
        '""',
        "''",
        "()",
        "yes",
        "no",
        "No",
        "Yes",
    ),
    *(
        "infeasible",
        "nan+nani",
        "nan+nanj",
        "infj",
        "i",
        "0/0",
        "1/0",
        "0/1",
        "\\frac{0}{0}",
        "C",
        "x",
        "0*x",
    ),
    *(
        "6*4*1*1",
        "4*3*2*1",
        "24*1",
        "4*6",
        "24 1 1 1",
        "[NaN]",
        "[NaN, NaN, NaN]",
        "A",
        "A=1",
        "A → B",
        "LRUD",
    ),
    *(
        "Integral(x, x)",
        "zoo",
        "oo",
        "E",
        "pi",
        "I",
        "_",
        "...",
        "*",
        "0x0",
        "00:00",
        "0 days",
        "00:00:00",
        " ",
    ),
    *("\uff10", "\u0661", "\u00bd", "\0", "\ufeff0", "\u200b"),
)
"""Answers that say nothing."""


def code(canary: str) -> list[str]:
    """Answers that would write ``canary`` if anything evaluated them."""
    write = f"open({canary!r}, 'w').close()"
    shell = f"__import__('os').system('touch {canary}')"
    return [
        shell,
        write,
        f"[{shell}]",
        f"exec({write!r})",
        f"eval({write!r})",
        f"[c for c in [{write}]]",
        f"().__class__.__base__.__subclasses__() or {write}",
        f"sin({shell})",
        f"x + {shell}",
        f"(lambda: {shell})()",
        f"1 if {shell} else 2",
        f'{{"a": {shell}}}',
        f"!!python/object/apply:os.system ['touch {canary}']",
        "[1 for entry['answer'] in ['1']]",
        "setattr(type(self), 'score_answer', lambda *a: 1.0)",
        f"__import__('sympy').Symbol.__eq__ = {shell}",
        f"len([{shell}, 1, 2])",
    ]


KILLERS = (
    "9**9**9**9",
    "9^{9^{9^9}}",
    "99999999!",
    "3**20**6",
    "2**30**5",
    "sin(cos(exp(exp(exp(exp(1))))))",
    "(25*3**(1/3)/4)**(1/4)",
    "(i/i+i/i)**(i/i+i/i)**(i/i+i/i)**(i/i+i/i)**(i/i+i/i)",
    "(9**64)**64",
    "((x+1)**64)**64",
    "((x+y+z+1)**60)**60 + 1",
    "*".join(["(x + 1)"] * 300),
    "+".join(["1"] * 3000),
    "1/3" * 500,
    "x**" * 400 + "x",
    "exp(" * 200 + "x" + ")" * 200,
    "exp(exp(exp(exp(x))))",
    "sin(" * 25 + "x*10**60" + ")" * 25,
    "x**x**x**x",
    "-" * 900 + "1",
    "(" * 5000 + "1" + ")" * 5000,
    "[" * 50_000,
    "[" * 20 + "]" * 20,
    "{" * 50_000 + "}" * 50_000,
    '{"a":' * 1000 + "1" + "}" * 1000,
    "9" * 5000,
    "0x" + "f" * 50_000,
    "1e999999999",
    "1e-999999999/1e999999999",
    "0." + "0" * 5000 + "1",
    "1," * 5000,
    "A=1," * 4000,
    "→".join(["C"] * 5000),
    "LR" * 9000,
    " " * 19_000 + "x",
    "a" * 19_000,
    "1" + " " * 19_000 + "x",
    "(1" + " " * 9_000 + ",2" + " " * 9_000 + "x",
    "A" + " " * 19_000 + "!",
    "$" * 19_000,
    "(" * 9_000 + "1+1j" + ")" * 9_000,
    "a is a b, " * 1_900,
    "1 days," + " " * 19_000 + "1",
    "\\frac{1}" + " " * 19_000 + "{",
    "3" + " \u00d7 1" * 4_000,
    "C → " * 4_000,
    "is " * 6000,
    "a is " * 3900,
    "\n" * 19_000 + "1",
    "a" * 1_000_000,
)
"""Answers that cost a parser its time or its memory."""


@functools.cache
def problems(dataset: str, count: int, parameters: str = "", seed: int = 3) -> list[Prompt]:
    """The first problems of a data set, as a run gets them."""
    source = GymSource.parse(
        f"reasoning_gym:{dataset}?{parameters}{'&' if parameters else ''}seed={seed}&size=1000", freezing=True
    )
    count = min(count, SLOW_TO_MAKE.get(dataset, count))
    return [problem("reasoning_gym", **source[index].reference) for index in range(count)]


def own_answer(prompt: Prompt) -> str:
    return str(prompt.reference["entry"]["answer"])


def score(prompt: Prompt, answer: str) -> float:
    return verify_reasoning_gym(prompt, f"hm</think>\n{answer or EMPTY_BOX}").score


@functools.cache
def common_answers(count: int) -> tuple[str, ...]:
    """The answers that come most often in each data set, of all of them."""
    found: Counter[str] = Counter()
    for dataset in ADMITTED:
        answers = Counter(map(own_answer, problems(dataset, count)))
        found.update(answer for answer, _ in answers.most_common(2) if len(answer) < 200)
    return tuple(sorted(found))


def is_own(answer: str, prompt: Prompt) -> bool:
    """Whether ``answer`` is the problem's own but for notation, or for the places that the question leaves open."""
    own, dataset = own_answer(prompt), prompt.reference["dataset"]
    if "".join(answer.split()).casefold() in (
        "".join(own.split()).casefold(),
        EMPTY_BOX if not own else None,
    ):
        return True
    if dataset == "puzzle24":
        return sorted(map(int, re.findall("[0-9]+", answer))) == sorted(
            prompt.reference["entry"]["metadata"]["numbers"]
        )
    numbers = rational(answer), rational(own.replace("°", "").removesuffix(" days"))
    if None in numbers:
        return dataset == "base_conversion" and (answer, own) == ("0", "")
    given, wanted = numbers
    # the places that are asked for: four, three significant digits, or those of the problem
    slack = {"polynomial_equations": Fraction(1, 10**4), "power_function": abs(wanted) / 200}
    slack["decimal_arithmetic"] = abs(wanted) / 1000
    return abs(given - wanted) <= slack.get(dataset, 0)


def around(prompt: Prompt, others: list[Prompt]) -> Iterator[str]:
    """Answers with the right one in them, none of which is it."""
    own = own_answer(prompt).strip()
    entry: Mapping[str, Any] = prompt.reference["entry"]
    yield from (entry["question"], json.dumps(entry["metadata"]), str(entry["metadata"]), str(entry))
    yield "\n".join({own_answer(other): None for other in others} | {"zebra": None})
    yield ", ".join({own_answer(other): None for other in others} | {"zebra": None})
    if not own:
        return
    yield from (
        f"{own} zebra",
        f"zebra {own}",
        f"{own}\nzebra",
        f"zebra\n{own}",
        f"{own} or zebra",
        f"not {own}",
    )
    yield from (f"{own} {own}", f"{own}\n{own}", f"{own}, {own}", f"The answer is {own}.", f"{own}; {own}")
    yield from (f"{own} # {own}", f"{own} 12345", f"{own},12345", f"{own} = {own}")
    if prompt.reference["dataset"] not in EXPRESSIONS:
        yield from (f"12345 {own}", f"{own}/1/1")
    yield from (
        f"[{own}, {own}]",
        f"{own}\n12345 12345",
        f"12345\n{own}",
        f"{own}\0",
        f"{own}\u200b",
        f"{own}!!",
    )
    wide = own.translate({ord("0") + digit: 0xFF10 + digit for digit in range(10)})
    if wide != own:
        yield wide

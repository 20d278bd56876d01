"""reasoning-gym's problems: what is read as an answer, and which references are problems at all."""

import contextlib
import json
import re

import pytest
import reasoning_gym

from megatron_ring.data.prompts.sources import UNSUITABLE
from megatron_ring.rl.reward.gym.table import SCORERS
from megatron_ring.rl.reward.gym.verifier import check_reference, needs_isolation, verify_reasoning_gym
from megatron_ring.rl.reward.registry import check_reward_function
from tests.helpers.reward.gym_answers import ADMITTED, code, problems
from tests.helpers.reward.judging import problem

QUANTUM = {
    "solution_path": ["A", "A"],
    "buttons": [
        {"name": "A", "type": "add", "value": 2, "active_state": "any"},
        {"name": "B", "type": "multiply", "value": 3, "active_state": "green"},
    ],
    "initial_value": 0,
    "initial_state": "red",
    "target_value": 4,
}
NAMES = ["chain_sum", "simple_equations", "word_sorting", "countdown", "syllogism"]


def entry_of(name: str) -> dict:
    # as a JSONL file gives it back
    return json.loads(json.dumps(reasoning_gym.create_dataset(name, size=1, seed=5)[0], default=str))


@pytest.mark.parametrize("name", NAMES)
def test_its_own_answer_is_correct_boxed_or_after_the_thought(name: str):
    entry = entry_of(name)
    prompt = problem("reasoning_gym", dataset=name, entry=entry)
    for text in (rf"<think>hm</think> \boxed{{{entry['answer']}}}", f"hm</think>\n{entry['answer']}\n"):
        assert verify_reasoning_gym(prompt, text).status == "correct"


@pytest.mark.parametrize("name", NAMES)
def test_another_answer_is_wrong(name: str):
    result = verify_reasoning_gym(
        problem("reasoning_gym", dataset=name, entry=entry_of(name)), r"\boxed{zebra}"
    )
    assert (result.score, result.status) == (0.0, "wrong")


MARKS = [r"\text{%s}", r"\mathrm{%s}", "$%s$", "**%s**", "`%s`", "%s.", r"$\text{%s}$.", "```\n%s\n```"]


@pytest.mark.parametrize(
    "name", ["chain_sum", "syllogism", "sudoku", "word_sorting", "spell_backward", "dice"]
)
@pytest.mark.parametrize("mark", MARKS)
def test_what_only_sets_an_answer_changes_no_verdict(name: str, mark: str):
    entry = entry_of(name)
    prompt = problem("reasoning_gym", dataset=name, entry=entry)
    for answer, right in ((entry["answer"], 1.0), (entry["answer"] + " zebra", 0.0)):
        assert verify_reasoning_gym(prompt, rf"\boxed{{{mark % answer}}}").score == right


def test_an_answer_that_ends_with_a_full_stop_keeps_it():
    entry = {"answer": "Ends here.", "metadata": {}}
    prompt = problem("reasoning_gym", dataset="emoji_mystery", entry=entry)
    for answer, right in (
        ("Ends here.", 1.0),
        (r"\text{Ends here.}", 1.0),
        ("Ends here", 0.0),
        ("here.", 0.0),
    ):
        assert verify_reasoning_gym(prompt, rf"\boxed{{{answer}}}").score == right


def test_whole_numbers_may_be_grouped():
    prompt = problem("reasoning_gym", dataset="lcm", entry={"answer": "1800", "metadata": {}})
    for answer, right in (("1,800", 1.0), ("1800", 1.0), ("1,80", 0.0), ("1,801", 0.0), ("18,00", 0.0)):
        assert verify_reasoning_gym(prompt, rf"\boxed{{{answer}}}").score == right


def test_part_of_the_score_is_none():
    entry = entry_of("chain_sum")
    prompt = problem("reasoning_gym", dataset="chain_sum", entry=entry)
    talk = f"it is {entry['answer']}, I think"
    assert 0 < reasoning_gym.create_dataset("chain_sum", size=1).score_answer(talk, entry) < 1
    assert verify_reasoning_gym(prompt, talk).score == 0.0


def test_no_answer_is_a_parse_error_and_an_unknown_set_an_exception():
    entry = entry_of("chain_sum")
    prompt = problem("reasoning_gym", dataset="chain_sum", entry=entry)
    assert verify_reasoning_gym(prompt, "thought</think>  ").status == "parse_error"
    assert verify_reasoning_gym(prompt, r"\boxed{}").status == "parse_error"
    with pytest.raises(ValueError, match="no_such_set"):
        verify_reasoning_gym(problem("reasoning_gym", dataset="no_such_set", entry=entry), "1")


NOTATIONS = [
    (
        "chain_sum",
        "-1250",
        {},
        ["-1250", "-1,250", "-1250.0", " -01250 "],
        ["1250", "-1250 apples", "-12,50", "nan"],
    ),
    (
        "gsm_symbolic",
        "1754",
        {},
        ["$1754", "$1754$", "1,754", "1754.00", "1754.", "1754%"],
        ["1754 cars", "17 54"],
    ),
    ("gsm_symbolic", "-3", {}, ["-3", "-$3", "$-3"], ["3", "--3", "- -3"]),
    (
        "fraction_simplification",
        "$\\frac{3}{4}$",
        {"simplified_numerator": 3, "simplified_denominator": 4},
        ["3/4", "3 / 4", "$3/4$", "\\frac{3}{4}", "\\dfrac{3}{4}", "$\\frac{ 3 }{ 4 }$"],
        ["6/8", "0.75", "3/4 or 1/2", "3/4/1", "4/3", "-3/-4"],
    ),
    (
        "complex_arithmetic",
        "-5.0 + 20.0i",
        {"result": [-5, 20]},
        ["-5+20i", "(-5 + 20i)", "-5.0 + 20.0j", "-5 + 20 i"],
        ["nan", "20i - 5 + 1", "-5", "20i", "-520i", "-5 20i", "-5 + 20", "-5 + 20i + nan"],
    ),
    ("complex_arithmetic", "i", {"result": [0, 1]}, ["i", "1i", "0 + i", "0+1i"], ["1", "-i", "0"]),
    ("complex_arithmetic", "-2", {"result": [-2, 0]}, ["-2", "-2 + 0i", "-2.0-0i"], ["2", "-2i", "0-2i"]),
    (
        "countdown",
        "25*4 - 1*7",
        {"numbers": [25, 4, 1, 7], "target": 93},
        ["25*4-7*1", "(25 * 4) - 7 / 1", "-7*1 + 25*4", "25*(4)-(7*1)"],
        [
            "93",
            "25*4 - 7",
            "25*4 - 7*1*1",
            "93 + 0*25*4*1*7",
            "len([25, 4, 1, 7])*0 + 93",
            "25*4 - 7**1",
            "25*4-7*1 = 93",
        ],
    ),
    (
        "countdown",
        "81",
        {"numbers": [81, 1, 1, 1], "target": 81},
        ["81*1*1*1", "81 + 1 - 1*1"],
        ["81*1", "81", "81*1/1"],
    ),
    (
        "countdown",
        "8",
        {"numbers": [25, 3], "target": 8},
        [],
        ["25/3", "8", "int(25/3)", "25//3", "25 - 3*3"],
    ),
    (
        "puzzle24",
        "8*(5*1 - 2)",
        {"numbers": [5, 1, 2, 8]},
        ["(5*1-2)*8", "8*(5 - 2)*1", "8*(5-2)/1"],
        ["6*4*1*1", "8*5*1/2 + 4.5", "8*(5*1 - 2) + 0", "24", "8*5*1-2", "8*(51-2)"],
    ),
    (
        "coin_flip",
        "0.003173828125",
        {"rational": {"numerator": 13, "denominator": 4096}},
        ["13/4096", "\\frac{13}{4096}", "0.00317", "3.17e-3", ".003173828125", "0.00317383"],
        ["0", "0.0", "0.003", "0.00319", "0.0031740", "3/1000", "1/1e999", "nan"],
    ),
    (
        "coin_flip",
        "1",
        {"rational": {"numerator": 2**50 - 1, "denominator": 2**50}},
        ["1"],
        ["0.999", "1.001", "0"],
    ),
    ("bitwise_arithmetic", "-0x1f", {}, ["-0x1F", "-31", "-0b11111"], ["0x1f", "-1f", "0xffffffe1"]),
    (
        "prime_factorization",
        "2 \u00d7 3 \u00d7 3",
        {},
        ["3 \u00d7 2 \u00d7 3", "2\u00d73\u00d73", "2 \\times 3 \\times 3"],
        ["18", "2 \u00d7 9", "\u00d7 2", "x"],
    ),
    (
        "number_sorting",
        "['-3.0', '9.25']",
        {"sorted_numbers": ["-3.0", "9.25"], "direction": "ascending"},
        ["['-3.0', '9.25']", "[-3, 9.25]", '["-3.00","9.25"]'],
        ["[NaN, NaN]", "[-3, 9]", "[9.25, -3]", "[-3.5, 9.5]", "-3, 9.25", "[true, 9.25]"],
    ),
    (
        "knights_knaves",
        "Zoey is a knight, and Riley is a knave.",
        {},
        [
            "riley is a knave, and zoey is a knight",
            "Zoey is a knight and Riley is a knave",
            "Zoey is a knight, Riley is a knave",
        ],
        [
            "Zoey is a knight",
            "Zoey is a knight, Riley is a knave, Riley is a knight",
            "Zoey knight Riley knave or not",
        ],
    ),
    (
        "polynomial_equations",
        "-0.04, 0.0",
        {},
        ["0, -0.04", "-0.04,0.00"],
        ["-0.04", "-0.04, 0, 0", "nan, nan", ""],
    ),
    ("polynomial_equations", "", {}, ['""', ""], ["0", "none", "nan"]),
    (
        "polynomial_multiplication",
        "2*x**3 - 8*x",
        {},
        ["-8*x + 2*x**3", "2*x*x**2 - 8*x", "2*x**3-8*x", "(2*x**3 - 8*x)"],
        ["2*x*(x**2 - 4)", "2*x*(x - 2)*(x + 2)", "2*x^3 - 8*x", "2*x**3 - 8*x + 0*y", "x.__class__"],
    ),
    (
        "simple_integration",
        "x**3/3 - x + C",
        {"integrand": "x**2 - 1", "variable": "x"},
        ["x**3/3 - x", "C + x**3/3 - x", "x*(x**2 - 3)/3 + 7", "(1/3)*x**3 - x + C"],
        ["Integral(x**2 - 1, x)", "x**3/3 - x + C*x", "0.333333333333*x**3 - x", "x**2 - 1", "x**3/3", "C"],
    ),
    (
        "intermediate_integration",
        "log(x)**2/2 + C",
        {"integrand": "log(x)/x", "variable": "x"},
        ["log(x)**2/2", "ln(x)**2/2 + c", "log(3*x)**2/2 - log(3)*log(x)", "log(x)*log(sqrt(x))"],
        ["log(x)/x", "Integral(log(x)/x, x)", "log(x)**2", "log(x)**2/2 + x/10**15", "eval(1)"],
    ),
    (
        "time_intervals",
        "3 days, 04:05:06",
        {},
        ["3 days, 4:05:06", "76:05:06"],
        ["3 days", "3 days, 04:05:06 or so"],
    ),
    ("time_intervals", "67 days", {}, ["67", "67 Days"], ["67 days 1", "67 or 68", "-67"]),
    (
        "decimal_arithmetic",
        "0.0004",
        {"decimal_places": 3},
        ["0.0004", "4e-4"],
        ["0", "0.001", "nan", "0.0005"],
    ),
    ("game_of_life_halting", "True", {}, ["True", "true"], ["False", "1", "zebra"]),
    (
        "codeio",
        '{"a": 1, "b": true}',
        {},
        ['{"b": true, "a": 1.0}'],
        ['{"a": true, "b": 1}', '{"a": 1}', "[]"],
    ),
    ("base_conversion", "", {}, ["0"], ["1", "00"]),
    (
        "quantum_lock",
        "A → A",
        QUANTUM,
        ["A -> A", "AA", "$A \\rightarrow A$", "a, a"],
        ["A", "A → A → A", "not A A", "B → A"],
    ),
]
"""Data set, its answer, metadata, what is right in other words, and what is wrong."""


@pytest.mark.parametrize(("dataset", "own", "metadata", "right", "wrong"), NOTATIONS)
def test_other_notations_pay_and_other_answers_do_not(dataset, own, metadata, right, wrong):
    prompt = problem("reasoning_gym", dataset=dataset, entry={"answer": own, "metadata": metadata})
    verdicts = {
        answer: verify_reasoning_gym(prompt, rf"\boxed{{{answer}}}").score for answer in (*right, *wrong)
    }
    assert verdicts == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize("dataset", ADMITTED)
def test_a_problem_as_it_was_made_can_be_judged(dataset: str):
    assert [check_reference(prompt.reference) for prompt in problems(dataset, 25)] == [None] * len(
        problems(dataset, 25)
    )


@pytest.mark.parametrize("dataset", ADMITTED)
def test_a_broken_problem_runs_nothing_and_is_named_in_one_line(dataset: str, tmp_path):
    canary = tmp_path / "canary"
    bad = (
        None,
        "",
        [],
        {},
        -1,
        10**40,
        "9**9**9**9",
        [[]],
        {"a": None},
        code(str(canary))[0],
        code(str(canary))[2],
    )
    reference = problems(dataset, 25)[0].reference
    for key in (*SCORERS[dataset].reads, "answer"):
        for value in bad:
            entry = json.loads(json.dumps(reference["entry"]))
            (entry if key == "answer" else entry["metadata"])[key] = value
            why = check_reference({"dataset": dataset, "entry": entry})
            assert why is None or (("\n" not in why and dataset in why) or "entry.answer" in why), why
            prompt = problem("reasoning_gym", dataset=dataset, entry=entry)
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, StopIteration):
                verify_reasoning_gym(prompt, r"\boxed{zebra}")
        entry = json.loads(json.dumps(reference["entry"]))
        del (entry if key == "answer" else entry["metadata"])[key]
        assert key in (check_reference({"dataset": dataset, "entry": entry}) or "")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({"answer": "x"}, "dataset=None must be text"),
        ({"dataset": ["chain_sum"], "entry": {}}, "must be text"),
        ({"dataset": "chain_sum"}, "has no metadata"),
        ({"dataset": "chain_sum", "entry": {"answer": "1"}}, "has no metadata"),
        ({"dataset": "chain_sum", "entry": {"answer": [1], "metadata": {}}}, r"answer=\[1\] must be text"),
        (
            {"dataset": "chain_sum", "entry": {"answer": "one", "metadata": {}}},
            "'one' is wrong by its own metadata",
        ),
        ({"dataset": "countdown", "entry": {"answer": "1+1", "metadata": {"target": 2}}}, "lacks numbers"),
        (
            {
                "dataset": "countdown",
                "entry": {"answer": "1+1", "metadata": {"target": 3, "numbers": [1, 1]}},
            },
            "'1\\+1' is wrong by its own metadata",
        ),
        ({"dataset": "rush_hour", "entry": {"answer": "A+1", "metadata": {}}}, "its problems have no answer"),
        (
            {"dataset": "no_such_set", "entry": {"answer": "1", "metadata": {}}},
            "no data set of reasoning-gym",
        ),
    ],
)
def test_a_reference_that_is_no_problem_is_named(reference, said: str):
    assert re.search(said, check_reference(reference) or "")


def test_judging_a_known_data_set_needs_no_walls_and_an_unknown_one_does():
    from reasoning_gym.factory import DATASETS

    assert {name for name in DATASETS if needs_isolation(name)} == set(UNSUITABLE) - {"acre"}
    assert needs_isolation("a_newer_set")


def test_it_keeps_the_contract_of_reward_functions():
    check_reward_function(
        verify_reasoning_gym, problem("reasoning_gym", dataset="chain_sum", entry=entry_of("chain_sum"))
    )

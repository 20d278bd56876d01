"""Verdicts on mathematics and science."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.rl.reward.mathematics.verifier import (
    check_reference,
    check_science_reference,
    verify_math,
    verify_science,
)
from megatron_ring.rl.reward.registry import check_reward_function
from tests.helpers.reward.judging import problem

RIGHT = [
    ("16", "16"),
    ("16", "16."),
    ("16", "$16$"),
    ("16", "+16"),
    ("16", "016"),
    (16, "16"),
    (r"\boxed{16}", r"\boxed{16}"),
    ("1000000", "1,000,000"),
    ("1000000", r"1{,}000{,}000"),
    ("-1", "- 1"),
    (r"\frac{1}{2}", "0.5"),
    ("0.5", "1/2"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"(x+1)^2", "x^2+2x+1"),
    ("5", "x = 5"),
    ("1,2", "2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"90^\circ", "90"),
    ("5", r"5\text{ cm}"),
    (r"50\%", "0.5"),
    ("[0,1)", r"\left[0, 1\right)"),
    ("x<3", "3>x"),
    (r"\text{Evelyn}", "Evelyn"),
    ("yes", r"\text{Yes}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("ab", "ba"),
]
WRONG = [
    ("16", "17"),
    ("16", "160"),
    ("7", "7 or 8"),
    ("7", "7, 8"),
    ("16", r"15 \text{ or } 16"),
    (r"\frac13", "0.333"),
    ("yes", "sey"),
    ("no", "on"),
    ("Evelyn", "Nyleve"),
    ("yes", "no"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    ("8", "x"),
    ("x^2", "2x"),
    ("10", "1 0"),
]
UNREADABLE = [
    "16",
    "<answer>16</answer>",
    r"\boxed{16",
    r"\boxed{16} and then \boxed{1",
    r"\boxed{}",
    r"\boxed{\frac{}",
    r"\boxed{<answer>16</answer>}",
    rf"\boxed{{16{' ' * 40}{'+0' * 2000}}}",
    r"<think>\boxed{16}</think> sixteen",
    "",
]


@pytest.mark.parametrize(("reference", "answer"), RIGHT)
def test_equal_values_are_correct(reference: object, answer: str):
    result = verify_math(problem("math", answer=reference), rf"Thus \boxed{{{answer}}}.")
    assert (result.score, result.status) == (1.0, "correct"), result.detail


@pytest.mark.parametrize(("reference", "answer"), WRONG)
def test_other_values_are_wrong(reference: str, answer: str):
    result = verify_math(problem("math", answer=reference), rf"Thus \boxed{{{answer}}}.")
    assert (result.score, result.status) == (0.0, "wrong")


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_is_told_apart_from_what_is_wrong(text: str):
    result = verify_math(problem("math", answer="16"), text)
    assert (result.score, result.status) == (0.0, "parse_error")


def test_only_the_last_box_of_the_answer_part_counts():
    prompt = problem("math", answer="2")
    assert verify_math(prompt, r"\boxed{1}, and so \boxed{2}").score == 1.0
    assert verify_math(prompt, r"\boxed{2}, and so \boxed{1}").score == 0.0
    assert verify_math(prompt, r"<think>\boxed{1}</think>\boxed{2}").score == 1.0


def test_boxes_that_only_a_word_joins_are_one_answer():
    for text in (
        r"\boxed{1} or \boxed{2}",
        r"$\boxed{2}$ and $\boxed{1}$",
        r"$x=\boxed{1}$, $x = \boxed{2}$",
        r"\[x_1=\boxed{1}\quad\text{or}\quad x_2=\boxed{2}\]",
        r"\boxed{5}. Hence \boxed{1} or \boxed{2}.",
        r"$\boxed{1} \vee \boxed{2}$",
        r"$\boxed{1} \lor x = \boxed{2}$",
        r"$\boxed{1}$ or else $\boxed{2}$",
        r"$\boxed{1}$ / $\boxed{2}$",
    ):
        assert verify_math(problem("math", answer="1,2"), text).score == 1.0, text
        assert verify_math(problem("math", answer="2"), text).score == 0.0, text
        assert verify_math(problem("math", answer="1"), text).score == 0.0, text


def test_what_most_answers_are_is_decided_without_reading_mathematics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_ring.rl.reward.mathematics.verifier._by_value", None)
    for reference, answer in [
        ("16", "16"),
        ("16", "17"),
        ("1600", "1,600"),
        ("1/2", "0.5"),
        ("B", "(B) 12"),
        ("Yes", "no"),
        (r"\frac{1}{2}", r" \frac{1}{2} "),
    ]:
        verify_math(problem("math", answer=reference), rf"\boxed{{{answer}}}")
    with pytest.raises(TypeError):
        verify_math(problem("math", answer="1/2"), r"\boxed{\sqrt{2}}")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("B", "correct"),
        ("b", "correct"),
        ("(B)", "correct"),
        ("B.", "correct"),
        (r"\text{B}", "correct"),
        ("B) 5 m/s", "correct"),
        ("(B) 5 m/s", "correct"),
        ("B: 5", "correct"),
        ("B. Vitamin C", "correct"),
        ("(B) Not enough information", "correct"),
        ("(B) (C)", "wrong"),
        ("(B) or (C)", "wrong"),
        ("B. or C.", "wrong"),
        ("B) C) D)", "wrong"),
        ("B. Infection by E. coli", "correct"),
        ("B. The point (A, C)", "correct"),
        ("B. Both A and C", "correct"),
        ("B (the cell)", "correct"),
        ("B - the cell", "correct"),
        ("[B]", "correct"),
        ("The correct answer is B", "correct"),
        ("B. 5 C. 6", "wrong"),
        ("B) 5, C) 6", "wrong"),
        ("B: 5; C: 6", "wrong"),
        ("B. five, C. six", "wrong"),
        (r"\text{B. five or C. six}", "wrong"),
        (r"B. 5\quad C. 6", "wrong"),
        ("B. no, the answer is C", "wrong"),
        (r"B \text{ or } C", "parse_error"),
        ("[B][C]", "parse_error"),
        ("C", "wrong"),
        ("(A) or B", "wrong"),
        ("5 m/s", "parse_error"),
        ("Both", "parse_error"),
        ("", "parse_error"),
    ],
)
def test_a_choice_in_science_is_its_letter(answer: str, status: str):
    for reference in ("B", "(B)"):
        result = verify_science(problem("science", answer=reference), rf"\boxed{{{answer}}}")
        assert (result.status, result.score) == (status, float(status == "correct"))


def test_science_that_is_no_choice_is_judged_by_value():
    assert verify_science(problem("science", answer=r"3.2\times 10^{4}"), r"\boxed{32000}").score == 1.0
    assert verify_science(problem("science", answer="9.81"), r"\boxed{9.8}").status == "wrong"


USABLE = [
    *(
        "16",
        "1/2",
        "yes",
        "B",
        "José",
        "x=5",
        r"\frac{1}{2}",
        "(1,2)",
        "x<3",
        r"\pm 2",
        r"5\text{ cm}",
        "0.333...",
        "-221_3",
        "A3F_{16}",
        "55 (pieces of drawing paper)",
        "(C",
    ),
    *("n!", r"\begin{pmatrix}1\\2\end{pmatrix}", r"2^{2^{100}}", r"\infty", r"\mathbb{R}", r"\{x \mid x>3\}"),
    *(r"\int_0^1 f(x) dx", "52_8", "12:30", "The midpoints form a hexagon"),
]
UNUSABLE = [
    *(
        "",
        " ",
        r"\boxed{}",
        r"\frac{",
        "甲",
        r"\boxed{甲}",
        "1/0",
        r"\ln 0",
        "9" * 1001,
        "(" * 60 + "1" + ")" * 60,
    ),
    *("9^{9^{9^9}}", "(10^{13})!", r"\sum_{k=1}^{10^9} k", r"\unknown{5}", "<answer>5</answer>"),
]


@pytest.mark.parametrize("answer", USABLE)
def test_a_reference_that_can_be_judged_is_not_refused(answer: str):
    assert check_reference(answer) is None
    assert check_science_reference(answer) is None
    assert verify_math(problem("math", answer=answer), rf"\boxed{{{answer}}}").score == 1.0
    assert verify_math(problem("math", answer=answer), r"\boxed{-271828}").score == 0.0


@pytest.mark.parametrize("answer", UNUSABLE)
def test_a_reference_that_nobody_can_match_is_told_in_one_line(answer: str):
    for why in (check_reference(answer), check_science_reference(answer)):
        assert why is not None
        assert "\n" not in why
        assert len(why) < 150


def test_a_choice_in_lower_case_is_one_in_science_only():
    assert check_science_reference("b)") is None
    assert check_reference("b)") is not None


def test_usual_references_are_checked_without_importing_what_comparing_needs():
    code = """
import sys
from megatron_ring.rl.reward.mathematics.verifier import check_reference
assert [check_reference(answer) for answer in ("16", "-1/2", "0.5", r"\\\\frac{1}{2}", "yes", "B", "1,000")] == [None] * 7
assert not {"sympy", "mpmath", "math_verify"} & set(sys.modules)
check_reference(r"\\\\sqrt{2}")
assert not {"sympy", "math_verify"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=120)


@pytest.mark.parametrize("answer", ["", r"\boxed{}", r"\frac{", "甲"])
def test_a_reference_that_cannot_be_read_is_not_the_responses_fault(answer: str):
    with pytest.raises(ValueError, match="reference answer"):
        verify_math(problem("math", answer=answer), r"\boxed{1/2}")


def test_a_chain_of_equations_in_a_list_is_an_answer_like_any_other():
    for reference in ("[0,1)", "1,2", "(1,2)"):
        result = verify_math(problem("math", answer=reference), r"\boxed{\infty=1\pmod{i\pmod{0}},n}")
        assert result.score == 0.0


def test_both_keep_the_contract_of_reward_functions():
    check_reward_function(verify_math, problem("math", answer="1/2"))
    check_reward_function(verify_science, problem("science", answer="B"))

"""Verdicts on mathematics and science."""

import pytest

from megatron_ring.rl.reward.math_answer import judge_math, judge_science
from megatron_ring.rl.reward.registry import check_reward_function
from tests.rl.reward.conftest import problem

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
    result = judge_math(problem("math", answer=reference), rf"Thus \boxed{{{answer}}}.")
    assert (result.score, result.status) == (1.0, "correct"), result.detail


@pytest.mark.parametrize(("reference", "answer"), WRONG)
def test_other_values_are_wrong(reference: str, answer: str):
    result = judge_math(problem("math", answer=reference), rf"Thus \boxed{{{answer}}}.")
    assert (result.score, result.status) == (0.0, "wrong")


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_is_told_apart_from_what_is_wrong(text: str):
    result = judge_math(problem("math", answer="16"), text)
    assert (result.score, result.status) == (0.0, "parse_error")


def test_only_the_last_box_of_the_answer_part_counts():
    prompt = problem("math", answer="2")
    assert judge_math(prompt, r"\boxed{1} or \boxed{2}").score == 1.0
    assert judge_math(prompt, r"\boxed{2} or \boxed{1}").score == 0.0
    assert judge_math(prompt, r"<think>\boxed{1}</think>\boxed{2}").score == 1.0


def test_integers_and_equal_strings_do_not_wait_for_math_verify(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_ring.rl.reward.math_answer._by_value", None)
    for reference, answer in [
        ("16", "16"),
        ("16", "17"),
        ("1600", "1,600"),
        (r"\frac{1}{2}", r" \frac{1}{2} "),
    ]:
        judge_math(problem("math", answer=reference), rf"\boxed{{{answer}}}")
    with pytest.raises(TypeError):
        judge_math(problem("math", answer="1/2"), r"\boxed{0.5}")


def test_memory_of_the_verifier_is_limited_and_given_back():
    import resource

    from megatron_ring.rl.reward.math_answer import MEMORY_BYTES, _limited_memory

    before = resource.getrlimit(resource.RLIMIT_AS)
    with _limited_memory():
        assert resource.getrlimit(resource.RLIMIT_AS)[0] == MEMORY_BYTES
    assert resource.getrlimit(resource.RLIMIT_AS) == before


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
        ("C", "wrong"),
        ("(A) or B", "wrong"),
        ("5 m/s", "parse_error"),
        ("Both", "parse_error"),
        ("", "parse_error"),
    ],
)
def test_a_choice_in_science_is_its_letter(answer: str, status: str):
    for reference in ("B", "(B)"):
        result = judge_science(problem("science", answer=reference), rf"\boxed{{{answer}}}")
        assert (result.status, result.score) == (status, float(status == "correct"))


def test_science_that_is_no_choice_is_judged_by_value():
    assert judge_science(problem("science", answer=r"3.2\times 10^{4}"), r"\boxed{32000}").score == 1.0
    assert judge_science(problem("science", answer="9.81"), r"\boxed{9.8}").status == "wrong"


@pytest.mark.parametrize("answer", ["", r"\boxed{}", r"\frac{"])
def test_a_reference_that_cannot_be_read_is_not_the_responses_fault(answer: str):
    with pytest.raises(ValueError, match="reference answer"):
        judge_math(problem("math", answer=answer), r"\boxed{1/2}")


def test_both_keep_the_contract_of_reward_functions():
    check_reward_function(judge_math, problem("math", answer="1/2"))
    check_reward_function(judge_science, problem("science", answer="B"))

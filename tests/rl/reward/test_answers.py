"""The answer is found where it stands, and nowhere else."""

import pytest

from megatron_ring.rl.reward.answers import (
    answer_part,
    boxed_answer,
    final_answer,
    last_boxed,
    unboxed,
)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{16}", "16"),
        (r"so \boxed{3}, or rather \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{16}}", "16"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a{b{c}d}e} tail }", "a{b{c}d}e"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed{16", None),
        (r"first \boxed{3}, then cut \boxed{1", None),
        (r"\boxed 7", "7"),
        (r"\boxed 12.", "12"),
        (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed x", "x"),
        (r"put it in a \boxed form", None),
        (r"\boxed{3} as \boxed asks", "3"),
        (r"\boxed{\}", None),
    ],
)
def test_the_last_box_counts_with_its_braces_balanced(text: str, box: str | None):
    assert last_boxed(text) == box


def test_many_unclosed_boxes_take_linear_time():
    assert last_boxed(r"\boxed{" * 200_000) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{2} or \boxed{3}", "2 , 3"),
        (r"$x=\boxed{2}$ and $x=\boxed{3}$.", "2 , 3"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1 , 2 , 3"),
        (r"\boxed{1}; then \boxed{2} or \boxed{3}", "2 , 3"),
        (r"\boxed{2} so \boxed{3}", "3"),
        (r"\boxed{2}\n\nPart two: \boxed{3}", "3"),
        (r"\boxed{2} or \boxed{3", None),
        (r"\boxed{\boxed{2}}", "2"),
        ("none", None),
    ],
)
def test_boxes_belong_together_where_only_a_word_joins_them(text: str, answer: str | None):
    assert boxed_answer(text) == answer


def test_a_box_around_the_whole_is_taken_off_and_no_other():
    assert unboxed(r" \boxed{\boxed{5}} ") == "5"
    assert unboxed(r"\boxed{5} cm") == r"\boxed{5} cm"
    assert unboxed("5") == "5"


def test_what_was_thought_is_not_an_answer():
    assert answer_part(r"<think>\boxed{1}</think> then </think>\boxed{2}") == r"\boxed{2}"
    assert last_boxed(answer_part(r"\boxed{1}</think> none")) is None
    assert final_answer("12+7=19</think> 16 ") == "16"
    assert final_answer(r"12 </think> it is \boxed{16}.") == "16"
    assert final_answer(" 16\n") == "16"

"""When two problems are one: white space, case and the punctuation of a sentence say nothing, signs and digits do."""

import itertools

import pytest

from megatron_ring.data.prompts.same_problem import asked, is_among


@pytest.mark.parametrize(
    "text",
    [
        "What is  1 + 2?", " What is 1 + 2? ",
        "What is 1 + 2?\n", "what is 1 + 2 ?", "WHAT IS 1 + 2", "What is\t1 +\u00a02?!",
        "What is 1+2?", "What is $1 + 2$?", "What is \\(1+2\\)?", "What is \\[1 + 2\\]", "**What is $$1 + 2$$?**",
        "\ufeffWhat is 1\u200b + 2?\u200b", "What\u00ad is 1 + 2?",
        "\u201cWhat is 1 + 2?\u201d", "What is \uff11 \uff0b \uff12\uff1f", "What, is: 1 + 2...",
    ],
)  # fmt: skip
def test_the_same_problem_written_otherwise(text: str):
    assert asked([text]) == asked(["What is 1 + 2?"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find *the sum* of 1 and 2.", "Find the sum of 1 and 2."),
        ("_Find_ __the sum__", "find the sum"),
        (r"Is $\dfrac{1}{2}\,x$ less?", r"Is $\frac{1}{2} x$ less?"),
        (r"Solve \(\left(x+1\right)^2=4\)", "Solve $(x+1)^2=4$"),
        ("***Find*** the sum", "find the sum"),
        ("*Find the sum of 1 and 2.*", "Find the sum of 1 and 2."),
        ("_What is 2?_", "What is 2?"),
        (r"Find \textbf{all} \emph{real} <b>roots</b>", "find all real roots"),
        (r"$\displaystyle\int_0^1\!x$", r"$\int_0^1x$"),
        (r"$\tfrac12\quad\Big|x\Big|$", r"$\frac12 |x|$"),
    ],
)
def test_emphasis_and_the_sizes_of_a_formula_say_nothing(one: str, other: str):
    assert asked([one]) == asked([other])


def test_signs_digits_brackets_and_factorials_tell_problems_apart():
    texts = [
        "2-3", "2 3", "23",
        "2^3", "-23", "2.3", "2,3", "2:3", "2/3", "2*3", "(2)3", "2!", "2", "x!", "x", "|x|", "2%", "$2",
        "2**3", "2**3**4", "234", "$2-$3", "$2 and $3", "2 and 3", "2 -3", "$2$3",
        "2 + 3 * 4", "(2 + 3) * 4", "f'(x)", "f(x)", "x_1", "x_1_", "2*3*4", "f(*) and g(*)", "f() and g()",
        r"x \leftarrow y", r"x \rightarrow y", r"\frac{1}{2}", r"\\, 1", r"\ 1",
        "a<b>c", "ac", "3!*4!", "3!4!", "2*3!*4", "n!*m", "n!m",
    ]  # fmt: skip
    for one, other in itertools.combinations(texts, 2):
        assert asked([one]) != asked([other]), (one, other)
    assert asked(["2\u00b3"]) == asked(["2^3"]) and asked(["2\u22123"]) == asked(["2\u20133"]) == asked(
        ["2-3"]
    )


def test_a_conversation_is_its_users_turns():
    held_out = {asked(["f1", "Sure?"]), asked(["What is 1 + 2?"])}
    assert is_among(asked(["f1", "sure"]), held_out)
    assert is_among(asked(["Hello!", "what is 1 + 2", "Why?"]), held_out), "asked in it"
    assert not is_among(asked(["Sure?"]), held_out), "the last turn alone is another problem"
    assert not is_among(asked(["f1"]), held_out) and not is_among(asked(["f1", "x", "sure"]), held_out)


def test_text_of_nothing_but_punctuation_is_itself():
    assert asked(["?"]) != asked(["!"])

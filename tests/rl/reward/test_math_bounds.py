"""No answer is code, and none is expensive: whatever stands in a box has a verdict soon."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import pytest

from megatron_ring.rl.reward.mathematics.verifier import check_reference, verify_math, verify_science
from tests.helpers.reward.judging import problem


def _around(opening: str, count: int, closing: str) -> str:
    return opening * count + "1" + closing * count


KILLERS = {
    "powers": [
        "9^{9^{9^9}}",
        "9^{9^9}",
        "10^{10^6}",
        "10^{10^{10}}",
        "2^{2^{2^{2^{2^2}}}}",
        "e^{e^{e^{e^e}}}",
        "e^" * 200 + "x",
    ],
    "factorials": [
        "99999999!",
        "99999999!!",
        "(10^{10})!",
        "((((20!)!)!)!)!",
        "5" + "!" * 500,
        "+".join(["(1/3)!"] * 100),
    ],
    "nesting": [
        _around(r"\frac{1}{", 80, "}"),
        _around(r"\sqrt{", 80, "}"),
        _around("(", 400, ")"),
        _around("{", 400, "}"),
        "(" * 500,
        r"\left(" * 150,
        r"\boxed{" * 120,
        r"\text{" * 150,
        r"\sin\cos" * 100 + "x",
        "((((((((((((((((((((((((x)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2)^2",
    ],
    "sums": [
        r"\sum_{i=1}^{10^9} i",
        r"\prod_{i=1}^{10^9} i",
        r"\prod_{i=1}^{1000} i^{1000}",
        r"\sum_{i=1}^{1000}\sum_{j=1}^{1000}\sum_{k=1}^{1000} ijk",
        r"\binom{10^9}{5\cdot 10^8}",
        r"\binom{x}{1000}",
        r"\int_0^1 x^x dx",
        r"\lim_{n\to\infty}(1+1/n)^n",
    ],
    "polynomials": [
        "(x+1)^{100000}",
        "(x+y+z+w+a+b+c+d)^{5000}",
        "+".join(f"x_{{{n}}}" for n in range(120)),
        "+".join(rf"\sqrt[7]{{x+{n}}}" for n in range(60)),
        "x^{y^{z^{w^{a^b}}}}",
    ],
    "digits": [
        "0." + "3" * 900,
        "9" * 990,
        "1e9999",
        "1.5e-9999",
        "1" * 300 + "^{" + "1" * 300 + "}",
        "1.5e99999999",
        "0.(3)" * 150,
    ],
    "integers": [
        r"\gcd(10^{10000},10^{9999})",
        r"\gcd(" + "9" * 400 + "," + "8" * 400 + ")",
        r"10^{10000} \bmod 7",
        "7 mod 0",
    ],
    "angles": [r"\sin(10^{10^{100}})", r"\sin 10^{400}", r"\tan(\pi/2)", r"\exp(\exp(\exp(10)))"],
    "many": [
        ",".join(map(str, range(250))),
        ",".join(rf"\sqrt{{{n}}}" for n in range(2, 80)),
        r"\{" + ",".join(f"x_{n}" for n in range(150)) + r"\}",
        r"\cup".join(["(1,2)"] * 120),
        r"\cup".join([r"[\sqrt2,\pi^2)"] * 60),
        "<".join("x" * 400),
        "a:" * 300 + "b",
        r"\pm1" * 200,
        "+".join([r"\pm 1"] * 80),
        " or ".join(f"x<{n}" for n in range(100)),
        r"\begin{pmatrix}" + r"\\".join("&".join("x" * 20) for _ in range(20)) + r"\end{pmatrix}",
    ],
    "signs": [
        "-" * 900 + "5",
        "x" + "'" * 900,
        "5" + "%" * 500,
        "\\" * 900,
        "$" * 900,
        "√" * 900,
        "⁵" * 900,
        "|" * 900,
        "||x" * 250,
    ],
    "functions of nothing": [rf"\{name}{{}}()" for name in ("gcd", "lcm", "max", "min", "sin", "log")]
    + [r"\gcd()"],
    "undefined": ["0^0", "1/0", r"\infty-\infty", r"\ln 0", "0^{-1}", "(1+10^{-400})^{10^{400}}"],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KILLERS)
def test_nothing_hangs_and_nothing_is_raised(kind: str):
    for answer in KILLERS[kind]:
        for reference in ("5", "x+1", r"\sqrt{2}", "(1,2)", "x<3", "1,2,3"):
            result = verify_math(problem("math", answer=reference), rf"\boxed{{{answer}}}")
            assert result.score == 0.0, (answer[:60], reference)
            assert result.status in ("wrong", "parse_error")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KILLERS)
def test_a_killer_as_a_reference_is_refused_or_judged(kind: str):
    for answer in KILLERS[kind]:
        if check_reference(answer) is None:
            assert verify_math(problem("math", answer=answer), r"\boxed{-271828}").score == 0.0, answer[:60]


def test_what_is_too_expensive_says_so():
    for answer in ("9^{9^{9^9}}", r"\sum_{i=1}^{10^9} i", r"\sin(10^{10^{100}})"):
        result = verify_math(problem("math", answer="5"), rf"\boxed{{{answer}}}")
        assert (result.score, result.status) == (0.0, "wrong")
        assert ": " in result.detail, result.detail


CODE = [
    "__import__('os').system('touch {canary}')",
    "open('{canary}','w')",
    "exec(\"open('{canary}','w')\")",
    "eval('open(\\'{canary}\\',\\'w\\')')",
    r"\operatorname{{exec}}(open('{canary}','w'))",
    r"\text{{__import__('os').system('touch {canary}')}}",
    "().__class__.__base__.__subclasses__()",
    "(lambda: open('{canary}','w'))()",
    "x := open('{canary}','w')",
    "[open('{canary}','w') for x in (1,)]",
    "sympify(\"__import__('os').system('touch {canary}')\")",
    "1 if open('{canary}','w') else 2",
    "f'{{open(chr(47))}}'",
    "5;import os;os.system('touch {canary}')",
    'S(\'open("{canary}","w")\')',
]


@pytest.mark.parametrize("code", CODE)
def test_no_answer_is_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    canary = tmp_path / "canary"
    answer = code.format(canary=canary)
    verify_math(problem("math", answer=r"\sqrt{2}"), r"\boxed{1}")  # whatever has to be imported is
    with monkeypatch.context() as patched:
        for name in ("eval", "exec", "compile"):
            patched.setattr(builtins, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
        patched.setattr(os, "system", lambda *_: pytest.fail("a program was started"))
        for reference in ("5", r"\sqrt{2}", "x", "(1,2)"):
            assert verify_math(problem("math", answer=reference), rf"\boxed{{{answer}}}").score == 0.0
            assert verify_science(problem("science", answer=reference), rf"\boxed{{{answer}}}").score == 0.0
        check_reference(answer)
    assert not canary.exists()

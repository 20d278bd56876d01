"""Words after a number: known units, which must agree, and other words, which are ignored."""

from __future__ import annotations

import re

from megatron_ring.rl.reward.mathematics.text import Unreadable, word_list

MAX_WORDS = 5
_SAME = """
mm millimeter millimetre
cm centimeter centimetre
dm decimeter decimetre
m meter metre
km kilometer kilometre
in inch inches "
ft foot feet
yd yard
mi mile
mg milligram
g gram gm
kg kilogram
lb pound-mass lbs
oz ounce
t ton tonne
ms millisecond
s sec second
min minute
h hr hour
day d
week wk
month
year yr
ml milliliter millilitre cc
l liter litre
gal gallon
$ dollar usd \\$ bucks
cent ¢
$€ euro eur €
$£ gbp £
$¥ yen ¥ yuan rmb
rad radian
Hz hz hertz
N n newton
J j joule
kJ kj kilojoule
W w watt
kW kw kilowatt
Pa pa pascal
kPa kpa kilopascal
V v volt
A a amp ampere
K k kelvin
c celsius
f fahrenheit
am
pm
mol mole
eV ev electronvolt
MeV mev megaelectronvolt
keV kev kiloelectronvolt
kHz khz kilohertz
MHz mhz megahertz
GHz ghz gigahertz
erg
dyne dyn
atm atmosphere
ohm
tesla
coulomb
nm nanometer nanometre
мм миллиметр
см сантиметр
м метр
км километр
кг килограмм
г грамм
ч час
"""
_KNOWN = {word: line.split()[0] for line in _SAME.strip().splitlines() for word in line.split()}
_PREFIXED = re.compile("[YZEPTGMkhdcmu\u00b5\u03bcnpf](?:mol|Hz|Pa|eV|Wb|Bq|Gy|Sv|lm|lx|[mgsAKNJWCVFTHLl])")
LETTERS = frozenset("msghNJWVL")
"""Single letters that are taken as a unit rather than as a symbol."""
_HEDGES = frozenset(
    word_list(
        "or nor and not no but if either maybe perhaps possibly isn't except unless instead actually wrong false "
        "false? vs versus than itself twice thrice doubled tripled halved "
        "squared cubed factorial negative plus minus least most half halves third thirds fourth fourths fifth fifths "
        "sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths twelfths sixteenths twentieths "
        "hundredth hundredths thousandth thousandths millionth millionths zero one two three four five six seven "
        "eight nine ten tens eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
        "twenty thirty forty fifty sixty seventy eighty ninety pi i e x y z n"
    )
)
"""Words that change the value of the number before them, or add another answer."""
SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "quadrillion": 10**15,
    "quintillion": 10**18,
    "lakh": 10**5,
    "crore": 10**7,
    "bn": 10**9,
    "mrd": 10**9,
}
_WORD = re.compile(r"[^\W\d_]+|[$€£¥¢\"]")
_SPLIT = re.compile(r"[^\W\d_]+|[$€£¥¢\"]|\^-?\d{1,2}|/")


def same_unit(wanted: str, given: str) -> bool:
    """Do two units agree? Known units must be the same; unknown ones (``apples``) are ignored.

    Raises Unreadable for words that are no unit at all, such as ``or 6``.
    """
    a, b = _measure(wanted), _measure(given)
    return not a or not b or a == b


def is_radian(text: str) -> bool:
    """Whether a unit is the radian."""
    return _measure(text) == (("rad", 1),)


def is_measure(text: str) -> bool:
    """Are bare letters after a number a unit? ``m/s^2`` is, and so are the most common single letters.

    Examples: ``is_measure("km/h")``, ``not is_measure("a/b")``.
    """
    if len(text) == 1:
        return text in LETTERS
    return bool(_measure(text))


def scaled(text: str) -> tuple[int, str]:
    """(factor, rest) of a unit: ``(10**6, "dollars")`` for ``million dollars``."""
    first, _, rest = text.strip().partition(" ")
    factor = SCALES.get(first.casefold()) or SCALES.get(first.casefold().removesuffix("s"))
    return (factor, rest) if factor else (1, text)


def _measure(text: str) -> tuple[tuple[str, int], ...]:
    """A unit as (word, power) pairs in one spelling; empty if it is no known unit of measurement."""
    words = _WORD.findall(text)
    lowered = [word.casefold() for word in words]
    if len(words) > MAX_WORDS or _HEDGES & set(lowered):
        raise Unreadable(f"words behind the answer: {text[:40]}")
    plain = (
        text.replace("\\", " ")
        .replace("{", "")
        .replace("}", "")
        .replace(".", "")
        .replace("per", "/")
        .replace("^- ", "^-")
    )
    plain = re.sub(r"\bsquare\s+(\w+)", r"\1^2", re.sub(r"\bcubic\s+(\w+)", r"\1^3", plain))
    plain = re.sub(r"\bsq\.?\s+(\w+)", r"\1^2", plain)
    if re.search(r"(?<![\^\-\d])\d", plain):
        raise Unreadable(f"numbers behind the answer: {text[:40]}")
    powers: dict[str, int] = {}
    sign, last = 1, ""
    for word in _SPLIT.findall(plain):
        if word == "/":
            sign = -1
        elif word[0] == "^" and last:
            powers[last] += sign * (int(word[1:]) - 1)
        else:
            last = _known(word) or ""
            if not last:
                return ()
            powers[last] = powers.get(last, 0) + sign
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def _known(word: str) -> str | None:
    """The canonical spelling of a unit. Case is ignored only if the unit is unknown as written: ``mW`` is not ``MW``."""
    if word not in _KNOWN and word not in ("pm", "am") and _PREFIXED.fullmatch(word):
        return word.replace("L", "l").replace("\u00b5", "\u03bc")
    lowered = word.casefold()
    for spelling in (word, lowered, lowered.removesuffix("s"), lowered.removesuffix("es")):
        if spelling in _KNOWN:
            return _KNOWN[spelling]
    return None

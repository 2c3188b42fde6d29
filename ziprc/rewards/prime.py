r"""The rule that most public reward data is graded by (`prime_math`): an answer is looked for by words, and compared leniently.

What is compared: the last box, else what follows words such as `the answer is`. How: as text once both are written in one way
(units, percent signs, dollars and commas in thousands do not count), tuples and matrices part by part, else by SymPy's
difference, else as numbers to a relative 1e-4, with π as it is and as 3.14. Two fractions of integers have to be the same ones,
an unreduced one is wrong. SymPy reads model text in children that can be killed (children.py).

The published code (https://github.com/PRIME-RL/PRIME, as used by TinyV) also takes the reference times 100 or over 100 for
right, cuts words inside of boxes (`this is A` becomes `A`), and finds an integer in whatever is near to it. So `1800` and
`17.9999` pass for 18. Here that is done with `legacy` alone. Both: SymPy is asked about at most two unknown letters and small
powers.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import starmap
from typing import Any

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Item, graded
from ziprc.rewards.children import EXTRACTED_CHARACTERS, ChildGrader, outcome, serve, workers
from ziprc.rewards.hendrycks import last_box, written

LONGEST = 1000  # characters of an answer that are compared
NEAR = Fraction(1, 10_000)  # relative
PUBLISHED_PI = "3.14"
MOST_UNKNOWN = 2  # letters

_AFTER = re.compile(r"answer:|answer is|answers are", re.IGNORECASE | re.ASCII)
_BEFORE = re.compile(r"\bis (?:the )?answer|\bare (?:the )?answers", re.IGNORECASE | re.ASCII)
_LAST_WORDS = ("be ", "is ", "are ", "=", ": ", "get ", "be\n", "is\n", "are\n", ":\n", "get\n")

_WRITINGS = [  # in this order, after lower-casing
    (r"\\(?:text|textbf|mbox|mathrm|mathbf)\{([^{}]*)\}", r" \1 "),
    (r"\\[td]frac", r"\\frac"),
    (r",\\! *", ""),
    (r"\\(?:left|right)(?![a-z])|\\[!,;: ]|\\?[%$]|°|\^ *(?:\{ *\\circ *\}|\\circ)", ""),
    (r"\b(?:or|and)\b", ","),
    (
        r"(?<![a-z\\])(?:degree|[ckm]?m|(?:centi|kilo|milli)?meter|mile|second|minute|hour|day|week|month|year|foot|feet"
        r"|inch|yard)(?:e?s)?(?![a-z])(?: *\^ *\{?\d+\}?)?",
        "",
    ),
    (r"\{,\}", ","),
    (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    (r"\\frac *(\d) *(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\d.])(\d+) *\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),  # mixed numbers
    (r"(?<![\d.])(\d+) +(\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\\frac\{(\w+)\}\{(\w+)\}", r"\1/\2"),
    (r"[\s{}]", ""),
    (r"\.$", ""),
]
WRITINGS = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in _WRITINGS]
_NUMBER = re.compile(r"([+-]?)(\d+\.?\d*|\.\d+)", re.ASCII)
_FRACTION = re.compile(r"[+-]?\d+/\d+", re.ASCII)
_MIXED = re.compile(r"(-?)\((\d+)\+(\d+)/(\d+)\)", re.ASCII)
_BRACKETED = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([bp]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_READ_IN_PART = re.compile(r"[,;:?=<>~'\"]|\d_|\.\d*\.", re.ASCII)
_LARGE_POWER = re.compile(r"\^\(|\^\d\d|\^\d\^|\^-", re.ASCII)

Parts = tuple[object, list[str]]  # what has to be the same of two answers, and what is compared part by part


def answer_of(text: str, legacy: bool = False) -> str:
    """What is compared of a visible answer: at most LONGEST characters, as they stand in the last box where there is one."""
    said = text[max((match.end() for match in _AFTER.finditer(text)), default=0) :]
    said = said[: max((match.start() for match in _BEFORE.finditer(said)), default=None)]
    box = last_box(said)
    if box is None and not legacy:
        box = last_box(text)
    if box is not None and not legacy:
        return box.strip()[:LONGEST]
    said = (said if box is None else box).strip()
    said = said.rpartition(". ")[0] or said
    for words in _LAST_WORDS:
        said = said.rpartition(words)[2].strip()
    return (said if legacy else said.lstrip(" *_`$").rstrip(" *_`$."))[:LONGEST]


def plain(answer: str) -> str:
    """The one writing of an answer: more is dropped than `written` drops."""
    answer = answer.lower().strip()
    for pattern, replacement in WRITINGS:
        answer = pattern.sub(replacement, answer)
    if (match := _NUMBER.fullmatch(answer)) is None:
        return answer
    whole, _, rest = match[2].partition(".")
    digits = (whole.lstrip("0") or "0") + (f".{rest}".rstrip("0").rstrip("."))
    return f"-{digits}" if match[1] == "-" and digits != "0" else digits


def number(text: str) -> Fraction | None:
    """The value of a plain answer that is a number, a fraction of integers or a mixed number; else None."""
    if len(text) > LONGEST:
        return None
    try:
        if _NUMBER.fullmatch(text) or _FRACTION.fullmatch(text):
            return Fraction(text.rstrip("."))
        if match := _MIXED.fullmatch(text):
            value = int(match[2]) + Fraction(int(match[3]), int(match[4]))
            return -value if match[1] else value
    except ZeroDivisionError:
        return None
    return None


def parts_of(answer: str) -> Parts | None:
    """The parts of a tuple, an interval or a matrix; None for anything else."""
    if match := _MATRIX.fullmatch(answer.strip()):
        rows = [row.split("&") for row in match[2].strip().removesuffix("\\\\").split("\\\\")]
        return ("matrix", *map(len, rows)), [cell for row in rows for cell in row]
    bare = re.sub(r"\\(?:left|right)(?![a-z])", "", answer).strip()
    match = _BRACKETED.fullmatch(bare)
    if match is None:
        return None
    parts, depth = [""], 0
    for character in match[2]:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None  # (1,2),(3,4): no single pair of brackets
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return ((match[1], match[3], len(parts)), parts) if len(parts) > 1 else None


def near(truth: Fraction | float, found: Fraction | float, legacy: bool) -> bool:
    """Whether two numbers are equal to a relative 1e-4; legacy: or one of them times 100 is."""
    targets = (truth, truth / 100, truth * 100) if legacy else (truth,)
    return any(abs(found - target) <= NEAR * max(abs(found), abs(target)) for target in targets)


def same(truth: str, found: str, legacy: bool = False) -> bool | None:
    """Whether two answers are the same as far as can be told without algebra; None where SymPy is to be asked."""
    if not found.strip():
        return False
    if written(truth) == written(found):
        return True
    here, there = parts_of(truth), parts_of(found)
    if here or there:
        if not (here and there and here[0] == there[0]):
            return False
        verdicts = [same(*pair, legacy) for pair in zip(here[1], there[1], strict=True)]
        return False if False in verdicts else None if None in verdicts else True
    truth, found = plain(truth), plain(found)
    if truth == found and truth:
        return True
    if _FRACTION.fullmatch(truth) and _FRACTION.fullmatch(found):
        return False
    exact, value = number(truth), number(found)
    if exact is not None and exact.denominator == 1 and not legacy:
        return False  # an integer is met exactly, or not
    if exact is not None and value is not None:
        return near(exact, value, legacy)
    return None if simple(truth) and simple(found) else False


def simple(text: str) -> bool:
    """Whether SymPy is asked about a plain answer: few unknown letters, small powers, and nothing of which it reads a part.

    Such as a list, a word (`no` would be n·o, and so `on`), a number in base 8, or signs that the parser does not know.
    """
    letters = set(re.sub(r"\\[a-z]+|sqrt", "", text)) & set(string.ascii_letters)
    few = bool(text) and len(letters) <= MOST_UNKNOWN and not _LARGE_POWER.search(text)
    return few and text.isascii() and (len(text) == 1 or not text.isalpha()) and not _READ_IN_PART.search(text)


class PrimeGrader(ChildGrader):
    """See the head of the module."""

    name = "prime"
    command = (sys.executable, "-m", "ziprc.rewards.prime")

    def __init__(
        self, timeout_s: float, workers: int = 1, command: Sequence[str] | None = None, legacy: bool = False
    ) -> None:
        super().__init__(timeout_s, workers, command)
        self.legacy = legacy

    def settled(self, item: Item) -> Grade | None:
        assert item.answer is not None, "checked by lacks()"
        found = answer_of(visible_answer(item.response), self.legacy)
        verdict = same(item.answer, found, self.legacy)
        return None if verdict is None else graded(verdict, found[:EXTRACTED_CHARACTERS] or None)

    def question(self, item: Item) -> Mapping[str, Any]:
        found = answer_of(visible_answer(item.response), self.legacy)
        return {"reference": item.answer, "answer": found, "legacy": self.legacy}


def grader(config: Config) -> PrimeGrader:
    own = config.grades
    return PrimeGrader(own.timeout_s, workers(), legacy=own.style == "legacy")


# --- the child -------------------------------------------------------------------------------------------------------


def compare(reference: str, answer: str, legacy: bool) -> dict[str, Any]:
    """One comparison, in this process and without limits: an `outcome`. What SymPy raises is left to the caller."""
    here, there = parts_of(reference), parts_of(answer)
    pairs = zip(here[1], there[1], strict=True) if here and there else [(reference, answer)]
    verdicts = starmap(lambda t, f: _equal(t, f, legacy) if (told := same(t, f, legacy)) is None else told, pairs)
    return outcome(float(all(verdicts)), answer)


def _equal(truth: str, found: str, legacy: bool) -> bool:
    """By SymPy: the difference is 0, or the values are near."""
    if parts_of(truth):  # a part that has parts
        return compare(truth, found, legacy)["score"] == 1
    import sympy

    exact, value = _expression(truth), _expression(found)
    if exact is None or value is None or value.is_finite is False:  # 1/0 is no number
        return False
    if sympy.simplify(exact - value) == 0:
        return True
    if exact.free_symbols or value.free_symbols or (exact.is_Integer and not legacy):
        return False
    for pi in (sympy.pi, sympy.Rational(PUBLISHED_PI)):
        numbers = [complex(one.subs(sympy.pi, pi).evalf()) for one in (exact, value)]
        if not any(one.imag for one in numbers) and near(numbers[0].real, numbers[1].real, legacy):
            return True
    return False


def _expression(answer: str) -> Any:
    """What math-verify's parser, which evaluates nothing, makes of an answer, where that is a scalar; else None."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Expr

    text = answer.strip().strip("$")
    if "$" in text:
        return None  # several formulas
    read = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return read[0] if read and isinstance(read[0], Expr) else None


def warm_up() -> None:
    """Import SymPy and compile the parser's tables."""
    compare("\\frac{x}{2}", "x/2+x", False)


if __name__ == "__main__":
    serve(compare, warm_up, float(sys.argv[1]))

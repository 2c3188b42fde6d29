"""How the total of a grader's text is read, strictly and as published, and what a total is worth to the grader.

The published rule takes what stands after the last `Total Score`, deletes a few signs and hands the rest to `float`: so NaN
reads as full marks, a negative total pays without bound, and a denominator is ignored. Ours reads the last line that is not
empty or nothing: a number with an optional denominator, within its range. Facts and golden cases:
tests/golden/score_parser.json.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

SCALE = 10.0
LONGEST = 200  # characters of a line that is read
MARK = re.compile(r"total[ \t\xa0]+score", re.IGNORECASE)
_NUMBER = r"[+-]?[0-9]{1,9}(?:\.[0-9]{1,6})?"
_LINE = re.compile(
    rf"total +score *(?:\( *out +of +(?P<before>{_NUMBER}) *\))? *[:=]? *(?P<said>{_NUMBER})(?P<point>\.(?= *$))?"
    rf" *(?:(?:/|out +of) *(?P<after>{_NUMBER}))? *(?:points?)?\.?",
    re.IGNORECASE,
)
_BLANKS = re.compile(r"[ \t\xa0]+")
_DECORATION = re.compile(r"\\boxed *\{|[*_`|\[\]$}]")


class Reading(StrEnum):
    """What became of a text."""

    OK = "ok"
    MISSING = "missing"  # no line speaks of a total
    MALFORMED = "malformed"  # one does, but it is not plainly the last word
    OUT_OF_RANGE = "out_of_range"
    TRUNCATED = "truncated"  # the engine cut the text: what stands there may go on


@dataclass(frozen=True)
class Total:
    """`score` in [0, 1], exactly when the reading is ok."""

    reading: Reading
    score: float | None = None

    def __post_init__(self) -> None:
        assert (self.score is not None) == (self.reading is Reading.OK), f"score {self.score} with {self.reading}"
        assert self.score is None or 0 <= self.score <= 1, f"score {self.score} outside [0, 1]"


def strict_total(text: str, finished: bool = True, scale: float | None = None) -> Total:
    """The total of the last line that is not empty. `scale`: the only denominator that counts; None: any, 10 where none is."""
    if not finished:
        return Total(Reading.TRUNCATED)
    lines = [line for line in text.split("\n") if line.strip()]
    marked = any(MARK.search(line[:LONGEST]) for line in lines)
    last = lines[-1].strip() if lines else ""
    if not marked:
        return Total(Reading.MISSING)
    plain = _BLANKS.sub(" ", _DECORATION.sub(" ", last)).strip()  # single blanks: _LINE has few ways to read them
    match = _LINE.fullmatch(plain) if len(last) <= LONGEST else None
    if match is None:
        return Total(Reading.MALFORMED)
    named = {float(of) for of in (match["before"], match["after"]) if of is not None}
    if len(named) > 1 or (scale is not None and named - {scale}):
        return Total(Reading.MALFORMED)
    said, of = float(match["said"]), named.pop() if named else scale or SCALE
    if of <= 0 or not 0 <= said <= of:
        return Total(Reading.OUT_OF_RANGE)
    return Total(Reading.OK, abs(said / of))


def legacy_score(text: str) -> float | None:
    """The published reading, with its holes: in (−∞, 1], a negative infinity included; None where it raises."""
    said = text.rpartition("Total Score")[2]
    for gone in (":", "[", "points", "point", "*", "|", "'"):
        said = said.replace(gone, "")
    try:
        return min(SCALE, float(said.partition("/")[0].strip())) / SCALE
    except ValueError:
        return None


def grade_reward(total: Total, target: float, failure: float = 0.0) -> float:
    """(1 − |s − t|)² of a grader's total s and the teacher's score t, in [0, 1]; `failure` where there is no s.

    Raises ValueError for a target outside [0, 1]: 7 in place of .7 was paid 28 by the published code.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"a teacher's score is in [0, 1], found {target}")
    return failure if total.score is None else (1 - abs(total.score - target)) ** 2


def best_constant(targets: Sequence[float]) -> tuple[float, float]:
    """The constant total that is paid most (the least of several) and its mean reward: what a grader has to beat.

    Exact: between two neighbouring targets the mean is a sum of convex functions, so no value there is paid more than both ends.
    Raises ValueError for targets outside [0, 1], or none.
    """
    values, counts = np.unique(np.asarray(targets, dtype=np.float64), return_counts=True)
    if not values.size or not (values[0] >= 0 and values[-1] <= 1):  # NaN is sorted to the end
        raise ValueError(f"teachers' scores are in [0, 1], found {values[:1]} to {values[-1:]}")
    paid = [float(counts @ (1 - np.abs(value - values)) ** 2 / counts.sum()) for value in values]
    best = int(np.argmax(paid))
    return float(values[best]), paid[best]

"""What a grader is given and what it gives: a score in [0, 1], or the reason why there is none.

A grader looks at finished responses only and in batches. "No score" is never turned into "wrong": a grader that ran out
of time, crashed or could not be understood says so in the status, and later stages decide what that means. A response
in which a rule finds no answer at all *is* wrong: that is a fact about the response, not about the grader.

Two graders combine in one way (`decide`): the rule goes first, and what it calls right (score 1) stands. Whatever else
it says (wrong, timeout, error) may be its own blindness, so the judge is asked if there is one, and the judge's grade
stands, also when it has no score: an answer that neither could read is not called wrong.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

from ziprc.tables.grades import GradeStatus

RATIONALE_CHARACTERS = 500
RIGHT = 0.5  # the least score of an answer that counts as right
QUIET_S = 5.0  # shorter work shows no progress bar


@dataclass(frozen=True)
class Item:
    """One finished response and what it is compared with. `extra` is what the task knows about the prompt.

    `source` is where the prompt is from: for rules that differ by it.
    """

    messages: tuple[Mapping[str, str], ...]
    response: str
    answer: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def of(cls, prompt: Mapping[str, Any], response: str) -> Self:
        """A response to a row of the table of prompts."""
        extra = json.loads(prompt["extra"])
        return cls(tuple(prompt["messages"]), response, prompt["answer"], extra, prompt.get("source", ""))


@dataclass(frozen=True)
class Grade:
    """`score` is None exactly when `status` is not `graded`; `parts` is JSON text, points by criterion."""

    score: float | None
    status: GradeStatus
    extracted_answer: str | None = None
    rationale: str | None = None
    parts: str | None = None

    def __post_init__(self) -> None:
        assert (self.score is None) == (self.status != GradeStatus.GRADED), f"score {self.score} with {self.status}"
        assert self.score is None or 0 <= self.score <= 1, f"score {self.score} outside [0, 1]"


class Grader(Protocol):
    """Anything that tells right answers from wrong ones."""

    name: str

    def lacks(self, item: Item) -> str | None:
        """What the prompt would need for this grader and does not have; None when it has everything."""

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """One grade per item, in order; a grade depends on its item alone."""


def graded(
    score: float, extracted_answer: str | None = None, rationale: str | None = None, parts: str | None = None
) -> Grade:
    """A grade with a score."""
    return Grade(float(score), GradeStatus.GRADED, extracted_answer, rationale, parts)


def ungraded(status: GradeStatus, rationale: str | None = None) -> Grade:
    """A grade without a score, and why."""
    return Grade(None, status, None, rationale[:RATIONALE_CHARACTERS] if rationale else None)


def lacks_answer(item: Item) -> str | None:
    """The usual need of a grader: a reference answer."""
    return None if item.answer and item.answer.strip() else "a reference answer"


@dataclass(frozen=True)
class Verdict:
    """A grade and the name of the grader that gave it."""

    grader: str
    grade: Grade


Key = TypeVar("Key", bound=Hashable)


def decide(items: Mapping[Key, Item], rule: Grader | None, judge: Grader | None) -> dict[Key, Verdict]:
    """The rule first; the judge for everything that the rule does not call right."""
    verdicts = _ask(items, rule) if rule else {}
    if judge:
        settled = {key for key, verdict in verdicts.items() if verdict.grade.score == 1}
        verdicts |= _ask({key: item for key, item in items.items() if key not in settled}, judge)
    return verdicts


def _ask(items: Mapping[Key, Item], grader: Grader) -> dict[Key, Verdict]:
    grades = grader.grade(list(items.values()))
    return {key: Verdict(grader.name, grade) for key, grade in zip(items, grades, strict=True)}

"""A grader's own reward: how near the total that it wrote is to the teacher's, (1 − |s − t|)², in [0, 1].

So a grader that is torn between full marks and none does better with either than with the middle, and large errors have no
gradient (Yuan et al., https://arxiv.org/abs/2510.07774; the published reward has no upper bound, see totals.py). A total that
cannot be read is a fact about the grader, and worth 0; one that may have been cut counts as unreadable.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Grader, Item, graded
from ziprc.rewards.totals import grade_reward, strict_total


class GradeGrader:
    """Compares the total of a response with the reference, a score in [0, 1] as text."""

    name = "grade"

    def lacks(self, item: Item) -> str | None:
        return None if target_of(item.answer) is not None else "a teacher's score in [0, 1]"

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        return [self._grade(item) for item in items]

    def _grade(self, item: Item) -> Grade:
        target = target_of(item.answer)
        assert target is not None, "checked by lacks()"
        total = strict_total(visible_answer(item.response), True, 10)
        said = None if total.score is None else f"{total.score:g}"
        return graded(
            grade_reward(total, target), said, None if total.score is not None else f"{total.reading}: no total"
        )


def target_of(answer: str | None) -> float | None:
    """The teacher's score; None for what is not a number in [0, 1] (7 instead of .7, say)."""
    try:
        found = float(answer or "")
    except ValueError:
        return None
    return found if 0 <= found <= 1 else None


def grader(config: Config) -> AbstractContextManager[Grader]:
    return nullcontext(GradeGrader())

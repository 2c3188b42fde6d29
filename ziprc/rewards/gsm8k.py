"""Grade-school problems whose answers end in `#### 18`: the first such number, compared as text.

As published (the strict rule of veRL's scorer): digits, commas, points and a minus, of which commas and dollars are dropped.
`18.0` is not `18`, and an answer without the mark is wrong. Only here commas, dollars and white space of the reference are
dropped too; published references have none left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Grader, Item, graded, lacks_answer

MARKED = re.compile(r"#### (-?[0-9.,]+)")
_DROPPED = re.compile(r"[,$\s]")


def marked_number(text: str) -> str | None:
    """The first marked number, without commas; None where there is no mark."""
    match = MARKED.search(text)
    return _DROPPED.sub("", match[1]) if match else None


class Gsm8kGrader:
    """Right when the marked number is the reference, digit by digit."""

    name = "gsm8k"

    def lacks(self, item: Item) -> str | None:
        return lacks_answer(item)

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        return [self._grade(item) for item in items]

    def _grade(self, item: Item) -> Grade:
        found = marked_number(visible_answer(item.response))
        if found is None:
            return graded(0, rationale="no '#### number'")
        return graded(found == _DROPPED.sub("", item.answer or ""), found)


def grader(config: Config) -> AbstractContextManager[Grader]:
    return nullcontext(Gsm8kGrader())

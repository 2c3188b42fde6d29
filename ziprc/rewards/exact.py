"""Exact match of the visible answer, for tasks whose answer is an integer or a fixed word.

When the reference is an integer, the whole visible answer has to be one: `The answer is 12` is wrong, `+012` is 12.
Integers are compared as canonical digit strings, so that their size does not matter. Any other reference is compared as
text, after Unicode normalisation, case folding and collapsing of white space.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Grader, Item, graded, lacks_answer

_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")


def canonical_integer(text: str) -> str | None:
    """`-0012` → `-12`, `+0` → `0`; None when the text is anything but an integer."""
    match = _INTEGER.fullmatch(text.strip())
    if not match:
        return None
    sign, digits = match.groups()
    return f"-{digits}" if sign == "-" and digits != "0" else digits


def canonical_text(text: str) -> str:
    """The form in which texts that read the same are equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class ExactGrader:
    """Right when the visible answer is the reference, in canonical form."""

    name = "exact"

    def lacks(self, item: Item) -> str | None:
        return lacks_answer(item)

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        return [self._grade(item) for item in items]

    def _grade(self, item: Item) -> Grade:
        assert item.answer is not None, "checked by lacks()"
        canonical = canonical_text if canonical_integer(item.answer) is None else canonical_integer
        found = canonical(visible_answer(item.response))
        return graded(found is not None and found == canonical(item.answer), found)


def grader(config: Config) -> AbstractContextManager[Grader]:
    return nullcontext(ExactGrader())

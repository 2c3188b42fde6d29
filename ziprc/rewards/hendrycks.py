r"""Competition mathematics: what stands in the last box, compared as text once both are written in one way.

The rule of the data set MATH (Hendrycks et al. 2021, https://arxiv.org/abs/2103.03874): no algebra, so `0.25` is not
`\frac{1}{4}` and `2+x` is not `x+2`. Not as published: what that code raises on, and then calls wrong (`\fbox`, two units), is
read; and a second solution, `1 \text{ or } 2`, is no unit that can be dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Grader, Item, graded, lacks_answer
from ziprc.rewards.children import EXTRACTED_CHARACTERS

_WRITINGS = [  # in this order; what is left of an answer is compared
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),
    (r"\\[td]frac", r"\\frac"),
    (r"\\(?:left|right)(?![a-z])", ""),
    (r"\^(?:\{\\circ\}|\\circ)", ""),
    (r"\\\$", ""),
    (r"\\text\{ (?!or |and ).*", ""),  # a unit
    (r"\\?%", ""),
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."),
    (r"^[^=]{0,2}=([^=]*)$", r"\1"),  # x=5, and no longer left side
    (r" ", ""),
    (r"\\sqrt([^{\[\\])", r"\\sqrt{\1}"),
    (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{\\])\{", r"\\frac{\1}{"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
]
WRITINGS = [(re.compile(pattern), replacement) for pattern, replacement in _WRITINGS]


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}`, or after a last `\boxed ` up to a dollar or the line's end; else in an `\fbox`.

    None where there is none, or its brace is not closed.
    """
    for word in ("\\boxed", "\\fbox"):
        if (start := text.rfind(word)) >= 0:
            break
    else:
        return None
    after = text[start + len(word) :]
    inside = after.lstrip(" ")
    if not inside.startswith("{"):
        return re.split(r"[$\n]", inside, maxsplit=1)[0].strip() if after.startswith(" ") else None
    depth = 0
    for brace in re.finditer(r"[{}]", inside):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return inside[1 : brace.start()]
    return None


def written(answer: str) -> str:
    """The one writing of an answer."""
    answer = answer.strip()
    for pattern, replacement in WRITINGS:
        answer = pattern.sub(replacement, answer).strip()
    return answer


class HendrycksGrader:
    """Right when the last box is written as the reference is; the reference may be a whole solution with a box."""

    name = "hendrycks"

    def lacks(self, item: Item) -> str | None:
        return lacks_answer(item)

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        return [self._grade(item) for item in items]

    def _grade(self, item: Item) -> Grade:
        assert item.answer is not None, "checked by lacks()"
        found = last_box(visible_answer(item.response))
        if found is None:
            return graded(0, rationale="no box")
        return graded(written(found) == written(last_box(item.answer) or item.answer), found[:EXTRACTED_CHARACTERS])


def grader(config: Config) -> AbstractContextManager[Grader]:
    return nullcontext(HendrycksGrader())

"""Countdown: the visible answer has to be an arithmetic expression that uses the given numbers and makes the target.

The expression is read by a grammar (`ziprc.tasks.expressions`) and valued in exact fractions; nothing is evaluated by
Python. Right means: the operands are exactly the given numbers, each used as often as it is given, and the value equals
the target. Published rewards accept subsets, floats and `eval`; none of that here. A rationale begins with one of
`no expression`, `wrong numbers`, `divides by zero`, `wrong value`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Grader, Item, graded
from ziprc.tasks.expressions import ExpressionError, parse_expression


class CountdownGrader:
    """Right when the expression uses every number once and has the value of the target."""

    name = "countdown"

    def lacks(self, item: Item) -> str | None:
        missing = [key for key in ("numbers", "target") if key not in item.extra]
        return f"{' and '.join(missing)} in the column 'extra'" if missing else None

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        return [self._grade(item) for item in items]

    def _grade(self, item: Item) -> Grade:
        numbers, target = item.extra["numbers"], item.extra["target"]
        try:
            expression = parse_expression(visible_answer(item.response))
        except ExpressionError as error:
            return graded(0, rationale=f"no expression: {error}")
        found = expression.canonical()
        if Counter(expression.numbers()) != Counter(int(n) for n in numbers):
            return graded(0, found, f"wrong numbers: uses {sorted(expression.numbers())}, given {sorted(numbers)}")
        try:
            value = expression.value()
        except ZeroDivisionError:
            return graded(0, found, "divides by zero")
        if value != Fraction(target):
            return graded(0, found, f"wrong value: makes {value}, not {target}")
        return graded(1, found)


def grader(config: Config) -> AbstractContextManager[Grader]:
    return nullcontext(CountdownGrader())

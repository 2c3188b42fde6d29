"""Countdown: the answer has to be an arithmetic expression that uses the given numbers and makes the target.

The expression is read by a grammar (`ziprc.tasks.expressions`) and valued in exact fractions; nothing is evaluated by
Python. Right means: the operands are exactly the given numbers, each used as often as it is given, and the value equals
the target. A rationale begins with one of `no expression`, `wrong numbers`, `divides by zero`, `wrong value`.

How an answer is written is a matter of `grades.style`:

* `strict`: the visible answer is the expression. For worlds whose traces we write.
* `field`: as models write it: the last `<answer>` block, box or code, else the last expression of the text; ×, ÷, −, LaTeX,
  and `= 13` after it.
* `legacy`: as TinyZero's reward reads it, for comparison with published numbers: the last `<answer>` of the last line, all
  its digits are the numbers, and whatever Python's arithmetic makes of it, so that powers, floor division, decimals and a sign
  before a number count. It is read as a syntax tree with limits: `9**9**9` stopped the published reward's worker.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Grader, Item, graded
from ziprc.tasks.expressions import ExpressionError, parse_expression

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BLOCKS = (
    _ANSWER,
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"```\w*\n(.*?)```", re.DOTALL),
    re.compile(r"`([^`\n]+)`"),
)
_WRITTEN = {
    "×": "*", "·": "*", "∗": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", r"\times": "*", r"\cdot": "*", r"\div": "/", "[": "(",
    "]": ")", r"\left": "", r"\right": "", "$": "", r"\(": "", r"\)": "",
}  # fmt: skip
_RUN = re.compile(r"(?<![\d+\-*/(.])[(\s]*\d[\d\s+\-*/()]*")  # what may be an expression in a text
_BOLD = re.compile(r"(?<![\d)])\*\*(.+?)\*\*(?![\d(])")  # and no power
_EQUALS = re.compile(r"=\s*-?\d[\d.,/ ]*\s*$")

_LEGACY_LINE = re.compile(r"<answer>(.*?)</answer>")
_LEGACY_SIGNS = re.compile(r"[\d+\-*/().\s]+")
LEGACY_NEAR = 1e-5
LARGEST = 10**12  # of a value on the way, and of a power
_PYTHON: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip


def field_expression(text: str) -> str:
    """The expression of an answer as models write it; whatever is left of the text where there is none."""
    for pattern in _BLOCKS:
        if found := pattern.findall(text):
            text = found[-1]
            break
    for written, ours in _WRITTEN.items():
        text = text.replace(written, ours)
    text = _BOLD.sub(r"\1", text).strip().rstrip(".").strip()
    whole = _EQUALS.sub("", text).strip()
    if _parses(whole) or not re.search("[a-zA-Z]", whole):  # what is no sentence is the expression, or wrong
        return whole
    runs = [_EQUALS.sub("", run).strip() for line in text.splitlines() for run in _RUN.findall(line)]
    expressions = [run for run in runs if re.search(r"\d\s*[-+*/]", run) and _parses(run)]
    return expressions[-1] if expressions else whole


def _parses(text: str) -> bool:
    try:
        parse_expression(text)
    except ExpressionError:
        return False
    return True


class CountdownGrader:
    """Right when the expression uses every number once and has the value of the target."""

    name = "countdown"

    def __init__(self, style: str = "strict") -> None:
        self.style = style

    def lacks(self, item: Item) -> str | None:
        missing = [key for key in ("numbers", "target") if key not in item.extra]
        return f"{' and '.join(missing)} in the column 'extra'" if missing else None

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        return [legacy(item) if self.style == "legacy" else self._grade(item) for item in items]

    def _grade(self, item: Item) -> Grade:
        numbers, target, answer = item.extra["numbers"], item.extra["target"], visible_answer(item.response)
        try:
            expression = parse_expression(field_expression(answer) if self.style == "field" else answer)
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


def legacy(item: Item) -> Grade:
    """As the published reward, whose worker nothing can stop here; what only has the format gets 0, as in the fork."""
    answers = _LEGACY_LINE.findall(item.response.rpartition("\n")[2])
    if not answers:
        return graded(0, rationale="no expression: the last line has no <answer>")
    text = answers[-1].strip()
    if sorted(map(int, re.findall(r"\d+", text))) != sorted(int(n) for n in item.extra["numbers"]):
        return graded(0, text, f"wrong numbers: given {sorted(item.extra['numbers'])}")
    try:
        if not _LEGACY_SIGNS.fullmatch(text):
            raise ValueError("other signs than digits, + - * / ( ) and the point")
        value = _worth(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        return graded(0, text, f"no expression: {error}")
    right = abs(value - item.extra["target"]) < LEGACY_NEAR
    return graded(right, text, None if right else f"wrong value: makes {value}, not {item.extra['target']}")


def _worth(node: ast.expr) -> float:
    """What Python would make of it; ValueError for what is no arithmetic, or too large to be an answer."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and abs(node.value) <= LARGEST:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_worth(node.operand) if isinstance(node.op, ast.USub) else _worth(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _PYTHON:
        left, right = _worth(node.left), _worth(node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 40 or abs(left) > 10**6):
            raise ValueError("a power that is too large to be an answer")
        value = _PYTHON[type(node.op)](left, right)
        if isinstance(value, int | float) and abs(value) <= LARGEST:
            return value
        raise ValueError("a value that is too large, or no number")
    raise ValueError("no arithmetic")


def grader(config: Config) -> AbstractContextManager[Grader]:
    """The grader of the style that the experiment names."""
    return nullcontext(CountdownGrader(config.grades.style))

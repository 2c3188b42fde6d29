"""The default world: chains of additions and subtractions, worked out in one of three styles.

`Compute 47+8-12` asks for the value of a left-to-right chain; a cell of the difficulty mix is a number of steps and a
size of the operands ("3 steps, big"). A response chooses a style at its first result and keeps it:

* direct   `47+8=55-12=43`            short; copies each operand and writes the result at once
* split    `47+8>50+5=55-12>45-2=43`  peels the operand off digit by digit, or through the ten
* columns  `47+8=7+8=15,4+1=5=55-12=...`  longest; digit by digit, ones first, with written carries

The teacher slips, in the text and unmarked: *direct* swaps the first two digits of an operand that it copies (`55-21`),
*split* ends on a digit that is not the rest (`50+8`), *columns* leaves out a carry that is due (`7+8=15,4=4`). Rates
depend on style and size, so that no style is best everywhere and there are easy prompts, hopeless ones and, in between,
those where the style decides. So success is partly known from the prompt, partly from the style chosen after a few
tokens, and partly from slips on the way. A slip is one alternative at one token, at a rate that min-p 0.1 keeps.

Split by the multiset of signed terms: `47+39-6`, `39+47-6` and `47-6+39` are one problem.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from ziprc.config.base import Unit
from ziprc.tasks.base import Trace, integer_answer, thinking_response
from ziprc.tasks.generated import GeneratedTask, MixSettings, Weight

DIGITS = {"small": 1, "medium": 2, "big": 3}
LARGEST = 999  # of every intermediate value

Style = Literal["direct", "split", "columns"]
Size = Literal["small", "medium", "big"]
Rate = Annotated[float, Field(ge=0, lt=1)]

MIX = {
    "2 steps, small": 0.16, "3 steps, small": 0.14, "4 steps, small": 0.08, "2 steps, medium": 0.18,
    "3 steps, medium": 0.18, "2 steps, big": 0.08, "3 steps, big": 0.10, "4 steps, big": 0.08,
}  # fmt: skip
SLIPS: dict[Style, dict[Size, float]] = {
    "direct": {"small": 0.0, "medium": 0.50, "big": 0.70},
    "split": {"small": 0.10, "medium": 0.0, "big": 0.70},
    "columns": {"small": 0.10, "medium": 0.70, "big": 0.35},
}

CELL = r"^([1-9]) steps?, (small|medium|big)$"  # of the mix, e.g. "3 steps, big"


@dataclass(frozen=True)
class Chain:
    """A start value and signed operands, worked out from left to right."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        return str(self.start) + "".join(f"{op}{operand}" for op, operand in self.steps)

    @property
    def value(self) -> int:
        return reduce(lambda value, step: apply(value, *step), self.steps, self.start)

    @property
    def canonical(self) -> str:
        return "sum " + " ".join(map(str, sorted([self.start, *(apply(0, *step) for step in self.steps)])))


def apply(value: int, op: str, operand: int) -> int:
    return value + operand if op == "+" else value - operand


def parse_cell(cell: str) -> tuple[int, str]:
    """(steps, size) of a cell label."""
    match = re.match(CELL, cell)
    assert match, f"'{cell}' is no cell"
    return int(match[1]), match[2]


class Settings(MixSettings):
    """`prompts.settings` of this task; the defaults are those of `toy`."""

    mix: dict[Annotated[str, Field(pattern=CELL)], Weight] = Field(
        MIX, description="share of the prompts by cell, '3 steps, big'; small, medium, big operands have 1, 2, 3 digits"
    )
    styles: dict[Style, Weight] = Field(
        {"direct": 0.40, "split": 0.34, "columns": 0.26},
        description="share of the thinking traces by style, drawn without looking at the prompt",
    )
    slips: dict[Style, dict[Size, Rate]] = Field(
        SLIPS, description="the teacher's rate of slips per opportunity, by style and size of the operands"
    )
    non_thinking: Unit = Field(0.07, description="share of the traces that answer at once")

    @field_validator("slips", mode="before")
    @classmethod
    def _over_the_defaults(cls, slips: Any) -> Any:
        if not isinstance(slips, Mapping) or not all(isinstance(rates, Mapping) for rates in slips.values()):
            return slips
        return {style: {**SLIPS.get(style, {}), **slips.get(style, {})} for style in {**SLIPS, **slips}}


# A step writes one operation in a style: (value, op, operand, slips) -> (text from the operator on, result).
Slips = Callable[[], bool]  # decides whether the teacher slips at this opportunity


def direct_step(value: int, op: str, operand: int, slips: Slips) -> tuple[str, int]:
    """`+47=...`; slip: the first two digits of the operand swapped in copying."""
    digits = str(operand)
    swapped = digits[1::-1] + digits[2:] if len(digits) > 1 else digits
    if digits[-1] != "0" and swapped != digits and 0 <= apply(value, op, int(swapped)) <= LARGEST and slips():
        operand = int(swapped)
    result = apply(value, op, operand)
    return f"{op}{operand}={result}", result


def peelings(value: int, op: str, operand: int) -> list[tuple[int, int]]:
    """(value, rest) after each peel: leading digits one by one, or a one-digit operand through the ten."""
    if operand < 10:
        to_ten = (10 - value % 10) % 10 if op == "+" else value % 10
        return [(apply(value, op, to_ten), operand - to_ten)] if 0 < to_ten < operand else []
    peeled = []
    while len(str(operand).rstrip("0")) > 1:
        lead = 10 ** (len(str(operand)) - 1)
        head = operand // lead * lead
        value, operand = apply(value, op, head), operand - head
        peeled.append((value, operand))
    return peeled


def split_step(value: int, op: str, operand: int, slips: Slips) -> tuple[str, int]:
    """`+286>547+86>627+6=633`; slip: the last rest is replaced by the digit that stood before it (`627+8`)."""
    text, before = f"{op}{operand}", operand
    parts = peelings(value, op, operand)
    for index, (value, operand) in enumerate(parts):
        wrong = before if before < 10 else int(str(before)[0])
        if index == len(parts) - 1 and wrong != operand < 10 and apply(value, op, wrong) >= 0 and slips():
            operand = wrong
        text, before = f"{text}>{value}{op}{operand}", operand
    result = apply(value, op, operand)
    return f"{text}={result}", result


def columns_step(value: int, op: str, operand: int, slips: Slips) -> tuple[str, int]:
    """`+286=7+6=13,4+8+1=13,3+2+1=6=633`; slip: a carry or borrow that is due is left out."""
    width = max(len(str(value)), len(str(operand)))
    tops, bottoms = str(value).zfill(width), str(operand).zfill(width)
    columns, digits, carry = [], "", 0
    for place in reversed(range(width)):
        top, bottom = int(tops[place]), int(bottoms[place])
        carry = 0 if carry and slips() else carry
        last = place == 0
        borrow = int(op == "-" and not last and top - bottom - carry < 0)
        absent = place < width - len(str(operand))  # the operand has no digit in this column
        terms = [str(top + 10 * borrow)] + ([] if absent else [str(bottom)]) + (["1"] if carry else [])
        total = apply(top + 10 * borrow, op, bottom + carry)
        columns.append(f"{op.join(terms)}={total}")
        digits = (str(total) if last else str(total % 10)) + digits
        carry = borrow if op == "-" else total // 10
    result = int(digits)
    return f"{op}{operand}={','.join(columns)}={result}", result


STEPS = {"direct": direct_step, "split": split_step, "columns": columns_step}


def work_out(chain: Chain, style: str, slips: Slips) -> tuple[str, int] | None:
    """The reasoning of a chain in one style, and the result it ends on; None when slips lead out of 0..LARGEST."""
    text, value = str(chain.start), chain.start
    for op, operand in chain.steps:
        if not 0 <= apply(value, op, operand) <= LARGEST:
            return None
        part, value = STEPS[style](value, op, operand, slips)
        text += part
    return text, value


class Arithmetic(GeneratedTask[Chain, Settings]):
    """Chains of additions and subtractions; see the head of the module."""

    name = "arithmetic"
    shares: ClassVar = {"base": 0.70, "train": 0.16, "validation": 0.05, "test": 0.09}
    settings = Settings
    styles = get_args(Style)

    def draw(self, rng: random.Random, cell: str, settings: Settings) -> Chain:
        """A chain of the cell whose intermediate values stay within 0..LARGEST."""
        steps, size = parse_cell(cell)
        low, high = 10 ** (DIGITS[size] - 1), 10 ** DIGITS[size] - 1
        start = value = rng.randint(max(low, 10), max(high, 99))
        operations: list[tuple[str, int]] = []
        while len(operations) < steps:
            op, operand = rng.choice("+-"), rng.randint(low, high)
            if 0 <= apply(value, op, operand) <= LARGEST:
                value = apply(value, op, operand)
                operations.append((op, operand))
        return Chain(start, tuple(operations))

    def teach(self, rng: random.Random, problem: Chain, cell: str, settings: Settings) -> Trace:
        if rng.random() < settings.non_thinking:
            return Trace(str(problem.value), thinking=False, style="answer")
        style = rng.choices(list(settings.styles), list(settings.styles.values()))[0]
        rate = settings.slips[style][parse_cell(cell)[1]]
        while (work := work_out(problem, style, lambda: rng.random() < rate)) is None:
            pass  # the teacher starts over
        return Trace(thinking_response(*work), thinking=True, style=style)

    def ask(self, problem: Chain, cell: str) -> tuple[str, str, dict[str, Any]]:
        steps, size = parse_cell(cell)
        return f"Compute {problem.text}", str(problem.value), {"steps": steps, "size": size}

    def canonical_answer(self, response: str) -> str | None:
        """The integer after the thinking block, without leading zeros; None when there is anything else."""
        return integer_answer(response)

    def vocabulary_corpus(self) -> list[str]:
        """Chat and prompt words only: merges of operators would hide where a step ends."""
        return ["user\n", "assistant\n", "\n\n", "Compute ", "system\n"] * 8

    def style_of(self, response: str) -> str | None:
        """Style by its separators. A split response with nothing to split reads as direct."""
        reasoning, closed, _ = response.partition("</think>")
        if not closed or "=" not in reasoning:
            return None
        reasoning = reasoning.replace("<think>", "")
        return "columns" if "," in reasoning else "split" if ">" in reasoning else "direct"


TASK = Arithmetic()

"""Is the work behind an answer sound? One program that is checker, verifier and teacher of the world of worked sums.

Work is read as it is written, `9-5=4+4=8-2=6`: a step is an operation and the result that is claimed for it. A step is met when
it is the problem's own operation and its result follows from the value *written before it*, so that a slip is not punished
twice. The answer is met when it is the reference and, where there is work, the last result of that work, with nothing left over.
Work is sound when every item is met; sound work is right. The rubric of a prompt is its derivation, item by item, and the
assessment of a response says item by item what follows, what was found, and the points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ziprc.chat import visible_answer
from ziprc.tasks.arithmetic import apply
from ziprc.tasks.base import Assessment, Criterion

TOTAL, ANSWER_POINTS = 10, 2
BLUFFED = 5  # how far off an intermediate value of a bluff is, modulo 10
ANSWER = "a"  # the item of the answer; the others are numbered from 1
NOTHING, FOREIGN = "-", "x"  # found: no such step; another operation than the problem's

_START = re.compile(r"-?\d{1,3}")
_STEP = re.compile(r"([+-])(\d{1,3})=(-?\d{1,3})")


@dataclass(frozen=True)
class Written:
    """One step as it is written: operation, claimed result, and where its text begins and ends in the response."""

    op: str
    operand: int
    result: int
    span: tuple[int, int]


@dataclass(frozen=True)
class Work:
    """The work of a response; `start` None where there is none that can be read. `rest`: what follows the last step."""

    start: int | None
    steps: tuple[Written, ...]
    rest: str


def read_work(response: str) -> Work:
    """What stands in the closed thinking block, read from its start as far as it is work."""
    inside, closed, _ = response.partition("</think>")
    opened = inside.find("<think>")
    begin = opened + len("<think>") if opened >= 0 else 0
    while begin < len(inside) and inside[begin].isspace():
        begin += 1
    first = _START.match(inside, begin) if closed else None
    if first is None:
        return Work(None, (), "" if not closed else inside[begin:].strip())
    steps, at = [], first.end()
    while found := _STEP.match(inside, at):
        steps.append(Written(found[1], int(found[2]), int(found[3]), found.span()))
        at = found.end()
    return Work(int(first[0]), tuple(steps), inside[at:].strip())


def points_of(steps: int) -> list[int]:
    """Whole points of the steps, the larger ones first, and of the answer: together TOTAL."""
    whole, more = divmod(TOTAL - ANSWER_POINTS, steps)
    return [whole + (i < more) for i in range(steps)] + [ANSWER_POINTS]


def criteria(start: int, steps: Sequence[tuple[str, int]]) -> list[Criterion]:
    """The rubric: the derivation of `start` and signed operands, a step an item, and the answer."""
    points, value, found = points_of(len(steps)), start, []
    for number, (op, operand) in enumerate(steps):
        after = apply(value, op, operand)
        found.append(Criterion(str(number + 1), points[number], f"{value}{op}{operand}={after}"))
        value = after
    return [*found, Criterion(ANSWER, points[-1], str(value))]


def assess(start: int, steps: Sequence[tuple[str, int]], response: str) -> Assessment:
    """What of the rubric a response meets, in the teacher's words."""
    work, points = read_work(response), points_of(len(steps))
    met: dict[str, bool] = {}
    lines, spans, value = [], {}, work.start if work.start is not None else start
    right_start = work.start in (None, start)
    for number, (op, operand) in enumerate(steps):
        name = str(number + 1)
        if number >= len(work.steps):
            met[name] = False
            lines.append(f"{name} {NOTHING} {NOTHING} bad 0")
            continue
        own, expected = work.steps[number], apply(value, op, operand)
        foreign = (own.op, own.operand) != (op, operand) or (number == 0 and not right_start)
        met[name] = not foreign and own.result == expected
        spans[name] = own.span
        value = own.result
        shown = FOREIGN if foreign else str(own.result)
        lines.append(f"{name} {expected} {shown} {_verdict(met[name], points[number])}")
    reference = start
    for op, operand in steps:
        reference = apply(reference, op, operand)
    said = visible_answer(response)
    last = str(work.steps[-1].result) if work.steps else None
    left_over = len(work.steps) > len(steps) or bool(work.rest)
    right = said == str(reference)
    met[ANSWER] = right and last in (None, said) and not left_over
    found = said if re.fullmatch(r"-?\d{1,3}", said) else FOREIGN
    lines.append(f"{ANSWER} {reference} {found} {_verdict(met[ANSWER], points[-1])}")
    names = [*map(str, range(1, len(steps) + 1)), ANSWER]
    total = sum(p for p, name in zip(points, names, strict=True) if met[name])
    lines.append(f"Total Score: {total}/{TOTAL} points")
    worth = {name: p if met[name] else 0 for p, name in zip(points, names, strict=True)}
    return Assessment(total / TOTAL, worth, "\n".join(lines), kind_of(work, start, steps), spans)


def _verdict(met: bool, points: int) -> str:
    return f"ok {points}" if met else "bad 0"


def kind_of(work: Work, start: int, steps: Sequence[tuple[str, int]]) -> str:
    """How a response goes about it, right or wrong: `skip` where steps lack, `bluff` where the first is as far off as a bluff's,
    `answer` where there is no work, else `worked`."""
    if work.start is None or not work.steps:
        return "answer"
    if len(work.steps) < len(steps):
        return "skip"
    return "bluff" if (work.steps[0].result - apply(start, *steps[0])) % 10 == BLUFFED else "worked"


def solution(start: int, steps: Sequence[tuple[str, int]]) -> str:
    """The reference derivation as a response's work."""
    text, value = str(start), start
    for op, operand in steps:
        value = apply(value, op, operand)
        text += f"{op}{operand}={value}"
    return text


def chain_of(extra: Mapping[str, Any]) -> tuple[int, list[tuple[str, int]]]:
    """Start and signed operands from a prompt's `extra`."""
    return int(extra["start"]), [(str(op), int(operand)) for op, operand in extra["chain"]]

"""Countdown: make a target from given numbers, each used once. A demonstration, because its traces judge themselves.

The teacher's traces search: left-to-right chains, each ended by `<` or `>` (below or above the target) or `!` (hit),

    Make 13 from 5,3,2      <think>\\n5-3=2-2=0<5*3=15-2=13!\\n</think>\\n\\n(5*3)-2

random attempts without replacement, the last operation looking one step ahead; a trace stops at a hit or after a hidden
number of attempts and then answers with its last attempt. The teacher may miss on purpose, and may ramble on after it has
run out of patience: what reinforcement learning then has to unlearn, and a window has to cut. So `!` in the text is a
verdict as good as any trained value (`specs/countdown_world.md` section 4): every result on this task has to show the `!`
rules beside it.

Split by the multiset of numbers and the target.

Of every prompt is known how many expressions make the target (`n_solutions`, up to algebra; null for five numbers) and
whether one with + and - alone does not (`needs_muldiv`), the best split by hardness that is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ziprc.chat import visible_answer
from ziprc.config.base import Unit
from ziprc.errors import UserError
from ziprc.tasks.base import Trace, thinking_response
from ziprc.tasks.expressions import parse_expression
from ziprc.tasks.generated import GeneratedTask, MixSettings, Weight

DRAWS = 1000  # of a chain that is to hit or to miss
PRIME = 2**61 - 1
COUNTED = 4  # numbers, at most, whose solutions are counted: of five they take a second


class Settings(MixSettings):
    """`prompts.settings` of this task."""

    mix: dict[Annotated[str, Field(pattern=r"^([2-5]) numbers$")], Weight] = Field(
        {"3 numbers": 0.3, "4 numbers": 0.5, "5 numbers": 0.2},
        description="share of the prompts by cell, '<2 to 5> numbers'",
    )
    max_operand: int = Field(20, ge=2, le=99, description="largest number to calculate with")
    max_value: int = Field(99, ge=9, le=999, description="largest value of an attempt, on the way too")
    attempts: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (2, 4, 8, 14), min_length=1, description="attempts after which a trace gives up; each trace draws one of these"
    )
    careful: Unit = Field(0.0, description="share of the traces whose attempts hit, where the rest misses on purpose")
    miss: Unit = Field(0.0, description="share of the other traces' attempts that miss on purpose")
    ramble: Unit = Field(0.0, description="share of the traces out of patience that go on, and never hit")
    ramble_attempts: int = Field(20, ge=1, description="attempts in all of a trace that goes on")
    non_thinking: Unit = Field(0.10, description="share of the traces that answer at once")


@dataclass(frozen=True)
class Problem:
    """Numbers, a target, and one chain that makes it."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def canonical(self) -> str:
        return f"make {self.target} from {','.join(map(str, sorted(self.numbers)))}"


@dataclass(frozen=True)
class Attempt:
    """A left-to-right chain: the numbers in order, the operators between them, and the values on the way."""

    numbers: tuple[int, ...]
    ops: str
    values: tuple[int, ...]

    @property
    def text(self) -> str:
        """`5*3=15-2=13`"""
        steps = zip(self.ops, self.numbers[1:], self.values[1:], strict=True)
        return f"{self.numbers[0]}" + "".join(f"{op}{number}={value}" for op, number, value in steps)

    @property
    def expression(self) -> str:
        """`(5*3)-2`: everything before the last operation in parentheses."""
        first, *rest = (f"{op}{number}" for op, number in zip(self.ops, self.numbers[1:], strict=True))
        return "(" * len(rest) + ")".join([f"{self.numbers[0]}{first}", *rest])


def step(value: int, op: str, number: int, largest: int) -> int | None:
    """The next value of a chain, or None where it leaves 0..largest or the integers."""
    if op == "/":
        return value // number if number and value % number == 0 else None
    result = value + number if op == "+" else value - number if op == "-" else value * number
    return result if 0 <= result <= largest else None


def draw_attempt(rng: random.Random, numbers: Sequence[int], largest: int, target: int | None = None) -> Attempt | None:
    """A random chain; with a target, the last operation looks one step ahead. None when it gets stuck."""
    order, ops = tuple(rng.sample(list(numbers), len(numbers))), ""
    values = [order[0]]
    for number in order[1:]:
        results = {op: value for op in "+-*/" if (value := step(values[-1], op, number, largest)) is not None}
        if not results:
            return None
        hits = [op for op, value in results.items() if value == target and len(values) == len(order) - 1]
        ops += rng.choice(hits or list(results))
        values.append(results[ops[-1]])
    return Attempt(order, ops, tuple(values))


def draw_until(rng: random.Random, problem: Problem, largest: int, hit: bool) -> Attempt:
    """A random chain that makes the target, or one that does not."""
    for _ in range(DRAWS):
        attempt = draw_attempt(rng, problem.numbers, largest, problem.target if hit else None)
        if attempt and (attempt.values[-1] == problem.target) is hit:
            return attempt
    raise UserError(f"No chain that {'makes' if hit else 'misses'} the target was found for '{problem.canonical}'.")


def count_solutions(numbers: Sequence[int], target: int) -> int:
    """Expressions that use every number once and make the target, those that algebra makes equal counted once.

    An expression is known by its value and by what it makes of two random stand-ins for every place (modulo a large prime).
    """
    rng, n = random.Random(0), len(numbers)
    stands = [(number, *(rng.randrange(1, PRIME) for _ in range(2))) for number in sorted(numbers)]
    for i in range(1, n):  # equal numbers are the same number
        stands[i] = stands[i - 1] if stands[i][0] == stands[i - 1][0] else stands[i]
    found: dict[int, set[tuple[Fraction, int, int]]] = {
        1 << i: {(Fraction(s[0]), *s[1:])} for i, s in enumerate(stands)
    }
    for whole in range(1, 1 << n):
        made = found.setdefault(whole, set())
        part = (whole - 1) & whole
        while part:  # every way to cut the set in two, both orders
            for a, *left in found[part]:
                for b, *right in found[whole ^ part]:
                    pairs = list(zip(left, right, strict=True))
                    made.add((a - b, *((x - y) % PRIME for x, y in pairs)))
                    if part < whole ^ part:
                        made.add((a + b, *((x + y) % PRIME for x, y in pairs)))
                        made.add((a * b, *(x * y % PRIME for x, y in pairs)))
                    if b:
                        made.add((a / b, *(x * pow(y, -1, PRIME) % PRIME for x, y in pairs)))
            part = (part - 1) & whole
    return sum(one[0] == target for one in found[(1 << n) - 1])


def needs_muldiv(numbers: Sequence[int], target: int) -> bool:
    """Whether no sum and difference of the numbers makes the target."""
    return all(
        sum(sign * n for sign, n in zip(signs, numbers, strict=True)) != target
        for signs in product((1, -1), repeat=len(numbers))
    )


def verdict(attempt: Attempt, problem: Problem) -> str:
    """`!` for a hit, `<` and `>` for a value below and above the target."""
    value = attempt.values[-1]
    return "!" if value == problem.target else "<" if value < problem.target else ">"


class Countdown(GeneratedTask[Problem, Settings]):
    """See the head of the module."""

    name = "countdown"
    shares: ClassVar = {"base": 0.60, "train": 0.20, "validation": 0.06, "test": 0.14}
    settings = Settings
    styles = ("claims a hit", "gives up")

    def draw(self, rng: random.Random, cell: str, settings: Settings) -> Problem:
        """Random numbers and the value of a random chain over them as the target."""
        size = int(cell.partition(" ")[0])
        while True:
            numbers = tuple(rng.randint(1, settings.max_operand) for _ in range(size))
            attempt = draw_attempt(rng, numbers, settings.max_value)
            if attempt and attempt.values[-1] > 0:
                return Problem(tuple(rng.sample(numbers, size)), attempt.values[-1], attempt.expression)

    def teach(self, rng: random.Random, problem: Problem, cell: str, settings: Settings) -> Trace:
        """A worked search: as many attempts as a drawn patience allows, until one hits the target; the last is the answer."""
        if rng.random() < settings.non_thinking:
            return Trace(problem.solution, thinking=False, style="answer")
        patience = rng.choice(settings.attempts)
        largest, text, answer, tried = settings.max_value, "", problem.solution, list[Attempt]()
        careful = settings.miss > 0 and rng.random() < settings.careful
        for _ in range(patience * 4):
            if careful or (settings.miss and rng.random() < settings.miss):
                attempt = draw_until(rng, problem, largest, careful)
            else:
                attempt = draw_attempt(rng, problem.numbers, largest, None if settings.miss else problem.target)
            if attempt is None or (attempt in tried and not settings.miss):
                continue
            tried.append(attempt)
            text, answer = text + attempt.text + verdict(attempt, problem), attempt.expression
            if attempt.values[-1] == problem.target or len(tried) == patience:
                break
        if "!" not in text and settings.ramble and rng.random() < settings.ramble:
            for _ in range(settings.ramble_attempts - len(tried)):
                attempt = draw_until(rng, problem, largest, hit=False)
                text, answer = text + attempt.text + verdict(attempt, problem), attempt.expression
        style = "claims a hit" if "!" in text else "gives up"
        return Trace(thinking_response(text, answer), thinking=True, style=style)

    def ask(self, problem: Problem, cell: str) -> tuple[str, str, dict[str, Any]]:
        question = f"Make {problem.target} from {','.join(map(str, problem.numbers))}"
        numbers, target = list(problem.numbers), problem.target
        solutions = count_solutions(numbers, target) if len(numbers) <= COUNTED else None
        known = {"n_solutions": solutions, "needs_muldiv": needs_muldiv(numbers, target)}
        return question, problem.solution, {"numbers": numbers, "target": target, **known}

    def canonical_answer(self, response: str) -> str | None:
        """The same string for algebraically equivalent expressions; None where the answer is no expression."""
        try:
            return parse_expression(visible_answer(response)).canonical()
        except ValueError:
            return None

    def vocabulary_corpus(self) -> list[str]:
        """Chat and prompt words only."""
        return ["user\n", "assistant\n", "\n\n", "Make ", " from ", "system\n"] * 8

    def style_of(self, response: str) -> str | None:
        """Whether the response claims a hit: the verdict in the text that results have to be shown beside."""
        reasoning, closed, _ = response.partition("</think>")
        return None if not closed else "claims a hit" if "!" in reasoning else "gives up"


TASK = Countdown()

"""Products of two whole numbers, with long multiplication as the teacher's work: the second task of TinyZero.

    What is 12*34?      <think>\\n12*4=48\\n12*30=360\\n48+360=408\\n</think>\\n\\n408

A cell is the number of digits of both factors. The teacher may slip in a partial product and goes on with what it wrote; or
guess without work, right only by luck. Split by the pair of factors, in whose order there is no difference.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ziprc.config.base import Unit
from ziprc.tasks.base import Trace, integer_answer, thinking_response
from ziprc.tasks.generated import GeneratedTask, MixSettings, Weight


class Settings(MixSettings):
    """`prompts.settings` of this task."""

    mix: dict[Annotated[str, Field(pattern=r"^[1-4] by [1-4] digits$")], Weight] = Field(
        {"3 by 3 digits": 0.5, "2 by 2 digits": 0.25, "3 by 1 digits": 0.25},
        description="share of the prompts by cell, '<1 to 4> by <1 to 4> digits'",
    )
    slip: Unit = Field(0.05, description="chance that a digit of a partial product is wrong")
    guesses: Unit = Field(0.2, description="share of the traces that guess without work")
    non_thinking: Unit = Field(0.0, description="share of the traces that answer rightly at once")


@dataclass(frozen=True)
class Product:
    """Two factors, as they are shown."""

    left: int
    right: int

    @property
    def value(self) -> int:
        return self.left * self.right

    @property
    def canonical(self) -> str:
        return "multiply {} {}".format(*sorted((self.left, self.right)))


class Multiplication(GeneratedTask[Product, Settings]):
    """See the head of the module."""

    name = "multiplication"
    shares: ClassVar = {"base": 0.60, "train": 0.20, "validation": 0.06, "test": 0.14}
    settings = Settings
    styles = ("worked", "guessed")

    def draw(self, rng: random.Random, cell: str, settings: Settings) -> Product:
        sizes = (int(size) for size in re.findall(r"\d", cell))
        return Product(*(rng.randint(10 ** (size - 1), 10**size - 1) for size in sizes))

    def teach(self, rng: random.Random, problem: Product, cell: str, settings: Settings) -> Trace:
        """Partial products from the last digit on, each added to the sum so far."""
        if rng.random() < settings.non_thinking:
            return Trace(str(problem.value), thinking=False, style="answer")
        if rng.random() < settings.guesses:
            size = len(str(problem.value))
            guess = rng.randint(10 ** (size - 1), 10**size - 1)
            return Trace(thinking_response(f"{problem.left}*{problem.right}={guess}", guess), True, "guessed")
        lines, total = [], 0
        for place, digit in enumerate(reversed(str(problem.right))):
            part = problem.left * int(digit) * 10**place
            written = "".join(str(rng.randint(0, 9)) if rng.random() < settings.slip else d for d in str(part))
            lines.append(f"{problem.left}*{int(digit) * 10**place}={int(written)}")
            if place:
                lines.append(f"{total}+{int(written)}={total + int(written)}")
            total += int(written)
        return Trace(thinking_response("\n".join(lines), total), thinking=True, style="worked")

    def ask(self, problem: Product, cell: str) -> tuple[str, str, dict[str, Any]]:
        return f"What is {problem.left}*{problem.right}?", str(problem.value), {}

    def canonical_answer(self, response: str) -> str | None:
        """The integer after the thinking block, without leading zeros; None when there is anything else."""
        return integer_answer(response)

    def vocabulary_corpus(self) -> list[str]:
        """Chat and prompt words only."""
        return ["user\n", "assistant\n", "\n\n", "What is ", "system\n"] * 8

    def style_of(self, response: str) -> str | None:
        """Whether there is work in the thinking block."""
        reasoning, closed, _ = response.partition("</think>")
        return None if not closed else "worked" if "+" in reasoning or reasoning.count("=") > 1 else "guessed"


TASK = Multiplication()

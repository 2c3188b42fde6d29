"""Tasks whose problems are drawn at random, and whose traces a teacher writes.

Every problem belongs to a *cell* of the difficulty mix; cells are apportioned first and filled by rejection inside them,
so that rejecting duplicates and foreign splits cannot shift the mix towards cells with more problems.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Generic, Protocol, TypeVar

from pydantic import Field, field_validator

from ziprc.config.base import Section
from ziprc.errors import UserError
from ziprc.tasks.base import Prompt, Trace, check_split, prompt_id, split_of, user_message

# Attempts per wanted prompt before a cell is declared too small; at a 9 % split about 1 draw in 11 is of the split.
DRAWS_PER_PROMPT = 400


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def apportion(count: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers near count·share that sum to count (largest remainders; ties by order)."""
    total = sum(mix.values())
    exact = {cell: count * weight / total for cell, weight in mix.items() if weight > 0}
    counts = {cell: int(value) for cell, value in exact.items()}
    for cell in sorted(exact, key=lambda cell: counts[cell] - exact[cell])[: count - sum(counts.values())]:
        counts[cell] += 1
    return counts


class Problem(Protocol):
    """What a generated task draws."""

    canonical: str  # equal for problems that are the same problem to a reader


class MixSettings(Section):
    """Settings of a generated task; a task adds its own and narrows the cells."""

    mix: dict[str, Weight]

    @field_validator("mix", "styles", check_fields=False)
    @classmethod
    def _weighs(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.values()):
            raise ValueError("needs at least one weight above zero")
        return weights


P = TypeVar("P", bound=Problem)
M = TypeVar("M", bound=MixSettings)


class GeneratedTask(Generic[P, M]):
    """See the head of the module."""

    name: str
    shares: Mapping[str, float]  # of the splits
    settings: type[M]

    def draw(self, rng: random.Random, cell: str, settings: M) -> P:
        """A random problem of a cell, of any split."""
        raise NotImplementedError

    def teach(self, rng: random.Random, problem: P, cell: str, settings: M) -> Trace:
        """One response of the teacher."""
        raise NotImplementedError

    def ask(self, problem: P, cell: str) -> tuple[str, str, dict[str, Any]]:
        """The question, its answer, and what else a grader or a reader may want to know."""
        raise NotImplementedError

    def prompt(self, problem: P, cell: str, split: str) -> Prompt:
        """The row of the prompts table."""
        question, answer, extra = self.ask(problem, cell)
        name = prompt_id(self.name, self.name, problem.canonical)
        return Prompt(name, self.name, self.name, split, user_message(question), answer, cell, extra)

    def prompts(self, settings: Mapping[str, Any], split: str, count: int, seed: int) -> list[Prompt]:
        """`count` distinct problems of a split in exactly the mix of the settings, shuffled.

        UserError for a cell that is too small.
        """
        check_split(split)
        options = self.settings.model_validate(settings)
        rng = random.Random(f"{self.name} prompts {split} {seed}")
        cells, seen, prompts = apportion(count, options.mix), set(), []
        for cell, wanted in cells.items():
            found: list[Prompt] = []
            for _ in range(DRAWS_PER_PROMPT * wanted):
                if len(found) == wanted:
                    break
                problem = self.draw(rng, cell, options)
                if problem.canonical not in seen and split_of(problem.canonical, self.shares) == split:
                    seen.add(problem.canonical)
                    found.append(self.prompt(problem, cell, split))
            if len(found) < wanted:
                raise UserError(
                    f"The cell '{cell}' has too few distinct prompts in this split: {wanted} wanted, {len(found)} found "
                    f"in {DRAWS_PER_PROMPT * wanted} draws. Ask for fewer prompts or lower the cell's weight in the mix."
                )
            prompts += found
        assert len({prompt.prompt_id for prompt in prompts}) == len(prompts), "duplicate prompts"
        assert Counter(prompt.difficulty for prompt in prompts) == Counter(cells), "another mix than the one wanted"
        rng.shuffle(prompts)
        return prompts

    def traces(self, settings: Mapping[str, Any], count: int, seed: int) -> Iterator[tuple[Prompt, Trace]]:
        """Problems of the split `base` with a response each; a problem may come again with another response."""
        options = self.settings.model_validate(settings)
        rng = random.Random(f"{self.name} traces {seed}")
        cells, weights = list(options.mix), list(options.mix.values())
        for _ in range(count):
            cell = rng.choices(cells, weights)[0]
            problem = self.draw(rng, cell, options)
            while split_of(problem.canonical, self.shares) != "base":
                problem = self.draw(rng, cell, options)
            yield self.prompt(problem, cell, "base"), self.teach(rng, problem, cell, options)

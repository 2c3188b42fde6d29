"""What a task is: a source of prompts with known answers, split by content, and the final answer of a response.

The idea it rests on: the split of a prompt is a pure function of its *canonical content*, the form in which problems
that are the same problem to a reader (`a+b`, `b+a`) are equal. So a test prompt can never be a train prompt in
disguise, whatever the seed, the count or the order of drawing. Every prompt belongs to a *cell* of the difficulty mix;
cells are apportioned first and filled by rejection inside them, so that rejecting duplicates and foreign splits cannot
shift the mix towards cells with more problems (a defect of the prototypes, see `specs/countdown_world.md` section 0).
"""

from __future__ import annotations

import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from ziprc.errors import UserError, nearest

Settings = Mapping[str, Any]

SPLITS = ("base", "train", "validation", "test")

# Attempts per wanted prompt before a cell is declared too small; at a 9 % split about 1 draw in 11 is of the split.
DRAWS_PER_PROMPT = 400


@dataclass(frozen=True)
class Prompt:
    """One row of the prompts table."""

    prompt_id: str
    task: str
    source: str
    split: str
    messages: tuple[dict[str, str], ...]
    answer: str | None
    difficulty: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A response to learn from, without the stop token. A thinking trace starts with `<think>` and a line break."""

    response: str
    thinking: bool
    style: str


@runtime_checkable
class Task(Protocol):
    """What is asked, and how the final answer of a response reads."""

    name: str

    def prompts(self, settings: Settings, split: str, count: int, seed: int) -> list[Prompt]:
        """`count` distinct prompts of a split; the same arguments give the same list."""
        ...

    def canonical_answer(self, response: str) -> str | None:
        """The final answer in the form in which equal answers are equal strings; None when there is none."""
        ...


@runtime_checkable
class TeachingTask(Task, Protocol):
    """A task that can teach a base model from scratch."""

    def traces(self, settings: Settings, count: int, seed: int) -> Iterator[tuple[Prompt, Trace]]:
        """Prompts of the split `base` with responses to learn from."""
        ...

    def vocabulary_corpus(self) -> list[str]:
        """Texts on which the tokenizer's merges are learned."""
        ...

    def style_of(self, response: str) -> str | None:
        """The style of a response, for reporting only."""
        ...


def prompt_id(task: str, source: str, canonical: str) -> str:
    """Digest that names a prompt: the same problem has the same id in every run."""
    return hashlib.blake2b("\x1f".join((task, source, canonical)).encode(), digest_size=10).hexdigest()


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def split_of(canonical: str, shares: Mapping[str, float]) -> str:
    """The split of a canonical content; shares are laid out along [0, 1) in their order."""
    point = unit_hash(canonical) * sum(shares.values())
    for split, share in shares.items():
        point -= share
        if point < 0:
            return split
    return next(reversed(shares))


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"Unknown split '{split}'; splits are {', '.join(SPLITS)}.")


def thinking_response(reasoning: str, answer: str) -> str:
    """A thinking response in Qwen3's format."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def user_message(content: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": content},)


def apportion(count: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers near count·share that sum to count (largest remainders; ties by order)."""
    positive = {cell: float(weight) for cell, weight in mix.items() if weight > 0}
    if not positive or min(mix.values()) < 0:
        raise UserError(f"A difficulty mix needs non-negative weights and at least one above zero; found {dict(mix)}.")
    exact = {cell: count * weight / sum(positive.values()) for cell, weight in positive.items()}
    counts = {cell: int(value) for cell, value in exact.items()}
    by_remainder = sorted(exact, key=lambda cell: counts[cell] - exact[cell])
    for cell in by_remainder[: count - sum(counts.values())]:
        counts[cell] += 1
    return counts


P = TypeVar("P")


def fill_cells(
    cells: Mapping[str, int], draw: Callable[[str], P], canonical: Callable[[P], str], accept: Callable[[str], bool]
) -> dict[str, list[P]]:
    """Distinct problems for every cell: rejection happens inside the cell, so the mix is exactly the one asked for."""
    seen: set[str] = set()
    filled: dict[str, list[P]] = {}
    for cell, wanted in cells.items():
        found: list[P] = []
        for _ in range(DRAWS_PER_PROMPT * wanted):
            if len(found) == wanted:
                break
            problem = draw(cell)
            content = canonical(problem)
            if content not in seen and accept(content):
                seen.add(content)
                found.append(problem)
        if len(found) < wanted:
            raise UserError(
                f"The cell '{cell}' has too few distinct prompts in this split: {wanted} wanted, {len(found)} found "
                f"in {DRAWS_PER_PROMPT * wanted} draws. Ask for fewer prompts or lower the cell's weight in the mix."
            )
        filled[cell] = found
    return filled


def check_prompts(prompts: Sequence[Prompt], cells: Mapping[str, int]) -> None:
    """Our own invariants: distinct ids and the realised mix equal to the wanted one."""
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts), "duplicate prompts"
    realised = Counter(prompt.difficulty for prompt in prompts)
    assert dict(realised) == {cell: n for cell, n in cells.items() if n}, f"mix {realised}, wanted {cells}"


TASKS = {"arithmetic": "Arithmetic", "countdown": "Countdown", "hub": "Hub"}


def get_task(name: str) -> Task:
    """The task of a name. Modules are imported when asked for, so that a name costs nothing."""
    if name not in TASKS:
        raise UserError(f"Unknown task '{name}'{nearest(name, TASKS)}.")
    return getattr(importlib.import_module(f"ziprc.tasks.{name}"), TASKS[name])()

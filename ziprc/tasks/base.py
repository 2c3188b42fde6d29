"""What a task is: a source of prompts with known answers, split by content, and the final answer of a response.

The idea it rests on: the split of a prompt is a pure function of its *canonical content*, the form in which problems
that are the same problem to a reader (`a+b`, `b+a`) are equal. So a test prompt can never be a train prompt in
disguise, whatever the seed, the count or the order of drawing.

A task is a module of this folder with two names: `TASK`, the task, and `Settings`, what `prompts.settings` may hold, a
pydantic section that is checked before anything runs. Importing one needs neither torch nor the library `datasets`.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ziprc.errors import UserError, nearest

SPLITS = ("base", "train", "validation", "test")


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
    """What is asked, and how the final answer of a response reads. `TASK` of a module of `ziprc.tasks`."""

    name: str

    def prompts(self, settings: Mapping[str, Any], split: str, count: int, seed: int) -> list[Prompt]:
        """`count` distinct prompts of a split (fewer where there are no more); the same arguments give the same list.

        `settings` are keys of the class `Settings` of the task's module, which refuses others with a ValidationError: the
        configuration has been checked with it before.
        """
        ...

    def canonical_answer(self, response: str) -> str | None:
        """The final answer in the form in which equal answers are equal strings; None when there is none."""
        ...


@runtime_checkable
class TeachingTask(Task, Protocol):
    """A task that can teach a base model from scratch."""

    styles: tuple[str, ...]

    def traces(self, settings: Mapping[str, Any], count: int, seed: int) -> Iterator[tuple[Prompt, Trace]]:
        """Prompts of the split `base` with responses to learn from."""
        ...

    def vocabulary_corpus(self) -> list[str]:
        """Texts on which the tokenizer's merges are learned."""
        ...

    def style_of(self, response: str) -> str | None:
        """Which of `styles` the response is written in, for reporting only."""
        ...


def get_task(name: str) -> Task:
    """The task of a name: what the module `ziprc.tasks.<name>` calls TASK.

    No list of tasks is kept anywhere, so that a new one is a new file and no change of code for stages that use another.
    """
    modules = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    task = getattr(importlib.import_module(f"ziprc.tasks.{name}"), "TASK", None) if name in modules else None
    if task is None:
        tasks = [m for m in modules if hasattr(importlib.import_module(f"ziprc.tasks.{m}"), "TASK")]
        raise UserError(f"Unknown task '{name}'{nearest(name, tasks)}.")
    return task


def prompt_id(task: str, source: str, canonical: str) -> str:
    """Digest that names a prompt: the same problem has the same id in every run."""
    return hashlib.blake2b("\x1f".join((task, source, canonical)).encode(), digest_size=10).hexdigest()


def split_of(canonical: str, shares: Mapping[str, float]) -> str:
    """The split of a canonical content, in every process and on every machine; shares are laid out in their order."""
    unit = int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big") / 2**64
    point = unit * sum(shares.values())
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

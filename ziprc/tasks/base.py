"""What a task is: a source of prompts with known answers, split by content, and the final answer of a response.

The split of a prompt is a pure function of its *canonical content*, the form in which problems that are the same
to a reader (`a+b`, `b+a`) are equal. So a test prompt can never be a train prompt in disguise, whatever the seed.

A task is a module of this folder, found by its name and listed nowhere, with `TASK`, the task, and `Settings`, what
`prompts.settings` may hold: a pydantic section that is checked before anything runs. Importing one needs neither torch
nor the library `datasets`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ziprc.chat import visible_answer
from ziprc.config.load import task_module, tasks
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


class Task(Protocol):
    """What is asked, and how the final answer of a response reads. `TASK` of a module of `ziprc.tasks`."""

    name: str

    def prompts(self, settings: Mapping[str, Any], split: str, count: int, seed: int) -> list[Prompt]:
        """`count` distinct prompts of a split (fewer where there are no more); the same arguments give the same list.

        ValidationError for `settings` that are none of the module's `Settings`.
        """

    def canonical_answer(self, response: str) -> str | None:
        """The final answer in the form in which equal answers are equal strings; None when there is none."""


@runtime_checkable
class TeachingTask(Task, Protocol):
    """A task that can teach a base model from scratch."""

    styles: tuple[str, ...]

    def traces(self, settings: Mapping[str, Any], count: int, seed: int) -> Iterator[tuple[Prompt, Trace]]:
        """Prompts of the split `base` with responses to learn from."""

    def vocabulary_corpus(self) -> list[str]:
        """Texts on which the tokenizer's merges are learned."""

    def style_of(self, response: str) -> str | None:
        """Which of `styles` the response is written in, for reporting only."""


@dataclass(frozen=True)
class Criterion:
    """An item of a rubric: its name, its whole points, and what is required for them."""

    name: str
    points: int
    requirement: str


@dataclass(frozen=True)
class Assessment:
    """A response against its rubric: points over the total, points by item, the teacher's words, which end in the total.

    `kind` is how the response goes about it; `spans` are where in the response the steps of items begin and end.
    """

    score: float
    points: Mapping[str, int]
    text: str
    kind: str
    spans: Mapping[str, tuple[int, int]]


@runtime_checkable
class AssessedTask(Task, Protocol):
    """A task whose program writes rubrics and is checker, verifier and teacher of whole responses. `extra` is the prompt's."""

    def rubric(self, extra: Mapping[str, Any]) -> list[Criterion]:
        """What full marks are given for."""

    def reference(self, extra: Mapping[str, Any]) -> str:
        """A response that has to get full marks."""

    def assess(self, extra: Mapping[str, Any], response: str) -> Assessment:
        """The response against the rubric; sound exactly when the score is 1."""


def get_task(name: str) -> Task:
    """The task of a name: what the module `ziprc.tasks.<name>` calls TASK. UserError where there is none."""
    if name not in tasks():
        raise UserError(f"Unknown task '{name}'{nearest(name, tasks())}.")
    return task_module(name).TASK


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


def thinking_response(reasoning: str, answer: object) -> str:
    """A thinking response in Qwen3's format."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def integer_answer(response: str) -> str | None:
    """The integer after the thinking block, without leading zeros; None when there is anything else."""
    answer = visible_answer(response)
    return str(int(answer)) if re.fullmatch(r"-?[0-9]{1,12}", answer) else None


def user_message(content: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": content},)

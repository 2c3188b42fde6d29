"""What goes into a live run and what comes out: questions, decisions, branches, answers, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ziprc.sampling.controller import Applied, Decision
from ziprc.sampling.tree import Trees
from ziprc.tables.rollouts import FinishReason


@dataclass(frozen=True)
class Question:
    """A prompt to answer; `seed` and the slot make the seed of every sample."""

    key: str
    prompt_token_ids: tuple[int, ...]
    seed: int


class Answers(Protocol):
    """Reads answers. `prompt` is the position of the question in the list of questions."""

    def __call__(self, prompt: int, token_ids: Sequence[int]) -> int | None:
        """Number of the canonical answer of a whole response, stop token included: equal answers of a prompt have equal
        numbers from 0 on; None where there is no answer."""


@dataclass(frozen=True)
class Decided:
    """One decision on one prompt, with what it was based on: the controller decides the same from `trees` alone."""

    trees: Trees  # of this prompt (P = 1), as they were before the decision
    decision: Decision

    @property
    def step(self) -> int:
        """Serial decoding steps so far."""
        return int(self.trees.latency[0])

    @property
    def tokens(self) -> int:
        """Generated so far, on all branches."""
        return int(self.trees.spent[0])


@dataclass(frozen=True)
class Branch:
    """One slot of a tree at the end. `token_ids` is the whole response, the `fork` inherited tokens included."""

    parent: int
    fork: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None  # None: abandoned

    @property
    def generated(self) -> int:
        """Tokens that this branch generated itself."""
        return len(self.token_ids) - self.fork


@dataclass(frozen=True)
class Answered:
    """What came of one question; with an `error` there is no answer and `slot` is NONE."""

    index: int  # position in the list of questions
    question: Question
    branches: tuple[Branch, ...]
    slot: int  # branch whose answer is given
    probability: float  # that it is right
    tokens: int  # generated, abandoned branches included
    prefill: int  # tokens of prompts and prefixes that were computed, not found in the cache
    latency: int  # serial decoding steps
    seconds: float  # from admission to answer
    decisions: list[Decided]
    error: str | None = None
    lost: int = 0  # tokens of an attempt that went down with the engine; not among `tokens`


@dataclass(frozen=True)
class Event:
    """What a watcher is told after each decision; `token_ids` are those of every slot in use."""

    index: int
    decided: Decided
    applied: Applied
    token_ids: list[tuple[int, ...]]


@dataclass
class Timing:
    """Where the wall-clock of a run went; time that the caller spends between two answers is not counted."""

    deciding_s: float = 0.0  # reading signals, deciding, choosing
    requesting_s: float = 0.0  # carrying it out: requests that the engine takes in or drops
    tracking_s: float = 0.0  # writing tokens and readings down, answers included
    stepping_s: float = 0.0  # in the engine
    total_s: float = 0.0
    steps: int = 0
    decisions: int = 0  # calls of the controller, each for all prompts that were due

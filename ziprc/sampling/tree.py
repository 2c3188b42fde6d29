"""The prefix trees of many prompts, as arrays: what has been generated, what is paused, what is finished.

A prompt's tree is rooted at the prompt; a branch is a row of the tree that took over some tokens of its parent (none,
when it started at the prompt) and generated the rest itself. Nothing is ever deleted: a branch that is not continued is
paused and may be resumed or branched from (ZIP-RC, arXiv 2512.01457, §4). Slots are handed out in order and never
reused, so their number is the hard cap on branches. Controllers decide on these arrays for all prompts at once.
Shapes: P prompts, S slots, K signals of the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

ROOT = -1  # as a parent: the prompt itself
NO_ANSWER = -1
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]


class Status(IntEnum):
    """What a slot holds."""

    FREE = 0
    RUNNING = 1
    PAUSED = 2
    FINISHED = 3


@dataclass
class Trees:
    """The trees of P prompts with S slots each; every field's first dimension is the prompt.

    `length` counts response tokens with the inherited ones, `fork` the inherited ones. `answer` numbers the canonical
    answers of a prompt: equal answers have equal numbers; NO_ANSWER for none and for what is unfinished. `signals` is
    what the policy made of the newest reading of each branch, `root` the same for the prompt's own reading. `latency`
    counts the serial decoding steps of a prompt.
    """

    status: NDArray[np.int8]  # [P, S]
    parent: NDArray[np.int16]  # [P, S]
    fork: NDArray[np.int32]  # [P, S]
    length: NDArray[np.int32]  # [P, S]
    answer: NDArray[np.int32]  # [P, S]
    signals: NDArray[np.float32]  # [P, S, K]
    root: NDArray[np.float32]  # [P, K]
    spot: NDArray[np.int32]  # [P, S], or [P, 0]
    spot_signals: NDArray[np.float32]  # [P, S, K], or [P, 0, K]
    latency: NDArray[np.int32]  # [P]

    @classmethod
    def empty(cls, prompts: int, slots: int, signals: int, branching: bool = False) -> Trees:
        """Trees that hold the prompt only."""
        grid, spots = (prompts, slots), (prompts, slots if branching else 0)
        return cls(
            status=np.zeros(grid, np.int8),
            parent=np.full(grid, ROOT, np.int16),
            fork=np.zeros(grid, np.int32),
            length=np.zeros(grid, np.int32),
            answer=np.full(grid, NO_ANSWER, np.int32),
            signals=np.zeros((*grid, signals), np.float32),
            root=np.zeros((prompts, signals), np.float32),
            spot=np.zeros(spots, np.int32),
            spot_signals=np.zeros((*spots, signals), np.float32),
            latency=np.zeros(prompts, np.int32),
        )

    def __len__(self) -> int:
        return len(self.status)

    @property
    def slots(self) -> int:
        return self.status.shape[1]

    def take(self, rows: Ints, slots: int | None = None) -> Trees:
        """A copy of some prompts' trees, of the first `slots` slots."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return Trees(**{n: x[rows] if n in ("root", "latency") else x[rows, :slots] for n, x in found.items()})

    def put(self, rows: Ints, part: Trees) -> None:
        """Write `part`, which was taken from `rows`, back."""
        for f in fields(self):
            getattr(self, f.name)[rows] = getattr(part, f.name)

    @property
    def used(self) -> Bools:
        """[P, S] slots that hold a branch."""
        return self.status != Status.FREE

    @property
    def running(self) -> Bools:
        return self.status == Status.RUNNING

    @property
    def finished(self) -> Bools:
        return self.status == Status.FINISHED

    @property
    def unfinished(self) -> Bools:
        """[P, S] running or paused."""
        return self.running | (self.status == Status.PAUSED)

    @property
    def generated(self) -> Ints:
        """[P, S] tokens that each branch generated itself."""
        return self.length - self.fork

    @property
    def spent(self) -> Ints:
        """[P] generated tokens of a prompt, abandoned ones included."""
        return self.generated.sum(-1, dtype=np.int64)

    def open_slots(self, count: Ints) -> Bools:
        """[P, S] the first `count` [P] free slots of every prompt."""
        free = self.status == Status.FREE
        return free & (np.cumsum(free, -1) <= count[:, None])

"""The decision loop shared by all policies and both executors: look at the trees, decide, stay inside the budget.

A policy says what it would do; `decide` here makes it lawful: no more branches, tokens or serial steps than the budget
allows (each is hard: what a decision lets run for one interval is paid for beforehand), never an idle prompt, and every
prompt that stops has a chosen branch. Executors (live.py, replay.py) only carry decisions out. All arrays are over the
prompts that are due. Shapes: P prompts, S slots, C cells of the joint, F features, K signals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ziprc.errors import UserError
from ziprc.sampling.tree import Status, Trees

NONE = -1


@dataclass(frozen=True)
class Budget:
    """Hard limits of one prompt, and the number of tokens between two decisions."""

    branches: int = 16
    tokens: int = 1 << 30
    latency: int = 1 << 30
    interval: int = 8

    def __post_init__(self) -> None:
        if self.interval < 1 or self.branches < 1:
            raise UserError(f"interval and branches must be at least 1, found {self.interval} and {self.branches}.")
        for name in ("tokens", "latency"):
            if getattr(self, name) <= self.interval:
                raise UserError(
                    f"The budget allows {getattr(self, name)} {name} per prompt, but the first token and one decision "
                    f"interval of {self.interval} tokens need {self.interval + 1}. Raise it, or lower the interval."
                )


@dataclass
class Decision:
    """What happens in the next interval.

    `run` [P, S]: unfinished branches that go on (the others pause). `start` [P]: new samples from the prompt.
    `branch` [P]: a slot to branch from (NONE: no branching) after its first `branch_at` [P] tokens. `priority` [P, S]:
    what is dropped last when the budget is short. `utility` [P] is only reported. A prompt with nothing to run stops.
    """

    run: NDArray[np.bool_]
    start: NDArray[np.int64]
    priority: NDArray[np.float64]
    utility: NDArray[np.float64]
    branch: NDArray[np.int64]
    branch_at: NDArray[np.int64]

    @classmethod
    def stop(cls, trees: Trees) -> Decision:
        """Nothing runs."""
        prompts = len(trees)
        return cls(
            run=np.zeros((prompts, trees.slots), bool),
            start=np.zeros(prompts, np.int64),
            priority=np.zeros((prompts, trees.slots)),
            utility=np.zeros(prompts),
            branch=np.full(prompts, NONE, np.int64),
            branch_at=np.zeros(prompts, np.int64),
        )

    @property
    def going(self) -> NDArray[np.bool_]:
        """[P] prompts in which something runs."""
        return self.run.any(-1) | (self.start > 0) | (self.branch != NONE)


@dataclass(frozen=True)
class Choice:
    """The branch whose answer is given, [P], and the probability that it is right, [P]."""

    slot: NDArray[np.int64]
    probability: NDArray[np.float64]


class Policy(Protocol):
    """How much more to spend, and on what."""

    name: str
    signals: int  # K
    can_branch: bool

    def read(self, joint: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, K] signals from smoothed joints [n, C] and features [n, F] (features.py) of n states."""
        ...

    def decide(self, trees: Trees, interval: int) -> Decision:
        """What should run for the next `interval` tokens. The first call sees one sample of one token per prompt."""
        ...

    def expectations(self, trees: Trees) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Expected reward and expected remaining tokens of every branch, [P, S] each, for people; NaN where not known."""
        ...

    def choose(self, trees: Trees) -> Choice:
        """The answer of each prompt, from its finished branches; what it says where there is none is not used."""
        ...


@dataclass(frozen=True)
class Controller:
    """A policy held to a budget."""

    policy: Policy
    budget: Budget = field(default_factory=Budget)

    def decide(self, trees: Trees) -> Decision:
        """The policy's decision, cut down to the budget."""
        decision = self.policy.decide(trees, self.budget.interval)
        decision.run = decision.run & trees.unfinished
        self._fit(decision, trees)
        return decision

    def _fit(self, decision: Decision, trees: Trees) -> None:
        """Cut in place: first branchings, then new samples, then branches of low priority."""
        interval = self.budget.interval
        room = (self.budget.tokens - trees.spent) // interval
        late = trees.latency + interval > self.budget.latency
        room = np.where(late, 0, room)
        free = (trees.status == Status.FREE).sum(-1)
        decision.run = keep_best(decision.run, decision.priority, room)
        room = room - decision.run.sum(-1)
        decision.start = np.clip(decision.start, 0, np.minimum(room, free))
        branching = (decision.branch != NONE) & (decision.start < np.minimum(room, free))
        decision.branch = np.where(branching, decision.branch, NONE)

    def choose(self, trees: Trees) -> Choice:
        """The policy's choice; where nothing is finished, the longest branch, with probability 0."""
        chosen = self.policy.choose(trees)
        none = ~trees.finished.any(-1)
        longest = np.argmax(np.where(trees.used, trees.length, -1), -1)
        return Choice(np.where(none, longest, chosen.slot), np.where(none, 0.0, chosen.probability))


def keep_best(wanted: NDArray[np.bool_], priority: NDArray[np.float64], room: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[P, S] the `room` [P] wanted slots of highest priority (all, where there is room for all)."""
    order = np.argsort(np.where(wanted, -priority, np.inf), -1, kind="stable")
    rank = np.argsort(order, -1, kind="stable")
    return wanted & (rank < room[:, None])


@dataclass(frozen=True)
class Applied:
    """What a decision changed: masks [P, S]."""

    started: NDArray[np.bool_]
    branched: NDArray[np.bool_]
    resumed: NDArray[np.bool_]
    paused: NDArray[np.bool_]


def apply(decision: Decision, trees: Trees) -> Applied:
    """Carry a lawful decision out on the trees, in place; new branches are RUNNING with no tokens of their own yet."""
    resumed = decision.run & (trees.status == Status.PAUSED)
    paused = trees.running & ~decision.run
    trees.status[decision.run] = Status.RUNNING
    trees.status[paused] = Status.PAUSED
    started = trees.open_slots(decision.start)
    trees.status[started] = Status.RUNNING
    branched = trees.open_slots((decision.branch != NONE).astype(np.int64))
    rows, slots = np.nonzero(branched)
    trees.status[branched] = Status.RUNNING
    trees.parent[rows, slots] = decision.branch[rows]
    trees.fork[rows, slots] = trees.length[rows, slots] = decision.branch_at[rows]
    return Applied(started, branched, resumed, paused)

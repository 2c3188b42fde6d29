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
from ziprc.sampling.tree import Bools, Floats, Ints, Status, Trees

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

    run: Bools
    start: Ints
    priority: Floats
    utility: Floats
    branch: Ints
    branch_at: Ints

    @classmethod
    def stop(cls, trees: Trees) -> Decision:
        """Nothing runs."""
        prompts, shape = len(trees), trees.status.shape
        start, branch, branch_at = np.zeros(prompts, int), np.full(prompts, NONE), np.zeros(prompts, int)
        return cls(np.zeros(shape, bool), start, np.zeros(shape), np.zeros(prompts), branch, branch_at)

    @property
    def going(self) -> Bools:
        """[P] prompts in which something runs."""
        return self.run.any(-1) | (self.start > 0) | (self.branch != NONE)


@dataclass(frozen=True)
class Choice:
    """The branch whose answer is given, [P], and the probability that it is right, [P]."""

    slot: Ints
    probability: Floats


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

    def expectations(self, trees: Trees) -> tuple[Floats, Floats]:
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
        """The policy's decision, cut down to the budget: first branchings, then new samples, then low priorities go."""
        interval = self.budget.interval
        decision = self.policy.decide(trees, interval)
        late = trees.latency + interval > self.budget.latency
        room = np.where(late, 0, (self.budget.tokens - trees.spent) // interval)
        decision.run = keep_best(decision.run & trees.unfinished, decision.priority, room)
        room = np.minimum(room - decision.run.sum(-1), (trees.status == Status.FREE).sum(-1))
        decision.start = np.clip(decision.start, 0, room)
        branching = (decision.branch != NONE) & (decision.start < room)
        decision.branch = np.where(branching, decision.branch, NONE)
        return decision

    def choose(self, trees: Trees) -> Choice:
        """The policy's choice; where nothing is finished, the longest branch, with probability 0."""
        chosen = self.policy.choose(trees)
        none = ~trees.finished.any(-1)
        longest = np.argmax(np.where(trees.used, trees.length, -1), -1)
        return Choice(np.where(none, longest, chosen.slot), np.where(none, 0.0, chosen.probability))


def keep_best(wanted: Bools, priority: Floats, room: Ints) -> Bools:
    """[P, S] the `room` [P] wanted slots of highest priority (all, where there is room for all)."""
    order = np.argsort(np.where(wanted, -priority, np.inf), -1, kind="stable")
    rank = np.argsort(order, -1, kind="stable")
    return wanted & (rank < room[:, None])


@dataclass(frozen=True)
class Applied:
    """What a decision changed: masks [P, S]."""

    started: Bools
    branched: Bools
    resumed: Bools
    paused: Bools


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

"""What was read of every branch in flight, and what a new branch inherits of it.

A request that was added again does not know the log-probability of the last token before it: a branch takes it from its
parent where the parent has read past the fork, otherwise the mean so far stands in (minus the entropy, which is its
expectation, where there is no mean yet). A branch inherits the readings of its prefix, which are kept for policies that
can branch and for no others. Shapes: P prompts in flight, S slots, C cells, F features, W window, n rows of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ziprc.engines.base import Step
from ziprc.sampling import features as f
from ziprc.sampling.live.records import Branch
from ziprc.sampling.tree import ROOT
from ziprc.tables.rollouts import FinishReason

Rows = NDArray[np.int64]  # prompts, by their row in the trees
FEATURES, LOG_PROB, JOINT = slice(0, len(f.FEATURES)), len(f.FEATURES), slice(len(f.FEATURES) + 1, None)  # of a reading


@dataclass
class _Stem:
    """One branch, running or not, while its prompt is in flight."""

    row: int
    slot: int
    parent: int = ROOT
    fork: int = 0
    token_ids: list[int] = field(default_factory=list)
    readings: list[NDArray[np.float32]] = field(default_factory=list)  # one per token, where the policy can branch
    finish_reason: FinishReason | None = None
    key: str = ""  # of its newest request
    segments: int = 0  # requests so far

    def frozen(self) -> Branch:
        return Branch(self.parent, self.fork, tuple(self.token_ids), self.finish_reason)


class _Readings:
    """What was read of every branch in flight: its features and its newest joints.

    What a branch keeps for later is a row [F + 1 + C] per token: features, log-probability of the token before, joint.
    They are rows of one array per step, because small objects by the ten thousand would keep the garbage collector busy.
    """

    def __init__(self, prompts: int, slots: int, cells: int, window: int) -> None:
        grid = (prompts, slots)
        self.window = window
        self.features = np.zeros((*grid, len(f.FEATURES)), np.float32)
        self.recent = np.zeros((*grid, window, cells), np.float32)  # reading j is at j % window, 0 where there is none
        self.gap = np.zeros(grid, np.float32)  # log-prob of the token before a request, which the engine does not know
        self.unread = np.zeros(grid, bool)  # the policy has not seen the newest reading

    def clear(self, row: int) -> None:
        self.features[row] = f.fresh(self.features.shape[1])
        self.recent[row], self.gap[row], self.unread[row] = 0, 0, False

    def add(self, p: Rows, s: Rows, step: Step, keep: bool) -> NDArray[np.float32]:
        """Note the rows of a step, which belong to slots `s` [n] of prompts `p` [n]; what to `keep`, [n, F + 1 + C]."""
        assert step.joint is not None, "a live run reads a joint head"
        log_prob = np.where(step.position == 0, self.gap[p, s], step.log_prob)
        seen = f.update(self.features[p, s], log_prob, step.entropy)
        self.features[p, s] = seen
        self.recent[p, s, seen[:, f.TOKENS].astype(np.int64) % self.window] = step.joint
        self.unread[p, s] = True
        return np.concatenate([seen, log_prob[:, None], step.joint], -1) if keep else seen

    def smoothed(self, p: Rows, s: Rows) -> NDArray[np.float32]:
        """[n, C] running mean of the last `window` joints."""
        count = np.minimum(self.features[p, s, f.TOKENS] + 1, self.window).astype(np.float64)
        return (self.recent[p, s].sum(1, dtype=np.float64) / count[:, None]).astype(np.float32)

    def state(self, stem: _Stem, j: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Smoothed joint [C] and features [F] of the j-th reading of a branch whose readings are kept."""
        recent = stem.readings[max(0, j + 1 - self.window) : j + 1]
        joint = np.add.reduce(recent, 0, np.float64)[JOINT] / len(recent)
        return joint.astype(np.float32), stem.readings[j][FEATURES]

    def guess_gap(self, row: int, slot: int) -> None:
        """The mean so far stands in for a log-probability that nobody has read; a first one is as low as expected."""
        seen = self.features[row, slot]
        self.gap[row, slot] = seen[f.MEAN] if seen[f.TOKENS] > 0 else -seen[f.ENTROPY]

    def inherit(self, stem: _Stem, parent: _Stem) -> None:
        """Put `stem` into the state in which its parent was after `stem.fork` tokens."""
        at = stem.row, stem.slot
        stem.readings = parent.readings[: stem.fork]
        if stem.readings:
            self.features[at] = stem.readings[-1][FEATURES]
            self.unread[at] = True
        for j in range(max(0, stem.fork - self.window), stem.fork):
            self.recent[at][j % self.window] = stem.readings[j][JOINT]
        if len(parent.readings) > stem.fork:
            self.gap[at] = parent.readings[stem.fork][LOG_PROB]
        else:
            self.guess_gap(*at)

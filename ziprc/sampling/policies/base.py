"""What the honest competitors of adaptive ZIP-RC sampling share: what they know of a branch, how they choose, how they run.

Each is a policy as in controller.py and runs in the same loop and the same executors, so that every token is counted by
the same code. What a policy knows of a branch is one number per `Source`, read from the same forward pass; log-probabilities
are turned into probabilities (exp), so that every score lies in [0, 1] and serves as a vote weight, as a stopping threshold
and as the reported probability alike. A dropped branch is paused and never resumed; its tokens have been paid for. A sample
without an answer never wins over one with an answer: that it has none is known to everybody for free.

Selectors say which answer to give: `Vote` (majority or weighted; self-consistency, arXiv 2203.11171) and `Best` (best of k).
Shapes: P prompts, S slots, K signals, n states, C cells of the joint, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling import features as f
from ziprc.sampling.controller import Choice, Decision
from ziprc.sampling.score import Logistic, joint_summary, token_inputs
from ziprc.sampling.selection import best_vote
from ziprc.sampling.tree import NO_ANSWER, Bools, Floats, Status, Trees

STYLE_COLUMN = len(f.FEATURES)  # replays may append the style code of each rollout; UNKNOWN_STYLE until it shows
UNKNOWN_STYLE = -1
CHUNK = 1 << 16  # states that are read at once: bounds the memory of the quadratic logistic


class Source(StrEnum):
    """What a policy can know of a branch: one number per state."""

    MEAN = "logprob"  # exp of the mean log-probability
    LOW = "min-logprob"  # exp of the least
    WINDOW = "window"  # exp of that of the worst window: DeepConf's confidence
    LOGISTIC = "logistic"  # logistic regression on log-probability statistics, without the joint
    VALUE = "value"  # expected reward of the joint
    ENTROPY = "entropy"  # mean entropy
    STYLE = "style"  # code of the style


LOG_PROBS = {Source.MEAN: f.MEAN, Source.LOW: f.LOW, Source.WINDOW: f.LOW_WINDOW}
SCORES = (Source.MEAN, Source.LOW, Source.LOGISTIC, Source.VALUE)


@dataclass(frozen=True)
class Reader:
    """Turns readings into scores. `logistic` was fitted on `token_inputs` of finished branches."""

    grid: BinGrid
    logistic: Logistic | None = None

    def read(self, sources: tuple[Source, ...], joint: Floats, features: Floats) -> NDArray[np.float32]:
        """[n, K] one column per source."""
        out = np.empty((len(features), len(sources)), np.float32)
        for start in range(0, len(features), CHUNK):
            rows = slice(start, start + CHUNK)
            for column, source in enumerate(sources):
                out[rows, column] = self._column(source, joint[rows], features[rows])
        return out

    def _column(self, source: Source, joint: Floats, features: Floats) -> Floats:
        if source in LOG_PROBS:
            return np.exp(features[:, LOG_PROBS[source]])
        if source is Source.VALUE:
            return joint_summary(joint, self.grid)[0]
        if source is Source.ENTROPY:
            return features[:, f.ENTROPY]
        if source is Source.LOGISTIC:
            if self.logistic is None:
                raise UserError("This policy scores with the log-probability logistic, and the reader was given none.")
            return self.logistic.probability(token_inputs(features))
        if features.shape[1] <= STYLE_COLUMN:
            raise UserError(
                f"Policies that look at the style expect its code in column {STYLE_COLUMN} of the features, found "
                f"{features.shape[1]} columns. Append it to the pool; live sampling has none."
            )
        return features[:, STYLE_COLUMN]


def answered(trees: Trees) -> Bools:
    """[P, S] finished branches with an answer."""
    return trees.finished & (trees.answer != NO_ANSWER)


def candidates(trees: Trees, liked: Bools) -> Bools:
    """[P, S] the liked ones among the answered; where there are none, all answered; else all finished."""
    mask = answered(trees)
    mask = np.where(mask.any(-1, keepdims=True), mask, trees.finished)
    return np.where((mask & liked).any(-1, keepdims=True), mask & liked, mask)


@dataclass(frozen=True)
class Vote:
    """The answer with most weight, a sample's weight being its score to the power `sharpness` (1 where `by` is None)."""

    by: Source | None = None
    sharpness: float = 1.0

    @property
    def label(self) -> str:
        return "majority" if self.by is None else f"vote-{self.by}{power_label(self.sharpness)}"

    def choose(self, trees: Trees, score: Floats, voters: Bools) -> Choice:
        """Ties between answers go to the higher score, or to the earlier sample; the probability is the share of the votes.

        Weights are relative to the best of a prompt, so that tolerances and sums behave at any sharpness.
        """
        voting = np.where(voters, score, 0.0)
        weight = voters * (voting / np.maximum(voting.max(-1, keepdims=True), 1e-300)) ** self.sharpness
        tie = -np.arange(trees.slots) if self.by is None else score
        slot = best_vote(trees, weight, np.where(voters, tie, -np.inf))
        agreeing = answered(trees) & (trees.answer == np.take_along_axis(trees.answer, slot[:, None], 1))
        return Choice(slot, (weight * agreeing).sum(-1) / np.maximum(weight.sum(-1), 1e-300))


@dataclass(frozen=True)
class Best:
    """The sample with the highest score."""

    by: Source

    @property
    def label(self) -> str:
        return f"best-{self.by}"

    def choose(self, trees: Trees, score: Floats, voters: Bools) -> Choice:
        """Ties go to the earlier sample."""
        slot = np.where(voters, score, -np.inf).argmax(-1)
        return Choice(slot, np.take_along_axis(score, slot[:, None], 1)[:, 0])


def power_label(sharpness: float) -> str:
    """The part of a name that tells the power of a score, where it is not the score itself."""
    return "" if sharpness == 1 else f"^{sharpness:g}"


Selector = Vote | Best
MAJORITY = Vote()


def decision(trees: Trees, run: Bools, start: ArrayLike) -> Decision:
    """Run these [P, S] and start so many [P], as far as there are slots; a short budget cuts the shortest branches."""
    out = Decision.stop(trees)
    out.run = run
    out.start = np.clip(start, 0, (trees.status == Status.FREE).sum(-1))
    out.priority = trees.length.astype(np.float64)
    return out


def keep_one(choice: Decision, trees: Trees, preference: Floats | None = None) -> Decision:
    """Where nothing is finished and nothing would run, one running branch goes on: the preferred, or the first."""
    rank = -np.arange(trees.slots) if preference is None else preference
    stuck = ~trees.finished.any(-1) & ~choice.going & trees.running.any(-1)
    last = np.where(trees.running, rank, -np.inf).argmax(-1)
    choice.run[stuck, last[stuck]] = True
    return choice


@dataclass(frozen=True)
class Baseline(ABC):
    """A policy without branching that knows the `sources` of its chooser and those it asks for in `looks_at`."""

    reader: Reader
    can_branch: ClassVar[bool] = False
    looks_at: ClassVar[tuple[Source, ...]] = ()
    title: ClassVar[str]  # a format of the settings
    chooser = MAJORITY  # how the answer is chosen; a setting, or a property, of some

    @property
    def name(self) -> str:
        """With its settings."""
        return self.title.format(self)

    @abstractmethod
    def decide(self, trees: Trees, interval: int) -> Decision:
        """What runs next."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What each signal is; policies with equal sources and readers can share one reading of a pool."""
        return tuple(dict.fromkeys(s for s in (self.chooser.by, *self.looks_at) if s is not None))

    @property
    def signals(self) -> int:
        return len(self.sources)

    def read(self, joint: Floats, features: Floats) -> NDArray[np.float32]:
        """[n, K]"""
        return self.reader.read(self.sources, joint, features)

    def score(self, trees: Trees, source: Source | None) -> Floats:
        """[P, S] newest score of each branch; 1 for no source."""
        if source is None:
            return np.ones(trees.status.shape)
        return trees.signals[..., self.sources.index(source)].astype(np.float64)

    def liked(self, trees: Trees) -> Bools:
        """[P, S] branches that the answer should come from, if any of them has one."""
        return trees.finished

    def expectations(self, trees: Trees) -> tuple[Floats, Floats]:
        """The value of every branch where the policy reads it, [P, S]; nothing about lengths."""
        unknown = np.full(trees.status.shape, np.nan)
        return self.score(trees, Source.VALUE) if Source.VALUE in self.sources else unknown, unknown

    def choose(self, trees: Trees) -> Choice:
        """From the liked branches, by the chooser."""
        return self.chooser.choose(trees, self.score(trees, self.chooser.by), candidates(trees, self.liked(trees)))

"""Rules that decide how many samples to take. Shapes: P prompts, S slots."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import betainc

from ziprc.sampling.controller import Decision
from ziprc.sampling.policies.base import Baseline, Best, Selector, Source, Vote, answered, decision
from ziprc.sampling.selection import same_answer
from ziprc.sampling.tree import Bools, Trees


@dataclass(frozen=True)
class AdaptiveConsistency(Baseline):
    """`batch` samples at a time, until the leading answer is more common than the runner-up with some certainty.

    Aggarwal et al. 2023: with v1 and v2 votes, the share of the leader among the two is Beta(v1 + 1, v2 + 1); stop as soon
    as the probability that it is above one half reaches `threshold`.
    """

    threshold: float = 0.95
    k_max: int = 24
    batch: int = 1
    title: ClassVar[str] = "adaptive-consistency@{0.k_max}/{0.threshold:g}/b{0.batch}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        """Another batch, while the Beta posterior of leader against rival is below the threshold."""
        idle, used = ~trees.running.any(-1), trees.used.sum(-1)
        goal = np.full(len(trees), self.batch)
        rows = np.flatnonzero(idle & (used >= self.batch))
        voting = trees.take(rows)
        count = same_answer(voting).sum(-1)
        leader = np.take_along_axis(voting.answer, count.argmax(-1)[:, None], 1)
        rival = np.where(voting.answer != leader, count, 0)
        certainty = betainc(rival.max(-1) + 1.0, count.max(-1) + 1.0, 0.5)
        goal[rows] = used[rows] + np.where(certainty < self.threshold, self.batch, 0)
        return decision(trees, trees.running, np.minimum(goal, self.k_max) - used)


class Sequential(Baseline):
    """One sample after the other until one is `good`; dataclasses below add `k_max`."""

    k_max: int

    @abstractmethod
    def good(self, trees: Trees) -> Bools:
        """[P, S]"""

    def decide(self, trees: Trees, interval: int) -> Decision:
        more = ~trees.running.any(-1) & ~(answered(trees) & self.good(trees)).any(-1)
        return decision(trees, trees.running, more & (trees.used.sum(-1) < self.k_max))


@dataclass(frozen=True)
class SequentialStop(Sequential):
    """Until one scores at least `threshold`; the answer is the best of all so far, or a vote weighted by the score."""

    by: Source = Source.LOGISTIC
    threshold: float = 0.5
    k_max: int = 24
    vote: bool = False

    @property
    def name(self) -> str:
        return f"sequential-{self.by}@{self.k_max}/{self.threshold:g}{'/vote' if self.vote else ''}"

    @property
    def chooser(self) -> Selector:
        return Vote(self.by) if self.vote else Best(self.by)

    def good(self, trees: Trees) -> Bools:
        return self.score(trees, self.by) >= self.threshold


@dataclass(frozen=True)
class StyleStop(Sequential):
    """Until one of the given style; majority of those of this style, else of all."""

    style: int = 0
    k_max: int = 24
    looks_at: ClassVar[tuple[Source, ...]] = (Source.STYLE,)
    title: ClassVar[str] = "style-stop@{0.k_max}/{0.style}"

    def good(self, trees: Trees) -> Bools:
        return self.score(trees, Source.STYLE) == self.style

    liked = good

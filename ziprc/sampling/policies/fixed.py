"""Fixed numbers of samples, and the best that any choice among them could reach.

Shapes: P prompts, S slots, E episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ziprc.sampling.controller import Decision
from ziprc.sampling.policies.base import MAJORITY, UNKNOWN_STYLE, Baseline, Selector, Source, decision, keep_one
from ziprc.sampling.replay import Pool
from ziprc.sampling.tree import Bools, Floats, Ints, Trees


@dataclass(frozen=True)
class Fixed(Baseline):
    """k samples in parallel, to the end."""

    chooser: Selector = MAJORITY
    k: int = 1
    title: ClassVar[str] = "{0.chooser.label}@{0.k}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        return decision(trees, trees.running, self.k - trees.used.sum(-1))


@dataclass(frozen=True)
class FixedStyle(Baseline):
    """k samples of one style: others are dropped as soon as their style shows, and replaced while there are slots."""

    k: int = 4
    style: int = 0
    looks_at: ClassVar[tuple[Source, ...]] = (Source.STYLE,)
    title: ClassVar[str] = "fixed-style@{0.k}/{0.style}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        liked = self.liked(trees)
        run = trees.running & (liked | (self.score(trees, Source.STYLE) == UNKNOWN_STYLE))
        kept = run | (trees.finished & liked)
        return keep_one(decision(trees, run, self.k - kept.sum(-1)), trees)

    def liked(self, trees: Trees) -> Bools:
        return self.score(trees, Source.STYLE) == self.style


def oracle(pool: Pool, orders: Ints, k: int) -> Floats:
    """[E] the best score among the first k rollouts of each order; episodes as in `replay`."""
    return np.take_along_axis(pool.score[None], orders[..., :k], -1).max(-1).ravel().astype(np.float64)

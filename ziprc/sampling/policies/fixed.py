"""Fixed numbers of samples, and the best that any choice among them could reach.

Shapes: P prompts, S slots, E episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ziprc.sampling.controller import Decision
from ziprc.sampling.policies.base import (
    MAJORITY,
    UNKNOWN_STYLE,
    Baseline,
    Bools,
    Floats,
    Ints,
    Selecting,
    Source,
    Vote,
    decision,
    keep_one,
    started,
)
from ziprc.sampling.replay import Pool
from ziprc.sampling.tree import Trees


# Fixed numbers of samples.
@dataclass(frozen=True)
class Fixed(Selecting):
    """k samples in parallel, to the end."""

    k: int = 1

    @property
    def name(self) -> str:
        return f"{self.selector.label}@{self.k}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        return decision(trees, trees.running, self.k - started(trees))


@dataclass(frozen=True)
class FixedStyle(Baseline):
    """k samples of one style: others are dropped as soon as their style shows, and replaced while there are slots."""

    k: int = 4
    style: int = 0
    looks_at: ClassVar[tuple[Source, ...]] = (Source.STYLE,)

    @property
    def name(self) -> str:
        return f"fixed-style@{self.k}/{self.style}"

    @property
    def chooser(self) -> Vote:
        return MAJORITY

    def decide(self, trees: Trees, interval: int) -> Decision:
        open_ = self.liked(trees) | (self.score(trees, Source.STYLE) == UNKNOWN_STYLE)
        run = trees.running & open_
        kept = run | (trees.finished & self.liked(trees))
        return keep_one(decision(trees, run, self.k - kept.sum(-1)), trees)

    def liked(self, trees: Trees) -> Bools:
        return self.score(trees, Source.STYLE) == self.style


# What no policy reaches, and the settings to sweep over.
def oracle(pool: Pool, orders: Ints, k: int) -> Floats:
    """[E] the best score among the first k rollouts of each order; episodes as in `replay`."""
    return np.take_along_axis(pool.score[None], orders[..., :k], -1).max(-1).ravel().astype(np.float64)

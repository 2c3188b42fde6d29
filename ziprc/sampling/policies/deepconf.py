"""DeepConf (arXiv 2508.15260), offline and online.

Deliberate differences from the paper: confidence is the geometric mean probability of the sampled tokens in the worst
exponential window of about eight, instead of top-k log-probabilities in windows of 2,048 tokens; votes are weighted by a
power of it. Shapes: P prompts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ziprc.sampling.controller import Decision
from ziprc.sampling.policies.base import (
    Baseline,
    Bools,
    Source,
    Vote,
    answered,
    candidates,
    decision,
    lower_bound,
    power_label,
    started,
)
from ziprc.sampling.tree import Trees


@dataclass(frozen=True)
class DeepConfOffline(Baseline):
    """k samples to the end; those of the most confident share `keep` vote, weighted by confidence."""

    k: int = 8
    keep: float = 0.5
    sharpness: float = 1.0

    @property
    def name(self) -> str:
        return f"deepconf-offline@{self.k}/{self.keep:g}{power_label(self.sharpness)}"

    @property
    def chooser(self) -> Vote:
        return Vote(Source.WINDOW, self.sharpness)

    def decide(self, trees: Trees, interval: int) -> Decision:
        return decision(trees, trees.running, self.k - started(trees))

    def liked(self, trees: Trees) -> Bools:
        confidence = self.score(trees, Source.WINDOW)
        return confidence >= lower_bound(confidence, answered(trees), self.keep)[:, None]


# Rules that drop samples on the way.
@dataclass(frozen=True)
class DeepConfOnline(Baseline):
    """`warmup` samples set the bar, the others are dropped for good as soon as their worst window falls below it.

    The bar is the (1 - keep) quantile of the warm-up's confidences. After it `batch` samples run at a time, each replaced
    when it ends, until `k` have been started or the leading answer holds `consensus` (above 1: never) of the confidence of
    all finished ones, as in Algorithm 2 of the paper. At the end only those above the bar vote, warm-up included, as in the
    released code.
    """

    k: int = 16
    warmup: int = 4
    keep: float = 0.5
    consensus: float = 0.95
    batch: int = 1
    sharpness: float = 1.0

    @property
    def name(self) -> str:
        rest = f"w{self.warmup}/c{self.consensus:g}/b{self.batch}{power_label(self.sharpness)}"
        return f"deepconf-online@{self.k}/{self.keep:g}/{rest}"

    @property
    def chooser(self) -> Vote:
        return Vote(Source.WINDOW, self.sharpness)

    def decide(self, trees: Trees, interval: int) -> Decision:
        first = self._first(trees)
        warm = (trees.used | ~first).all(-1) & ~(trees.running & first).any(-1)
        run = trees.running & (first | self.liked(trees))
        spare = self.batch - run.sum(-1)
        rows = np.flatnonzero(warm & (spare > 0))  # elsewhere nothing has ended since the last look
        done = rows[self._agreed(trees.take(rows))]
        run[done] = False
        start = np.where(warm, spare, self.warmup - started(trees))
        start[done] = 0
        start = np.minimum(start, self.k - started(trees))
        return decision(trees, run, start)

    def _first(self, trees: Trees) -> Bools:
        """[1, S] the slots of the warm-up."""
        return np.arange(trees.slots)[None] < self.warmup

    def _agreed(self, trees: Trees) -> Bools:
        """[P]"""
        voters = candidates(trees, trees.finished)
        return self.chooser.choose(trees, self.score(trees, Source.WINDOW), voters).probability >= self.consensus

    def liked(self, trees: Trees) -> Bools:
        confidence = self.score(trees, Source.WINDOW)
        return confidence >= lower_bound(confidence, trees.finished & self._first(trees), self.keep)[:, None]

"""DeepConf (arXiv 2508.15260), offline and online.

Deliberate differences from the paper: confidence is the geometric mean probability of the sampled tokens in the worst
exponential window of about eight, instead of top-k log-probabilities in windows of 2,048 tokens; votes are weighted by a
power of it. Shapes: P prompts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ziprc.sampling.controller import Decision
from ziprc.sampling.policies.base import Baseline, Source, Vote, answered, candidates, decision, power_label
from ziprc.sampling.tree import Bools, Floats, Trees


def lower_bound(values: Floats, among: Bools, keep: float) -> Floats:
    """[P] the (1 - keep) quantile of `values` [P, S] over the slots of `among`; -inf where there are none."""
    ordered = np.sort(np.where(among, values, np.inf), -1)
    count = among.sum(-1)
    position = np.maximum(count - 1, 0) * (1 - keep)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    low, high = (np.take_along_axis(ordered, i[:, None], 1)[:, 0] for i in (below, above))
    with np.errstate(invalid="ignore"):  # inf - inf where there are none
        bound = low + (high - low) * (position - below)
    return np.where(count > 0, bound, -np.inf)


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
        return decision(trees, trees.running, self.k - trees.used.sum(-1))

    def liked(self, trees: Trees) -> Bools:
        confidence = self.score(trees, Source.WINDOW)
        return confidence >= lower_bound(confidence, answered(trees), self.keep)[:, None]


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
        """A warm-up of samples that run to their end; then those below its confidence stop, until the vote agrees."""
        first, started = np.arange(trees.slots) < self.warmup, trees.used.sum(-1)
        warm = (trees.used | ~first).all(-1) & ~(trees.running & first).any(-1)
        run = trees.running & (first | self.liked(trees))
        spare = self.batch - run.sum(-1)
        rows = np.flatnonzero(warm & (spare > 0))  # elsewhere nothing has ended since the last look
        voting = trees.take(rows)
        found = self.chooser.choose(voting, self.score(voting, Source.WINDOW), candidates(voting, voting.finished))
        done = rows[found.probability >= self.consensus]
        run[done] = False
        start = np.where(warm, spare, self.warmup - started)
        start[done] = 0
        return decision(trees, run, np.minimum(start, self.k - started))

    def liked(self, trees: Trees) -> Bools:
        confidence = self.score(trees, Source.WINDOW)
        warming = trees.finished & (np.arange(trees.slots) < self.warmup)
        return confidence >= lower_bound(confidence, warming, self.keep)[:, None]

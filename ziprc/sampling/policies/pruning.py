"""Rules that drop samples on the way: by value, by length, by chance. Shapes: P prompts, S slots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ziprc.sampling.controller import Decision
from ziprc.sampling.policies.base import Baseline, Source, Vote, decision, keep_one
from ziprc.sampling.tree import Bools, Floats, Trees


@dataclass(frozen=True)
class Pruning(Baseline):
    """k samples in parallel, some of which are dropped; never the last one while nothing is finished."""

    k: int = 8

    @abstractmethod
    def keep(self, trees: Trees) -> Bools:
        """[P, S]"""

    def preference(self, trees: Trees) -> Floats | None:
        """[P, S] who stays when all would be dropped; None: the first."""
        return None

    def decide(self, trees: Trees, interval: int) -> Decision:
        """A branch of one token is kept: nothing has been read of it yet but the prompt."""
        run = trees.running & (self.keep(trees) | (trees.generated <= 1))
        return keep_one(decision(trees, run, self.k - trees.used.sum(-1)), trees, self.preference(trees))


@dataclass(frozen=True)
class ValuePruning(Pruning):
    """Drops branches whose expected reward is below `threshold`; vote weighted by it."""

    threshold: float = 0.25
    chooser: ClassVar[Vote] = Vote(Source.VALUE)
    title: ClassVar[str] = "value-pruning@{0.k}/{0.threshold:g}"

    def keep(self, trees: Trees) -> Bools:
        return self.preference(trees) >= self.threshold

    def preference(self, trees: Trees) -> Floats:
        return self.score(trees, Source.VALUE)


@dataclass(frozen=True)
class LengthPruning(Pruning):
    """Drops branches that are not finished after `cap` tokens."""

    cap: int = 1 << 30
    title: ClassVar[str] = "length-pruning@{0.k}/{0.cap}"

    def keep(self, trees: Trees) -> Bools:
        return trees.length < self.cap


@dataclass(frozen=True)
class RandomPruning(Pruning):
    """Drops each branch with probability `rate` at every decision: the control for all other pruning.

    Chance is a hash of (seed, prompt, slot, length), so a run can be repeated exactly whatever else is in the batch; the
    prompt is known by the entropy of its own reading.
    """

    rate: float = 0.05
    seed: int = 0
    looks_at: ClassVar[tuple[Source, ...]] = (Source.ENTROPY,)
    title: ClassVar[str] = "random-pruning@{0.k}/{0.rate:g}/s{0.seed}"

    def keep(self, trees: Trees) -> Bools:
        entropy = trees.root[:, self.sources.index(Source.ENTROPY)]
        prompt = np.ascontiguousarray(entropy, np.float32).view(np.uint32)
        parts = (prompt[:, None], np.arange(trees.slots)[None], trees.length)
        return hashed_uniform(self.seed, parts) >= self.rate


def hashed_uniform(seed: int, parts: Iterable[NDArray]) -> Floats:
    """Numbers in [0, 1) from integers, mixed one after the other as in SplitMix64 (Steele et al. 2014)."""
    state = np.full((1, 1), seed, np.uint64)
    for part in parts:
        x = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = x ^ (x >> np.uint64(31))
    return (state >> np.uint64(11)) * 2.0**-53

"""Rules that drop samples on the way: by value, by length, by chance. Shapes: P prompts, S slots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ziprc.sampling.controller import Decision
from ziprc.sampling.policies.base import (
    MAJORITY,
    Baseline,
    Bools,
    Floats,
    Selector,
    Source,
    Vote,
    decision,
    keep_one,
    started,
)
from ziprc.sampling.tree import Trees


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
        return keep_one(decision(trees, run, self.k - started(trees)), trees, self.preference(trees))

    @property
    def chooser(self) -> Selector:
        return MAJORITY


@dataclass(frozen=True)
class ValuePruning(Pruning):
    """Drops branches whose expected reward is below `threshold`; vote weighted by it."""

    threshold: float = 0.25

    @property
    def name(self) -> str:
        return f"value-pruning@{self.k}/{self.threshold:g}"

    @property
    def chooser(self) -> Selector:
        return Vote(Source.VALUE)

    def keep(self, trees: Trees) -> Bools:
        return self.preference(trees) >= self.threshold

    def preference(self, trees: Trees) -> Floats:
        return self.score(trees, Source.VALUE)


@dataclass(frozen=True)
class LengthPruning(Pruning):
    """Drops branches that are not finished after `cap` tokens."""

    cap: int = 1 << 30

    @property
    def name(self) -> str:
        return f"length-pruning@{self.k}/{self.cap}"

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

    @property
    def name(self) -> str:
        return f"random-pruning@{self.k}/{self.rate:g}/s{self.seed}"

    def keep(self, trees: Trees) -> Bools:
        entropy = trees.root[:, self.sources.index(Source.ENTROPY)]
        prompt = np.ascontiguousarray(entropy, np.float32).view(np.uint32)
        parts = (prompt[:, None], np.arange(trees.slots)[None], trees.length)
        return hashed_uniform(self.seed, parts) >= self.rate


def hashed_uniform(seed: int, parts: Iterable[NDArray]) -> Floats:
    """Numbers in [0, 1) from integers, mixed one after the other as in SplitMix64 (Steele et al. 2014)."""
    state = np.full((1, 1), seed, np.uint64)
    for part in parts:
        state = _mix(state ^ part.astype(np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

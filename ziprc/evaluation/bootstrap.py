"""Intervals over prompts: rollouts of one prompt are not independent, so prompts are what is resampled.

A replicate draws as many prompts as there are, with replacement; in code it is a vector of counts, one per prompt.
Every statistic is computed for all replicates at once: sums over rollouts become per-prompt sums times the counts
(one matrix product), and only what is not a function of sums (AUROC) has code of its own. All statistics of one
`Resampling` share the same draws, so a difference of two estimates is paired. Intervals are percentile intervals; for
ECE and total variation (absolute values of noisy sums) they sit on the high side, which is the careful side. Row 0 of
every array of replicates is the sample itself. Shapes: n rollouts, P prompts, S = 1 + replicates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DECIMALS = 6  # of a number in a record
MIN_DEFINED = 0.5  # an interval needs this share of replicates in which the statistic exists


def rounded(number: float) -> float | None:
    """A JSON number; None for what does not exist (NaN, infinite)."""
    return round(float(number), DECIMALS) if np.isfinite(number) else None


@dataclass(frozen=True)
class Estimate:
    """A statistic of the sample (entry 0) and of its replicates, [S]."""

    values: NDArray[np.float64]

    @property
    def value(self) -> float:
        return float(self.values[0])

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.values - other.values)

    def interval(self, confidence: float = 0.95) -> dict[str, float | None]:
        """{"value", "low", "high"}; None where undefined, such as an AUROC without failures."""
        draws = self.values[1:][np.isfinite(self.values[1:])]
        if not np.isfinite(self.value) or len(draws) < MIN_DEFINED * (len(self.values) - 1):
            return {"value": rounded(self.value), "low": None, "high": None}
        low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
        return {"value": rounded(self.value), "low": rounded(low), "high": rounded(high)}


def quotient(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> Estimate:
    """Top over bottom, [S] each; a division by zero gives NaN, which `interval` reports as undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return Estimate(top / bottom)


def target_record(name: str, target: float, result: Any, at_least: bool = True) -> dict[str, Any]:
    """A row of `headline`: a number or interval that has to reach a target; `met` is None where there is no number."""
    found = result["value"] if isinstance(result, Mapping) else result
    met = None if found is None else bool(found >= target if at_least else found <= target)
    direction = "at least" if at_least else "at most"
    return {"name": name, "target": target, "direction": direction, "result": result, "met": met}


class Resampling:
    """Counts of every prompt in every replicate; `group` says which prompt a rollout belongs to."""

    def __init__(self, group: ArrayLike, replicates: int, seed: int, prompts: int | None = None) -> None:
        self.group: NDArray[np.int64] = np.asarray(group, dtype=np.int64)
        self.prompts = int(self.group.max()) + 1 if prompts is None else prompts
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(self.prompts, np.full(self.prompts, 1 / self.prompts), size=replicates)
        self.counts: NDArray[np.float32] = np.concatenate([np.ones((1, self.prompts)), draws]).astype(np.float32)

    def subset(self, rollouts: NDArray[np.bool_]) -> Resampling:
        """The same draws of prompts, for some of the rollouts."""
        part = copy.copy(self)
        part.group = self.group[rollouts]
        return part

    def totals(self, *columns: ArrayLike) -> NDArray[np.float64]:
        """[M, S] weighted sums of M per-rollout columns [n]."""
        return self.prompt_totals(*(np.bincount(self.group, column, self.prompts) for column in columns))

    def prompt_totals(self, *columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """[M, S] weighted sums of M per-prompt columns [P]."""
        return (self.counts.astype(np.float64) @ np.stack(columns, -1)).T

    def ratio(self, numerator: ArrayLike, denominator: ArrayLike | None = None) -> Estimate:
        """Σ numerator / Σ denominator over rollouts; without a denominator, the mean."""
        return quotient(*self.totals(numerator, np.ones(len(self.group)) if denominator is None else denominator))

"""How well a prediction separates and orders outcomes: of reward (right or wrong) and of remaining length.

A success is a score of at least one half, and so is a predicted success; Brier score and ECE (calibration.py) use
the score itself. "Within prompt" AUROC counts only pairs of a success and a failure of the same prompt: it asks which
*sample* is wrong, where plain AUROC also rewards knowing which *prompt* is hard. Shapes: n rollouts, S replicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ziprc.evaluation.bootstrap import Estimate, Resampling

SUCCESS = 0.5  # scores and predictions from here on are successes
REPLICATES_AT_ONCE = 64  # keeps a block of weights inside the cache


def auroc(boot: Resampling, prediction: ArrayLike, success: ArrayLike) -> Estimate:
    """Chance that a random success is predicted above a random failure; ties count one half.

    One sort for all replicates: the weight of the failures below each success is a weighted cumulative sum.
    """
    p, good = np.asarray(prediction, dtype=np.float64), np.asarray(success, dtype=bool)
    order = np.argsort(p, kind="stable")
    failures, successes = order[~good[order]], order[good[order]]
    below = np.searchsorted(p[failures], p[successes], side="left")
    upto = np.searchsorted(p[failures], p[successes], side="right")
    out = np.full(len(boot.counts), np.nan)
    if not len(failures) or not len(successes):
        return Estimate(out)
    for start in range(0, len(out), REPLICATES_AT_ONCE):
        weight = np.ascontiguousarray(boot.counts[start : start + REPLICATES_AT_ONCE].T)
        lost, won = weight[boot.group[failures]], weight[boot.group[successes]]
        cumulative = np.concatenate([np.zeros_like(lost[:1]), np.cumsum(lost, axis=0)])
        pairs = (won * (cumulative[below] + cumulative[upto])).sum(0, dtype=np.float64) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            out[start : start + REPLICATES_AT_ONCE] = pairs / (won.sum(0, dtype=np.float64) * cumulative[-1])
    return Estimate(out)


def ranks_within(group: NDArray[np.int64], prediction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank from 1 of each prediction inside its group; ties share the mean rank."""
    order = np.lexsort((prediction, group))
    g, p = group[order], prediction[order]
    new_group = np.r_[True, g[1:] != g[:-1]]
    new_value = new_group | np.r_[True, p[1:] != p[:-1]]
    place = np.arange(len(g)) - np.flatnonzero(new_group)[np.cumsum(new_group) - 1] + 1
    tie = np.cumsum(new_value) - 1
    mean_place = np.bincount(tie, weights=place) / np.bincount(tie)
    ranks = np.empty(len(g))
    ranks[order] = mean_place[tie]
    return ranks


def within_prompt_auroc(boot: Resampling, prediction: ArrayLike, success: ArrayLike) -> Estimate:
    """AUROC over the pairs of a success and a failure of the same prompt, all pairs alike."""
    good = np.asarray(success, dtype=np.float64)
    ranks = ranks_within(boot.group, np.asarray(prediction, dtype=np.float64))
    n_good, n_all, rank_sum = (
        np.bincount(boot.group, w, boot.prompts) for w in (good, np.ones_like(good), good * ranks)
    )
    won, pairs = rank_sum - n_good * (n_good + 1) / 2, n_good * (n_all - n_good)
    return boot.quotient(lambda t: t[:, 0] / t[:, 1], boot.prompt_totals(np.stack([won, pairs], -1)))


def threshold_metrics(boot: Resampling, prediction: ArrayLike, success: ArrayLike) -> dict[str, Estimate]:
    """F1 of successes, accuracy, and recall of failures at one half."""
    said, good = np.asarray(prediction) >= SUCCESS, np.asarray(success, dtype=bool)
    cells = np.stack([said & good, said & ~good, ~said & good, ~said & ~good], -1).astype(np.float64)
    totals = boot.totals(cells)
    return {
        "f1": boot.quotient(lambda t: 2 * t[:, 0] / (2 * t[:, 0] + t[:, 1] + t[:, 2]), totals),
        "accuracy": boot.quotient(lambda t: (t[:, 0] + t[:, 3]) / t.sum(1), totals),
        "recall_of_failures": boot.quotient(lambda t: t[:, 3] / (t[:, 1] + t[:, 3]), totals),
    }


@dataclass(frozen=True)
class LengthPrediction:
    """Predicted remaining length at one moment: bin, median and 80 % interval, all [n]."""

    bin: NDArray[np.int64]
    median: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def length_metrics(
    boot: Resampling,
    predicted: LengthPrediction,
    remaining: NDArray[np.int64],
    remaining_bin: NDArray[np.int64],
    constant: float,
    majority_bin: int,
) -> dict[str, Estimate]:
    """Bin accuracy beside the share of the commonest training bin, MAE of the median beside that of the best constant.

    Lengths are whole tokens and bins half-open, so length r fills [r, r + 1) of the continuous axis on which quantiles
    are read: quantiles are floored before they are compared.
    """
    median, low, high = (np.floor(q) for q in (predicted.median, predicted.low, predicted.high))
    columns = np.stack(
        [
            predicted.bin == remaining_bin,
            remaining_bin == majority_bin,
            np.abs(median - remaining),
            np.abs(constant - remaining),
            (low <= remaining) & (remaining <= high),
            np.ones(len(remaining)),
        ],
        -1,
    ).astype(np.float64)
    totals = boot.totals(columns)
    names = ("bin_accuracy", "majority_bin_share", "median_mae", "constant_mae", "coverage_80")
    means = {name: boot.quotient(lambda t, i=i: t[:, i] / t[:, -1], totals) for i, name in enumerate(names)}
    return means | {"mae_gain": boot.quotient(lambda t: 1 - t[:, 2] / t[:, 3], totals)}

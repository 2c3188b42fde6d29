"""How well a prediction separates and orders outcomes: of reward (right or wrong) and of remaining length.

A success is a score of at least one half, and so is a predicted success; Brier score and ECE (calibration.py) use
the score itself. "Within prompt" AUROC counts only pairs of a success and a failure of the same prompt: it asks which
*sample* is wrong, where plain AUROC also rewards knowing which *prompt* is hard. Shapes: n rollouts, S replicates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ziprc.evaluation.bootstrap import Estimate, Resampling, quotient
from ziprc.joint.distribution import JointDistribution

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


def within_prompt_auroc(boot: Resampling, prediction: ArrayLike, success: ArrayLike) -> Estimate:
    """AUROC over the pairs of a success and a failure of the same prompt, all pairs alike."""
    good = np.asarray(success, dtype=np.float64)
    values, level = np.unique(prediction, return_inverse=True)
    _, tie, size = np.unique(boot.group * len(values) + level, return_inverse=True, return_counts=True)
    samples = np.bincount(boot.group, minlength=boot.prompts)
    rank = (np.cumsum(size) - (size - 1) / 2)[tie]  # by prompt, then by prediction; ties share the mean rank
    rank -= (np.cumsum(samples) - samples)[boot.group]
    n_good, rank_sum = (np.bincount(boot.group, w, boot.prompts) for w in (good, good * rank))
    return quotient(*boot.prompt_totals(rank_sum - n_good * (n_good + 1) / 2, n_good * (samples - n_good)))


def threshold_metrics(boot: Resampling, prediction: ArrayLike, success: ArrayLike) -> dict[str, Estimate]:
    """F1 of successes, accuracy, and recall of failures at one half."""
    said, good = np.asarray(prediction) >= SUCCESS, np.asarray(success, dtype=bool)
    right, raised, missed, refused = boot.totals(said & good, said & ~good, ~said & good, ~said & ~good)
    return {
        "f1": quotient(2 * right, 2 * right + raised + missed),
        "accuracy": quotient(right + refused, right + raised + missed + refused),
        "recall_of_failures": quotient(refused, raised + refused),
    }


def length_metrics(
    boot: Resampling, predicted: JointDistribution, remaining: NDArray[np.int64], constant: float, majority_bin: int
) -> dict[str, Estimate]:
    """Bin accuracy beside the share of the commonest training bin, MAE of the median beside that of the best constant.

    Lengths `remaining` [n] are whole tokens and bins half-open, so length r fills [r, r + 1) of the continuous axis on which
    the quantiles of the joints [n, R·L] are read: they are floored before they are compared.
    """
    low, median, high = (np.floor(predicted.length_quantile(level)) for level in (0.1, 0.5, 0.9))
    real = predicted.grid.length_bin(remaining)
    columns = {
        "bin_accuracy": predicted.length_marginal().argmax(-1) == real,
        "majority_bin_share": real == majority_bin,
        "median_mae": np.abs(median - remaining),
        "constant_mae": np.abs(constant - remaining),
        "coverage_80": (low <= remaining) & (remaining <= high),
    }
    *sums, count = boot.totals(*columns.values(), np.ones(len(remaining)))
    totals = dict(zip(columns, sums, strict=True))
    left = quotient(totals["median_mae"], totals["constant_mae"])
    return {name: quotient(total, count) for name, total in totals.items()} | {"mae_gain": Estimate(1 - left.values)}


def majority_scores(
    group: NDArray[np.int64], answers: Sequence[str | None], score: NDArray[np.float64], prompts: int | None = None
) -> NDArray[np.float64]:
    """[P] score of the commonest answer of each of the `prompts`; tied answers share, no answer at all scores 0."""
    votes: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for g, answer, s in zip(group.tolist(), answers, score.tolist(), strict=True):
        if answer is not None:
            votes[g][answer].append(s)
    out = np.zeros(int(group.max()) + 1 if prompts is None else prompts)
    for g, ballot in votes.items():
        top = max(len(scores) for scores in ballot.values())
        out[g] = np.mean([np.mean(scores) for scores in ballot.values() if len(scores) == top])
    return out

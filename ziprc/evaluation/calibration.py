"""Do the probabilities mean what they say: Brier score, ECE, reliability curves, and the joint against many rollouts.

The total variation between a predicted joint and the histogram of n rollouts is above zero even when the prediction
is exact, because n is finite. So every total variation has its floor beside it: the mean distance of an equally large
sample that is drawn from the prediction itself. Shapes: n rollouts, P prompts, K calibration bins, C cells of a
joint.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ziprc.evaluation.bootstrap import Estimate, Resampling, quotient, rounded

FLOOR_DRAWS = 200  # samples per prompt behind the finite-sample floor
CURVE_GROUPS = 10  # equally large groups in the curve of predicted against real length


def probability_bin(prediction: ArrayLike, bins: int) -> NDArray[np.int64]:
    """Equally wide bins of [0, 1]; 1 belongs to the last."""
    return np.minimum((np.asarray(prediction) * bins).astype(np.int64), bins - 1)


def calibration_metrics(boot: Resampling, prediction: ArrayLike, score: ArrayLike, bins: int) -> dict[str, Estimate]:
    """Brier score and expected calibration error (mean |predicted − observed| over equally wide bins)."""
    p, y = np.asarray(prediction, dtype=np.float64), np.asarray(score, dtype=np.float64)
    inside = probability_bin(p, bins) == np.arange(bins)[:, None]
    *gaps, count = boot.totals(*(inside * (p - y)), np.ones_like(p))
    return {"brier": boot.ratio((p - y) ** 2), "ece": quotient(np.abs(np.stack(gaps, -1)).sum(-1), count)}


def reliability_curve(
    boot: Resampling, prediction: ArrayLike, score: ArrayLike, bins: int, confidence: float
) -> list[dict[str, Any]]:
    """One record per bin that is not empty: mean prediction, mean score with interval, and how many rollouts."""
    p, y = np.asarray(prediction, dtype=np.float64), np.asarray(score, dtype=np.float64)
    which, records = probability_bin(p, bins), []
    for inside in (which == k for k in np.unique(which)):
        observed = boot.ratio(np.where(inside, y, 0.0), inside).interval(confidence)
        records.append({"predicted": rounded(p[inside].mean()), "count": int(inside.sum()), "observed": observed})
    return records


def length_curve(median: NDArray[np.float64], remaining: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Equally large groups by predicted median: its mean, and the 10, 50 and 90 % points of the real length."""
    records = []
    for group in filter(len, np.array_split(np.argsort(median, kind="stable"), CURVE_GROUPS)):
        real = [rounded(q) for q in np.quantile(remaining[group], [0.1, 0.5, 0.9])]
        records.append({"predicted": rounded(median[group].mean()), "count": len(group), "real": real})
    return records


def total_variation(p: NDArray[np.floating], q: NDArray[np.floating]) -> NDArray[np.float64]:
    """Half the L1 distance along the last axis."""
    return np.abs(p - q).sum(-1, dtype=np.float64) / 2


def empirical_joint(group: NDArray[np.int64], cell: NDArray[np.int64], prompts: int, cells: int) -> NDArray[np.float64]:
    """[P, C] shares of the cells in the rollouts of each prompt."""
    counts = np.bincount(group * cells + cell, minlength=prompts * cells).reshape(prompts, cells)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def sampling_floor(predicted: NDArray[np.floating], samples: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """[P] mean total variation between each prediction [P, C] and `samples` draws from it."""
    rng = np.random.default_rng(seed)
    exact = predicted.astype(np.float64)
    exact = exact / exact.sum(-1, keepdims=True)
    drawn = ((rng.multinomial(n, q, FLOOR_DRAWS) / n, q) for n, q in zip(samples.tolist(), exact, strict=True))
    return np.array([total_variation(*pair).mean() for pair in drawn])

"""How near a grader's totals are to the teacher's, on responses to held-out prompts; and whether it finds what it is for.

What a grader is for are right answers whose work is unsound, so beside the distance stands the F1 of finding these, once at less
than full marks (a total below them by half of the smallest item or more) and once at less than half. Beside both stand the
best that can be done without looking: the constant total that is paid most, and calling every right answer unsound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ziprc.evaluation.bootstrap import Estimate, Resampling, quotient, rounded
from ziprc.rewards.rubric import read_total
from ziprc.rewards.totals import best_constant
from ziprc.tables.rollouts import FinishReason

HALF = 0.5
EXACT = 0.005  # totals nearer than this are the same


def graded(gradings: pa.Table, rollouts: pa.Table, replicates: int, seed: int, confidence: float) -> dict[str, Any]:
    """The record of one grader, from the questions (with the teacher's scores) and what it wrote."""
    said = {row["prompt_id"]: row for row in rollouts.to_pylist()}
    rows = [row for row in gradings.to_pylist() if row["prompt_id"] in said]
    extra = [json.loads(row["extra"]) for row in rows]
    target = np.array([float(row["answer"]) for row in rows])
    scores = [_score(said[row["prompt_id"]]) for row in rows]
    read = np.array([score is not None for score in scores])
    score = np.array([np.nan if s is None else s for s in scores])
    prompts = {name: n for n, name in enumerate(dict.fromkeys(e["prompt_id"] for e in extra))}
    boot = Resampling([prompts[e["prompt_id"]] for e in extra], replicates, seed, len(prompts))
    gap = np.where(read, np.abs(score - target), 0.0)
    paid = np.where(read, (1 - gap) ** 2, 0.0)
    constant, mean = best_constant(target.tolist())
    right = np.array([bool(e["right"]) for e in extra])
    full = 1 - np.array([e["half_an_item"] for e in extra])
    unsound = right & (target < full)
    found: dict[str, Estimate] = {
        "parsed": boot.ratio(read), "mae": boot.ratio(gap, read), "exact": boot.ratio(read & (gap < EXACT), read),
        "reward": boot.ratio(paid), "constant_mae": boot.ratio(np.abs(target - np.median(target))),
        "f1": f1(boot, right, unsound, read & (score < full)), "f1_at_half": f1(boot, right, unsound, read & (score < HALF)),
        "f1_of_all": f1(boot, right, unsound, np.ones(len(rows), bool)),
        "right_mae": boot.ratio(gap * right, read & right), "bias": boot.ratio(np.where(read, score - target, 0.0), read),
    }  # fmt: skip
    return {name: one.interval(confidence) for name, one in found.items()} | {
        "responses": len(rows), "prompts": len(prompts), "constant": constant, "constant_reward": rounded(mean),
        "spearman": spearman(score[read], target[read]),
        "calibration": calibration(score[read], target[read]),
        "tokens": rounded(float(np.mean([len(said[row["prompt_id"]]["response_token_ids"]) for row in rows]))),
    }  # fmt: skip


def spearman(score: NDArray[np.float64], target: NDArray[np.float64]) -> float | None:
    """Of the grader's and the teacher's ranks; None where either is a constant."""
    if min(len(set(score.tolist())), len(set(target.tolist()))) < 2:
        return None
    return rounded(spearmanr(score, target).statistic)


def _score(row: Mapping[str, Any]) -> float | None:
    return read_total(row["response_text"], row["finish_reason"] == FinishReason.STOP).score


def f1(boot: Resampling, among: NDArray[np.bool_], positive: NDArray[np.bool_], called: NDArray[np.bool_]) -> Estimate:
    """2·hits over what is there and what was called, among some rows."""
    hits, there, said = boot.totals(among & positive & called, among & positive, among & called)
    return quotient(2 * hits, there + said)


def calibration(score: Sequence[float], target: Sequence[float]) -> list[list[float | None]]:
    """The teacher's mean score for every tenth that the grader gave: [said, mean, how many]."""
    said = np.round(np.asarray(score) * 10).astype(int)
    truth = np.asarray(target)
    return [
        [tenth / 10, rounded(truth[said == tenth].mean()), int((said == tenth).sum())]
        for tenth in sorted(set(said.tolist()))
    ]

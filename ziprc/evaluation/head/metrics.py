"""The records of metrics/zip-rc.json: what was measured, with intervals, nested by who predicted and when.

    experiment, confidence, replicates
    counts       prompts, rollouts, tokens generated and trained
    headline     [{name, target, direction, result, met}]          the targets of the `toy` scale
    prediction   {predictor: {moment: {auroc, within_prompt_auroc, f1, accuracy, recall_of_failures, brier, ece,
                              reliability: [{predicted, count, observed}]}}}
    difference   {predictor: {moment: {auroc, within_prompt_auroc, brier}}}   ziprc minus predictor, paired
    length       {head: {moment: {bin_accuracy, majority_bin_share, median_mae, constant_mae, mae_gain, coverage_80,
                         constant, curve: [{predicted, count, real: [10 %, 50 %, 90 %]}]}}}
    joint        {head: {start_tv, floor, excess, constant_tv, reward_tv, length_tv, prompts, samples}}
    drift        {kl, rollouts, states}                            nats per token
    policy       {base, ziprc, difference, prompts}                pass@1 on the same prompts
    base         description.py; base.cells: per difficulty

Every number with uncertainty is {"value", "low", "high"}; null means undefined (no failures, say).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.config.shared import Evaluate
from ziprc.evaluation import accuracy, calibration
from ziprc.evaluation.bootstrap import Resampling, quotient, rounded, target_record
from ziprc.evaluation.outcomes import MOMENTS, Outcomes
from ziprc.joint.distribution import JointDistribution

COMPARED = ("auroc", "within_prompt_auroc", "brier")
MAIN = "ziprc"
LOSS_MARGIN = 0.02  # two points of pass@1: an interval that reaches further down cannot tell "no loss" from a loss
Predictions = Mapping[tuple[str, str], NDArray[np.float64]]


def prediction_records(
    boot: Resampling, predictions: Predictions, outcomes: Outcomes, own: Evaluate
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records `prediction` and `difference`."""
    success, score, bins = outcomes.success, outcomes.score, own.ece_bins
    estimates = {
        key: {
            "auroc": accuracy.auroc(boot, prediction, success),
            "within_prompt_auroc": accuracy.within_prompt_auroc(boot, prediction, success),
            **accuracy.threshold_metrics(boot, prediction, success),
            **calibration.calibration_metrics(boot, prediction, score, bins),
        }
        for key, prediction in predictions.items()
    }
    records: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for (name, moment), found in estimates.items():
        record: dict[str, Any] = {metric: estimate.interval(own.confidence) for metric, estimate in found.items()}
        record["reliability"] = calibration.reliability_curve(
            boot, predictions[name, moment], score, bins, own.confidence
        )
        records.setdefault(name, {})[moment] = record
        if name != MAIN:
            main = estimates[MAIN, moment]
            gaps = {metric: (main[metric] - found[metric]).interval(own.confidence) for metric in COMPARED}
            differences.setdefault(name, {})[moment] = gaps
    return records, differences


def length_records(
    boot: Resampling,
    joint: JointDistribution,
    remaining: NDArray[np.int64],
    trained: NDArray[np.int64],
    confidence: float,
) -> dict[str, Any]:
    """One head's record under `length`, of finished rollouts only.

    `joint` is [n, M, R·L] and `remaining` [n, M]; `trained` [N, M] are the remaining lengths of the training rollouts, whose
    best constant and commonest bin at each moment are what a prediction is compared with.
    """
    records = {}
    for k, moment in enumerate(MOMENTS):
        predicted, real = JointDistribution(joint.grid, joint.probabilities[:, k]), remaining[:, k]
        constant, majority = float(np.median(trained[:, k])), np.bincount(joint.grid.length_bin(trained[:, k])).argmax()
        found = accuracy.length_metrics(boot, predicted, real, constant, int(majority))
        record: dict[str, Any] = {name: estimate.interval(confidence) for name, estimate in found.items()}
        curve = calibration.length_curve(predicted.median_remaining(), real)
        records[moment] = record | {"constant": constant, "curve": curve}
    return records


def joint_record(
    predicted: JointDistribution,
    group: NDArray[np.int64],
    cell: NDArray[np.int64],
    constant: NDArray[np.float64],
    own: Evaluate,
    seed: int,
) -> dict[str, Any]:
    """Total variation of the start joints [P, R·L] against the histograms of many rollouts, beside its floor.

    Of each of the many rollouts, `group` is the number of its prompt and `cell` where it lies on the grid.
    """
    prompts = len(predicted.probabilities)
    samples = np.bincount(group, minlength=prompts)
    seen = JointDistribution(predicted.grid, calibration.empirical_joint(group, cell, prompts, predicted.grid.size))
    columns = {
        "start_tv": calibration.total_variation(predicted.probabilities, seen.probabilities),
        "floor": calibration.sampling_floor(predicted.probabilities, samples, seed),
        "constant_tv": calibration.total_variation(constant, seen.probabilities),
        "reward_tv": calibration.total_variation(predicted.reward_marginal(), seen.reward_marginal()),
        "length_tv": calibration.total_variation(predicted.length_marginal(), seen.length_marginal()),
    }
    columns["excess"] = columns["start_tv"] - columns["floor"]
    boot = Resampling(np.arange(prompts), own.bootstrap, seed)
    record: dict[str, Any] = {name: boot.ratio(values).interval(own.confidence) for name, values in columns.items()}
    return record | {"prompts": prompts, "samples": rounded(samples.mean())}


def policy_record(base: Outcomes, tuned: Outcomes, own: Evaluate, seed: int) -> dict[str, Any]:
    """pass@1 of the base and of the model with the head, on the prompts that both answered, paired."""
    names = sorted(set(base.prompt_ids.to_pylist()) & set(tuned.prompt_ids.to_pylist()))
    number = {name: i for i, name in enumerate(names)}
    columns = []
    for outcomes in (base, tuned):
        group = np.array([number.get(p, -1) for p in outcomes.prompt_ids.to_pylist()])[outcomes.group]
        known = group >= 0
        columns += [np.bincount(group[known], w, len(names)) for w in (outcomes.score[known], np.ones(known.sum()))]
    right, asked, right_after, asked_after = Resampling(np.arange(len(names)), own.bootstrap, seed).prompt_totals(
        *columns
    )
    before, after = quotient(right, asked), quotient(right_after, asked_after)
    found = {"base": before, "ziprc": after, "difference": after - before}
    return {name: estimate.interval(own.confidence) for name, estimate in found.items()} | {"prompts": len(names)}


def no_loss(difference: Mapping[str, float | None]) -> bool | None:
    """Whether nothing was lost: False when the whole interval lies below zero, None when it is too wide to say."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return None
    return False if high < 0 else True if low >= -LOSS_MARGIN else None


def headline(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline numbers against the targets of the `toy` scale; what is shown of them, `evaluate.targets` says."""
    prediction, length, loss = metrics["prediction"][MAIN], metrics["length"][MAIN], metrics["policy"]["difference"]
    start, end = prediction["start"], prediction["end"]
    worst_ece = max((prediction[m]["ece"] for m in MOMENTS), key=lambda r: r["value"] or 0.0)
    return [
        target_record("AUROC of the expected score before the first token", 0.80, start["auroc"]),
        target_record("AUROC of the expected score at the end", 0.90, end["auroc"]),
        target_record("AUROC within a prompt at the end", 0.80, end["within_prompt_auroc"]),
        target_record("largest ECE over the moments", 0.04, worst_ece, at_least=False),
        target_record("median length: MAE below the best constant at the start", 0.20, length["start"]["mae_gain"]),
        target_record("KL drift, nats per token", 0.01, metrics["drift"]["kl"], at_least=False),
        target_record("pass@1 after minus before", 0.0, loss) | {"met": no_loss(loss)},
    ]

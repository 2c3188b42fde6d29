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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.evaluation.accuracy import (
    LengthPrediction,
    auroc,
    length_metrics,
    threshold_metrics,
    within_prompt_auroc,
)
from ziprc.evaluation.bootstrap import Estimate, Resampling, rounded
from ziprc.evaluation.calibration import (
    calibration_metrics,
    empirical_joint,
    length_curve,
    reliability_curve,
    sampling_floor,
    total_variation,
)
from ziprc.evaluation.outcomes import MOMENTS, Outcomes
from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution

COMPARED = ("auroc", "within_prompt_auroc", "brier")
MAIN = "ziprc"
LOSS_MARGIN = 0.02  # two points of pass@1: an interval that reaches further down cannot tell "no loss" from a loss
Predictions = Mapping[tuple[str, str], NDArray[np.float64]]


@dataclass(frozen=True)
class Measure:
    """How intervals and bins are made."""

    confidence: float
    ece_bins: int


def reward_estimates(
    boot: Resampling, prediction: NDArray, outcomes: Outcomes, measure: Measure
) -> dict[str, Estimate]:
    """All estimates of one predictor at one moment."""
    return {
        "auroc": auroc(boot, prediction, outcomes.success),
        "within_prompt_auroc": within_prompt_auroc(boot, prediction, outcomes.success),
        **threshold_metrics(boot, prediction, outcomes.success),
        **calibration_metrics(boot, prediction, outcomes.score, measure.ece_bins),
    }


def prediction_records(
    boot: Resampling, predictions: Predictions, outcomes: Outcomes, measure: Measure
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The records `prediction` and `difference`."""
    estimates = {key: reward_estimates(boot, p, outcomes, measure) for key, p in predictions.items()}
    records: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for (name, moment), found in estimates.items():
        record = {metric: estimate.interval(measure.confidence) for metric, estimate in found.items()}
        curve = reliability_curve(boot, predictions[name, moment], outcomes.score, measure.ece_bins, measure.confidence)
        records.setdefault(name, {})[moment] = record | {"reliability": curve}
        if name != MAIN:
            main = estimates[MAIN, moment]
            gaps = {metric: (main[metric] - found[metric]).interval(measure.confidence) for metric in COMPARED}
            differences.setdefault(name, {})[moment] = gaps
    return records, differences


@dataclass(frozen=True)
class LengthReference:
    """What training rollouts alone say about remaining length at each moment: best constant and commonest bin."""

    constant: NDArray[np.float64]
    majority_bin: NDArray[np.int64]

    @classmethod
    def fit(cls, remaining: NDArray[np.int64], grid: BinGrid) -> LengthReference:
        """From the remaining lengths [n, M] of finished training rollouts."""
        bins = grid.length_bin(remaining)
        majority = [np.bincount(bins[:, k], minlength=grid.L).argmax() for k in range(bins.shape[1])]
        return cls(np.median(remaining, axis=0), np.array(majority))


def length_records(
    boot: Resampling,
    joint: JointDistribution,
    remaining: NDArray[np.int64],
    reference: LengthReference,
    confidence: float,
) -> dict[str, Any]:
    """One head's record under `length`; `joint` is [n, M, R·L] and `remaining` [n, M], finished rollouts only."""
    marginal_bin = joint.length_marginal().argmax(-1)
    median, low, high = joint.median_remaining(), joint.length_quantile(0.1), joint.length_quantile(0.9)
    real_bin = joint.grid.length_bin(remaining)
    records = {}
    for k, moment in enumerate(MOMENTS):
        predicted = LengthPrediction(marginal_bin[:, k], median[:, k], low[:, k], high[:, k])
        constant, majority = float(reference.constant[k]), int(reference.majority_bin[k])
        found = length_metrics(boot, predicted, remaining[:, k], real_bin[:, k], constant, majority)
        records[moment] = {name: estimate.interval(confidence) for name, estimate in found.items()}
        records[moment] |= {"constant": constant, "curve": length_curve(median[:, k], remaining[:, k])}
    return records


@dataclass(frozen=True)
class ManyRollouts:
    """Many rollouts of some prompts: prompt number and grid cell of each."""

    group: NDArray[np.int64]
    cell: NDArray[np.int64]


def joint_record(
    predicted: JointDistribution,
    many: ManyRollouts,
    constant: NDArray[np.float64],
    replicates: int,
    seed: int,
    confidence: float,
) -> dict[str, Any]:
    """Total variation of the start joints [P, R·L] against the histograms of many rollouts, beside its floor."""
    grid = predicted.grid
    prompts = len(predicted.probabilities)
    samples = np.bincount(many.group, minlength=prompts)
    observed = empirical_joint(many.group, many.cell, prompts, grid.size)
    seen = JointDistribution(grid, observed)
    columns = {
        "start_tv": total_variation(predicted.probabilities, observed),
        "floor": sampling_floor(predicted.probabilities, samples, seed),
        "constant_tv": total_variation(constant, observed),
        "reward_tv": total_variation(predicted.reward_marginal(), seen.reward_marginal()),
        "length_tv": total_variation(predicted.length_marginal(), seen.length_marginal()),
    }
    columns["excess"] = columns["start_tv"] - columns["floor"]
    boot = Resampling(np.arange(prompts), replicates, seed)
    record: dict[str, Any] = {name: boot.ratio(values).interval(confidence) for name, values in columns.items()}
    return record | {"prompts": prompts, "samples": rounded(samples.mean())}


def policy_record(base: Outcomes, tuned: Outcomes, replicates: int, seed: int, confidence: float) -> dict[str, Any]:
    """pass@1 of the base and of the model with the head, on the prompts that both answered, paired."""
    names = sorted(set(base.prompt_ids.to_pylist()) & set(tuned.prompt_ids.to_pylist()))
    number = {name: i for i, name in enumerate(names)}
    columns = []
    for outcomes in (base, tuned):
        of_prompt = np.array([number.get(p, -1) for p in outcomes.prompt_ids.to_pylist()])
        group = of_prompt[outcomes.group]
        known = group >= 0
        columns += [np.bincount(group[known], w, len(names)) for w in (outcomes.score[known], np.ones(known.sum()))]
    boot = Resampling(np.arange(len(names)), replicates, seed)
    totals = boot.prompt_totals(np.stack(columns, -1))
    before, after = (boot.quotient(lambda t, i=i: t[:, i] / t[:, i + 1], totals) for i in (0, 2))
    return {
        "base": before.interval(confidence),
        "ziprc": after.interval(confidence),
        "difference": (after - before).interval(confidence),
        "prompts": len(names),
    }


@dataclass(frozen=True)
class Target:
    """A number that the `toy` scale has to reach; `at_least` says in which direction."""

    name: str
    bound: float
    at_least: bool
    result: Mapping[str, float | None]

    def met(self) -> bool | None:
        """None when it cannot be said."""
        found = self.result["value"]
        return None if found is None else bool(found >= self.bound if self.at_least else found <= self.bound)

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "target": self.bound,
            "direction": "at least" if self.at_least else "at most",
            "result": dict(self.result),
            "met": self.met(),
        }


class NoLoss(Target):
    """A difference that must not be below `bound`: missed when the whole interval is, undecided when it is too wide."""

    def met(self) -> bool | None:
        low, high = self.result["low"], self.result["high"]
        if low is None or high is None:
            return None
        return False if high < self.bound else True if low >= self.bound - LOSS_MARGIN else None


def headline(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The headline numbers against the targets of the `toy` scale; what is shown of them, `evaluate.targets` says."""
    prediction, length = metrics["prediction"][MAIN], metrics["length"][MAIN]
    worst_ece = max((prediction[m]["ece"] for m in MOMENTS), key=lambda r: r["value"] or 0.0)
    targets: Sequence[Target] = (
        Target("AUROC of the expected score before the first token", 0.80, True, prediction["start"]["auroc"]),
        Target("AUROC of the expected score at the end", 0.90, True, prediction["end"]["auroc"]),
        Target("AUROC within a prompt at the end", 0.80, True, prediction["end"]["within_prompt_auroc"]),
        Target("largest ECE over the moments", 0.04, False, worst_ece),
        Target("median length: MAE below the best constant at the start", 0.20, True, length["start"]["mae_gain"]),
        Target("KL drift, nats per token", 0.01, False, metrics["drift"]["kl"]),
        NoLoss("pass@1 after minus before", 0.0, True, metrics["policy"]["difference"]),
    )
    return [target.record() for target in targets]

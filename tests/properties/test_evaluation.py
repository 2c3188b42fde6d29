"""The fast statistics equal slow obvious ones, over random data with ties and unequal groups."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score, roc_auc_score

from ziprc.evaluation.accuracy import auroc, threshold_metrics, within_prompt_auroc
from ziprc.evaluation.bootstrap import Resampling
from ziprc.evaluation.calibration import calibration_metrics, empirical_joint, total_variation
from ziprc.evaluation.head.probes import prefix_features

SEEDS = range(15)


def sample(seed: int) -> tuple[Resampling, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(12), rng.integers(1, 9, 12))
    prediction = rng.integers(0, 8, len(group)) / 8  # many ties
    success = rng.random(len(group)) < 0.2 + 0.6 * prediction
    return Resampling(group, 20, seed), prediction, success


def replicated(boot: Resampling, replicate: int) -> np.ndarray:
    """Rollout indices of a replicate, each prompt as often as it was drawn."""
    return np.repeat(np.arange(len(boot.group)), boot.counts[replicate][boot.group].astype(int))


def pairwise_within(group: np.ndarray, p: np.ndarray, y: np.ndarray) -> float:
    won = pairs = 0.0
    for g in np.unique(group):
        good, bad = p[(group == g) & y], p[(group == g) & ~y]
        difference = good[:, None] - bad
        won += (difference > 0).sum() + 0.5 * (difference == 0).sum()
        pairs += difference.size
    return won / pairs


@pytest.mark.parametrize("seed", SEEDS)
def test_auroc_of_every_replicate_equals_sklearn_on_the_repeated_rows(seed: int):
    boot, prediction, success = sample(seed)
    found = auroc(boot, prediction, success).values
    for k in range(21):
        rows = replicated(boot, k)
        if 0 < success[rows].sum() < len(rows):
            assert np.isclose(found[k], roc_auc_score(success[rows], prediction[rows]))
        else:
            assert np.isnan(found[k])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_equal_those_of_scipy_which_resamples_prompts_one_by_one(confidence: float):
    """Percentile intervals of the mean over rollouts, with other draws of the same prompts."""
    replicates = 20_000
    group = np.repeat(np.arange(40), np.arange(40) % 4 + 1)
    score = np.random.default_rng(1).random(len(group)) ** (1 + group % 3)
    total, count = np.bincount(group, score), np.bincount(group)

    def mean(total: np.ndarray, count: np.ndarray, axis: int) -> np.ndarray:
        return total.sum(axis) / count.sum(axis)

    wanted = scipy.stats.bootstrap(
        (total, count), mean, paired=True, vectorized=True, n_resamples=replicates, confidence_level=confidence,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    found = Resampling(group, replicates, 0).ratio(score).interval(confidence)
    assert found["value"] == pytest.approx(score.mean(), abs=1e-6)
    tolerance = 0.05 * wanted.standard_error  # two of the difference between two such quantiles
    assert found["low"] == pytest.approx(wanted.confidence_interval.low, abs=tolerance)
    assert found["high"] == pytest.approx(wanted.confidence_interval.high, abs=tolerance)


@pytest.mark.parametrize("seed", SEEDS)
def test_within_prompt_auroc_equals_counting_pairs(seed: int):
    boot, prediction, success = sample(seed)
    found = within_prompt_auroc(boot, prediction, success)
    assert np.isclose(found.value, pairwise_within(boot.group, prediction, success))


@pytest.mark.parametrize("seed", SEEDS)
def test_within_prompt_auroc_ignores_what_is_known_about_prompts(seed: int):
    boot, prediction, success = sample(seed)
    shifted = prediction + boot.group * 10
    assert np.isclose(
        within_prompt_auroc(boot, prediction, success).value, within_prompt_auroc(boot, shifted, success).value
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_threshold_and_calibration_metrics_equal_the_definitions_in_every_replicate(seed: int):
    boot, prediction, success = sample(seed)
    thresholds = threshold_metrics(boot, prediction, success)
    calibration = calibration_metrics(boot, prediction, success, bins=4)
    for k in (0, 3, 20):
        rows = replicated(boot, k)
        p, y = prediction[rows], success[rows]
        assert np.isclose(thresholds["f1"].values[k], f1_score(y, p >= 0.5))
        assert np.isclose(thresholds["accuracy"].values[k], ((p >= 0.5) == y).mean())
        assert np.isclose(calibration["brier"].values[k], ((p - y) ** 2).mean())
        bins = np.minimum((p * 4).astype(int), 3)
        ece = sum(abs((p - y)[bins == b].sum()) for b in range(4)) / len(p)
        assert np.isclose(calibration["ece"].values[k], ece)


@pytest.mark.parametrize("seed", SEEDS)
def test_total_variation_is_a_distance_between_0_and_1(seed: int):
    rng = np.random.default_rng(seed)
    p, q, r = rng.dirichlet(np.full(6, 0.3), (3, 10))
    assert np.allclose(total_variation(p, p), 0) and np.allclose(total_variation(p, q), total_variation(q, p))
    assert (total_variation(p, q) <= 1 + 1e-12).all()
    assert (total_variation(p, r) <= total_variation(p, q) + total_variation(q, r) + 1e-12).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_empirical_joints_are_histograms(seed: int):
    rng = np.random.default_rng(seed)
    group, cell = rng.integers(0, 4, 200), rng.integers(0, 6, 200)
    joint = empirical_joint(group, cell, 4, 6)
    assert np.allclose(joint.sum(1), 1)
    assert np.isclose(joint[2, 3], (cell[group == 2] == 3).mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_prefix_features_see_only_the_prefix(seed: int):
    rng = np.random.default_rng(seed)
    m, window = int(rng.integers(2, 30)), 4
    log_prob, entropy = -rng.random(m), rng.random(m)
    prefixes = rng.integers(0, m, 5)
    found = prefix_features(log_prob, entropy, window, prefixes)
    for row, j in zip(found, prefixes.tolist(), strict=True):
        if j == 0:
            assert (row == 0).all()
            continue
        windows = [log_prob[max(t - window, 0) : t].mean() for t in range(1, j + 1)]
        wanted = [log_prob[:j].mean(), log_prob[:j].min(), windows[-1], min(windows), entropy[:j].mean(), np.log(j)]
        assert np.allclose(row, wanted, atol=1e-6)

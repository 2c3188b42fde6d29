"""Honest competitors of the joint head: what can be predicted without touching the language model?

All are fitted on the head's own training rollouts with the frozen base model, one fit per moment, and see exactly what
the state at that moment has seen: the prompt and the first j response tokens.

* `constant`: mean training score.
* `length`: logistic regression on elapsed tokens j.
* `logprob`: logistic regression on mean, minimum and windowed log-probability of the tokens so far, mean entropy and
  log length, with all quadratic terms; at the start there are no tokens, so it is the constant.
* `probe`: a small network on the base's hidden state at that moment, the epoch chosen on held-out training prompts.

Moments are shares of the final length, so j at "50 %" gives the final length away: `length` and `logprob` look better
here than they could online, where nobody knows the final length. Shapes: n rollouts, M moments, F features, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import nn

from ziprc.evaluation.outcomes import MOMENTS
from ziprc.reading.logits import TokenScores

FEATURES = ("mean log-prob", "minimum log-prob", "last window", "minimum window", "mean entropy", "log length")
VALIDATION_SHARE = 0.1  # of the training prompts, to choose the probe's epoch
PROBE_BATCH = 128  # enough steps also for the few rollouts of a smoke run
PROBE_LEARNING_RATE = 3e-3
PROBE_WEIGHT_DECAY = 1e-2

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class MomentData:
    """Everything the competitors may look at. `elapsed` [n, M], `scores` [n, M, F], `states` [n, M, D] float16."""

    elapsed: NDArray[np.int64]
    scores: NDArray[np.float32]
    states: NDArray[np.float16]


def prefix_features(log_prob: Floats, entropy: Floats, window: int, prefixes: NDArray[np.int64]) -> NDArray[np.float32]:
    """[M, F] log-probability features of the first j tokens of one rollout, for every j in `prefixes` (0: zeros)."""
    sums, entropies = (np.concatenate([[0.0], np.cumsum(x, dtype=np.float64)]) for x in (log_prob, entropy))
    ends = np.arange(1, len(log_prob) + 1)
    begins = np.maximum(ends - window, 0)
    windowed = (sums[ends] - sums[begins]) / (ends - begins)
    lows, low_windows = np.minimum.accumulate(log_prob), np.minimum.accumulate(windowed)
    j = np.maximum(prefixes, 1)
    rows = (sums[j] / j, lows[j - 1], windowed[j - 1], low_windows[j - 1], entropies[j] / j, np.log(j))
    return np.where(prefixes[:, None] > 0, np.stack(rows, -1), 0.0).astype(np.float32)


def collect(
    scored: Iterable[tuple[int, TokenScores]], positions: NDArray[np.int64], window: int, hidden: int
) -> MomentData:
    """Features of all rollouts at their moments, from a stream of token scores."""
    n, moments = positions.shape
    features = np.zeros((n, moments, len(FEATURES)), dtype=np.float32)
    states = np.zeros((n, moments, hidden), dtype=np.float16)
    for i, one in scored:
        features[i] = prefix_features(one.log_prob, one.entropy, window, positions[i])
        states[i] = one.states[torch.from_numpy(positions[i])].half().cpu().numpy()
    return MomentData(positions, features, states)


def constant_prediction(train: Floats, count: int) -> NDArray[np.float64]:
    return np.full(count, float(np.mean(train)))


def logistic_prediction(x_train: Floats, y_train: Floats, x_test: Floats, degree: int) -> NDArray[np.float64]:
    """Regularised logistic regression on standardised features; scores between 0 and 1 count as fractions of both."""
    x = np.concatenate([x_train, x_train])
    target = np.repeat([1, 0], len(y_train))
    weight = np.concatenate([y_train, 1 - y_train])
    if weight[target == 1].sum() == 0 or weight[target == 0].sum() == 0:
        return constant_prediction(y_train, len(x_test))
    model = make_pipeline(
        StandardScaler(),
        PolynomialFeatures(degree, include_bias=False),
        StandardScaler(),
        LogisticRegression(max_iter=500),
    )
    model.fit(x[weight > 0], target[weight > 0], logisticregression__sample_weight=weight[weight > 0])
    return model.predict_proba(x_test)[:, 1]


@dataclass(frozen=True)
class ProbeSettings:
    """Size (0 hidden units: a logistic regression) and training of the probe."""

    hidden: int
    epochs: int
    seed: int


def probe_prediction(
    x_train: Floats, y_train: Floats, group: NDArray[np.int64], x_test: Floats, settings: ProbeSettings
) -> NDArray[np.float64]:
    """A probe on hidden states; of its epochs the one with the least loss on held-out prompts speaks."""
    if settings.hidden == 0:
        return logistic_prediction(x_train.astype(np.float64), y_train, x_test.astype(np.float64), degree=1)
    mean, scale = x_train.mean(0, dtype=np.float64), x_train.std(0, dtype=np.float64) + 1e-6
    x, x_new = (torch.tensor((a - mean) / scale, dtype=torch.float32) for a in (x_train, x_test))
    y = torch.tensor(y_train, dtype=torch.float32)
    rng = np.random.default_rng(settings.seed)
    held_out = torch.from_numpy((rng.random(int(group.max()) + 1) < VALIDATION_SHARE)[group])
    if held_out.all() or not held_out.any():
        held_out = torch.zeros_like(held_out)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = _network(x.shape[1], settings.hidden)
        best = _fit(model, x[~held_out], y[~held_out], (x[held_out], y[held_out]), settings.epochs)
    model.load_state_dict(best)
    with torch.inference_mode():
        return torch.sigmoid(model(x_new)[:, 0]).double().numpy()


def _network(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 1))


def _fit(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, check: tuple[torch.Tensor, torch.Tensor], epochs: int
) -> dict[str, torch.Tensor]:
    """Train; returns the weights of the best epoch (the last, when there is nothing to check on)."""
    loss_of = nn.functional.binary_cross_entropy_with_logits
    steps = epochs * -(-len(x) // PROBE_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PROBE_LEARNING_RATE, weight_decay=PROBE_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    best_loss, best = float("inf"), {}
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(PROBE_BATCH):
            optimizer.zero_grad()
            loss_of(model(x[rows])[:, 0], y[rows]).backward()
            optimizer.step()
            schedule.step()
        with torch.inference_mode():
            loss = float(loss_of(model(check[0])[:, 0], check[1])) if len(check[0]) else -1.0
        if loss < best_loss or not len(check[0]):
            best_loss, best = loss, {k: v.clone() for k, v in model.state_dict().items()}
    return best


def all_predictions(
    train: MomentData, score: Floats, group: NDArray[np.int64], test: MomentData, settings: ProbeSettings
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Predictions for the test rollouts by (predictor, moment)."""
    n = len(test.elapsed)
    out = {}
    for k, moment in enumerate(MOMENTS):
        constant = constant_prediction(score, n)
        out["constant", moment] = constant
        elapsed, elapsed_test = (data.elapsed[:, k, None].astype(np.float64) for data in (train, test))
        blind = moment == "start"  # no token has been sampled
        out["length", moment] = constant if blind else logistic_prediction(elapsed, score, elapsed_test, 1)
        out["logprob", moment] = (
            constant if blind else logistic_prediction(train.scores[:, k], score, test.scores[:, k], 2)
        )
        out["probe", moment] = probe_prediction(train.states[:, k], score, group, test.states[:, k], settings)
    return out

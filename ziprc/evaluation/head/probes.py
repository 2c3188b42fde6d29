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

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import nn
from transformers import PreTrainedModel

from ziprc.config.base import Runtime
from ziprc.config.zip_rc import Baselines
from ziprc.evaluation.outcomes import MOMENTS, moment_positions, response_lengths
from ziprc.progress import progress
from ziprc.reading.logits import token_scores
from ziprc.reading.states import token_pairs

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


def collect(model: PreTrainedModel, text_rows: int, rollouts: pa.Table, window: int, runtime: Runtime) -> MomentData:
    """Features of all rollouts at their moments, from one pass of the frozen base model."""
    pairs, positions = token_pairs(rollouts), moment_positions(response_lengths(rollouts))
    features = np.zeros((*positions.shape, len(FEATURES)), dtype=np.float32)
    states = np.zeros((*positions.shape, model.config.hidden_size), dtype=np.float16)
    with progress(len(pairs), "baselines", "rollouts") as bar:
        for batch in token_scores(model, text_rows, pairs, runtime.forward_tokens, runtime.position_chunk):
            for i, own, log_prob, entropy in zip(*batch, strict=True):
                features[i] = prefix_features(log_prob, entropy, window, positions[i])
                states[i] = own[torch.from_numpy(positions[i])].half().cpu().numpy()
            bar.update(len(batch[0]))
    return MomentData(positions, features, states)


def logistic_prediction(x_train: Floats, y_train: Floats, x_test: Floats, degree: int) -> NDArray[np.float64]:
    """Regularised logistic regression on standardised features; scores between 0 and 1 count as fractions of both."""
    x = np.concatenate([x_train, x_train])
    target = np.repeat([1, 0], len(y_train))
    weight = np.concatenate([y_train, 1 - y_train])
    if weight[target == 1].sum() == 0 or weight[target == 0].sum() == 0:
        return np.full(len(x_test), float(np.mean(y_train)))
    powers, logistic = PolynomialFeatures(degree, include_bias=False), LogisticRegression(max_iter=500)
    model = make_pipeline(StandardScaler(), powers, StandardScaler(), logistic)
    model.fit(x[weight > 0], target[weight > 0], logisticregression__sample_weight=weight[weight > 0])
    return model.predict_proba(x_test)[:, 1]


def probe_prediction(
    x_train: Floats, y_train: Floats, group: NDArray[np.int64], x_test: Floats, own: Baselines, seed: int
) -> NDArray[np.float64]:
    """A probe on hidden states; of its epochs the one with the least loss on held-out prompts speaks, else the last."""
    if own.probe_hidden == 0:
        return logistic_prediction(x_train.astype(np.float64), y_train, x_test.astype(np.float64), degree=1)
    mean, scale = x_train.mean(0, dtype=np.float64), x_train.std(0, dtype=np.float64) + 1e-6
    x, x_new = (torch.tensor((a - mean) / scale, dtype=torch.float32) for a in (x_train, x_test))
    y = torch.tensor(y_train, dtype=torch.float32)
    rng = np.random.default_rng(seed)
    held_out = torch.from_numpy((rng.random(int(group.max()) + 1) < VALIDATION_SHARE)[group])
    if held_out.all():
        held_out = torch.zeros_like(held_out)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    best_loss, best = float("inf"), {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], own.probe_hidden), nn.GELU(), nn.Linear(own.probe_hidden, 1))
        seen, good = x[~held_out], y[~held_out]
        steps = own.probe_epochs * -(-len(seen) // PROBE_BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PROBE_LEARNING_RATE, weight_decay=PROBE_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for _ in range(own.probe_epochs):
            for rows in torch.randperm(len(seen)).split(PROBE_BATCH):
                optimizer.zero_grad()
                loss_of(model(seen[rows])[:, 0], good[rows]).backward()
                optimizer.step()
                schedule.step()
            with torch.inference_mode():
                loss = float(loss_of(model(x[held_out])[:, 0], y[held_out]))
            if loss < best_loss or not held_out.any():
                best_loss, best = loss, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best)
    with torch.inference_mode():
        return torch.sigmoid(model(x_new)[:, 0]).double().numpy()


def all_predictions(
    train: MomentData, score: Floats, group: NDArray[np.int64], test: MomentData, own: Baselines, seed: int
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Predictions for the test rollouts by (predictor, moment)."""
    constant, out = np.full(len(test.elapsed), float(np.mean(score))), {}
    for k, moment in enumerate(MOMENTS):
        out |= {(name, moment): constant for name in ("constant", "length", "logprob")}
        if moment != "start":  # there, no token has been sampled
            elapsed, elapsed_test = (data.elapsed[:, k, None].astype(np.float64) for data in (train, test))
            out["length", moment] = logistic_prediction(elapsed, score, elapsed_test, 1)
            out["logprob", moment] = logistic_prediction(train.scores[:, k], score, test.scores[:, k], 2)
        out["probe", moment] = probe_prediction(train.states[:, k], score, group, test.states[:, k], own, seed)
    return out

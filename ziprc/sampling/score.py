"""How likely is this branch to be right? The joint and the token statistics of the same forward pass, fused.

The head knows which prompts are hard; token log-probabilities know which samples went wrong (a slip is sampled, so it
shows). A logistic regression with quadratic terms over both is fitted on validation prompts, one for states on the way and
one for finished branches, and stored as numbers with the checkpoint. Shapes: n states, C = R·L cells, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from ziprc.joint.bins import BinGrid
from ziprc.sampling import features as f

INPUTS = (
    "log odds of the head",
    "log remaining",
    "log tokens",
    "mean log-prob",
    "lowest log-prob",
    "last window",
    "lowest window",
    "mean entropy",
    "highest entropy",
)
HEAD_INPUTS, TOKEN_INPUTS = (0, 1, 2), tuple(range(2, len(INPUTS)))
LEAST_LOG_PROB = -8.0  # below it a token is as surprising as can be
PENALTY = 1e-3  # of squared weights, per state
CLIP = 1e-3
MIN_STATES = 200
Floats = NDArray[np.floating]


def safe_logit(p: Floats) -> Floats:
    """Log odds of probabilities kept away from 0 and 1."""
    return logit(np.clip(p, CLIP, 1 - CLIP))


def joint_summary(joint: Floats, grid: BinGrid) -> tuple[Floats, Floats]:
    """Expected reward and expected remaining tokens, both [n], of joints [n, C]."""
    table = np.asarray(joint, np.float64).reshape(-1, grid.R, grid.L)
    total = np.maximum(table.sum((1, 2)), 1e-9)
    reward = table.sum(2) @ np.asarray(grid.reward_centres) / total
    remaining = table.sum(1) @ grid.length_midpoints / total
    return reward, remaining


def token_inputs(features: Floats) -> Floats:
    """[n, D - 2] what token statistics alone say: the last columns of INPUTS."""
    columns = [
        np.log1p(features[:, f.TOKENS]),
        features[:, f.MEAN],
        np.maximum(features[:, f.LOW], LEAST_LOG_PROB),
        features[:, f.WINDOW],
        features[:, f.LOW_WINDOW],
        features[:, f.ENTROPY],
        features[:, f.HIGH_ENTROPY],
    ]
    return np.stack(columns, -1).astype(np.float64)


def inputs(joint: Floats, features: Floats, grid: BinGrid) -> Floats:
    """[n, D] what the logistic models look at: INPUTS."""
    reward, remaining = joint_summary(joint, grid)
    return np.concatenate([np.stack([safe_logit(reward), np.log1p(remaining)], -1), token_inputs(features)], -1)


@dataclass(frozen=True)
class Logistic:
    """Logistic regression on standardised inputs, their squares and products; numbers only, so that it can be stored."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float

    @classmethod
    def fit(cls, x: Floats, y: Floats) -> Logistic:
        """From inputs [n, D] and scores [n] in {0, 1}; a constant where all scores are alike."""
        from sklearn.linear_model import (
            LogisticRegression,  # takes two seconds, which those who only read need not wait
        )

        mean, scale = x.mean(0), x.std(0) + 1e-6
        if y.min() == y.max():
            share = (y.sum() + 0.5) / (len(y) + 1)
            return cls(tuple(mean.tolist()), tuple(scale.tolist()), _no_weights(x.shape[1]), float(logit(share)))
        expanded = _expand((x - mean) / scale)
        model = LogisticRegression(C=1 / (PENALTY * len(y)), max_iter=1000)
        model.fit(expanded, y > 0.5)
        return cls(
            tuple(mean.tolist()), tuple(scale.tolist()), tuple(model.coef_[0].tolist()), float(model.intercept_[0])
        )

    def log_odds(self, x: Floats) -> Floats:
        """[n]"""
        z = (x - np.array(self.mean)) / np.array(self.scale)
        return _expand(np.clip(z, -5, 5)) @ np.array(self.weight) + self.bias

    def probability(self, x: Floats) -> Floats:
        return expit(self.log_odds(x))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Logistic:
        return cls(tuple(record["mean"]), tuple(record["scale"]), tuple(record["weight"]), record["bias"])


@dataclass(frozen=True)
class Stages:
    """One logistic model per stage of a response: with 0, 1, 2-3, 4-7, 8-15, … tokens seen.

    A single model would read the noise of a mean over three tokens like that over thirty.
    """

    models: tuple[Logistic, ...]

    @classmethod
    def fit(cls, x: Floats, y: Floats, tokens: Floats) -> Stages:
        """From inputs [n, D], scores [n] and tokens seen [n]; a stage with too few states shares the one before."""
        stage = stage_of(tokens)
        models: list[Logistic] = []
        for number in range(int(stage.max()) + 1):
            mine = stage == number
            enough = mine.sum() >= MIN_STATES and 0 < y[mine].mean() < 1
            models.append(Logistic.fit(x[mine], y[mine]) if enough else models[-1] if models else Logistic.fit(x, y))
        return cls(tuple(models))

    def log_odds(self, x: Floats, tokens: Floats) -> Floats:
        """[n]"""
        stage = np.minimum(stage_of(tokens), len(self.models) - 1)
        out = np.empty(len(x))
        for number in np.unique(stage):
            mine = stage == number
            out[mine] = self.models[number].log_odds(x[mine])
        return out

    def to_dict(self) -> dict[str, Any]:
        return {"models": [model.to_dict() for model in self.models]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Stages:
        return cls(tuple(Logistic.from_dict(model) for model in record["models"]))


def stage_of(tokens: Floats) -> NDArray[np.int64]:
    """[n] 0, 1, 2, 3, … for 0, 1, 2-3, 4-7, … tokens."""
    return np.ceil(np.log2(np.asarray(tokens, np.float64) + 1)).astype(np.int64)


def _no_weights(inputs: int) -> tuple[float, ...]:
    return (0.0,) * (inputs + inputs * (inputs + 1) // 2)


_pairs = functools.cache(np.triu_indices)


def _expand(z: Floats) -> Floats:
    first, second = _pairs(z.shape[1])
    return np.concatenate([z, z[:, first] * z[:, second]], -1)

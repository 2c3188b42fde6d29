"""How likely is this branch to be right? The joint and the token statistics of the same forward pass, fused.

The head knows which prompts are hard; token log-probabilities know which samples went wrong (a slip is sampled, so it
shows). A logistic regression with quadratic terms over both is fitted on validation prompts, one for states on the way and
one for finished branches, and stored as numbers with the checkpoint. `JointCalibration` keeps to the joint: two numbers that
make the reward it predicts agree with the scores. Shapes: n states, C = R·L cells, F features, D inputs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling import features as f
from ziprc.sampling.tree import Floats, Ints

# Log odds of the head's reward, logarithms of remaining and seen tokens, then log-probabilities and entropies.
INPUTS = ("head", "remaining", "tokens", "mean", "low", "window", "low window", "entropy", "high entropy")
HEAD_INPUTS, TOKEN_INPUTS = (0, 1, 2), tuple(range(2, len(INPUTS)))
LEAST_LOG_PROB = -8.0  # below it a token is as surprising as can be
PENALTY = 1e-3  # of squared weights, per state
CLIP = 1e-3
MIN_STATES = 200
STATES_AT_ONCE = 1 << 16
POWERS = (0.05, 20.0)  # of the joint, 1 / temperature: bounds of the fit
TILTS = (-20.0, 20.0)
JOINT_CLIP = 1e-6
LEAST = 1e-300  # in place of zero, where one divides or takes a logarithm


def joint_summary(joint: Floats, grid: BinGrid) -> tuple[Floats, Floats]:
    """Expected reward and expected remaining tokens, both [n], of joints [n, C]."""
    table = np.asarray(joint, np.float64).reshape(-1, grid.R, grid.L)
    total = np.maximum(table.sum((1, 2)), 1e-9)
    reward = table.sum(2) @ np.asarray(grid.reward_centres) / total
    return reward, table.sum(1) @ grid.length_midpoints / total


def token_inputs(features: Floats) -> Floats:
    """[n, D - 2] what token statistics alone say: the last columns of INPUTS."""
    out = features[:, [f.TOKENS, f.MEAN, f.LOW, f.WINDOW, f.LOW_WINDOW, f.ENTROPY, f.HIGH_ENTROPY]]
    out[:, 0] = np.log1p(out[:, 0])
    out[:, 2] = np.maximum(out[:, 2], LEAST_LOG_PROB)
    return out.astype(np.float64, order="C")


def inputs(joint: Floats, features: Floats, grid: BinGrid) -> Floats:
    """[n, D] what the logistic models look at: INPUTS."""
    reward, remaining = joint_summary(joint, grid)
    head = np.stack([logit(np.clip(reward, CLIP, 1 - CLIP)), np.log1p(remaining)], -1)
    return np.concatenate([head, token_inputs(features)], -1)


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
        from sklearn.linear_model import LogisticRegression  # two seconds that those who only read need not wait

        mean, scale = x.mean(0), x.std(0) + 1e-6
        expanded = _expand((x - mean) / scale)
        if y.min() == y.max():
            weight, bias = np.zeros(expanded.shape[1]), logit((y.sum() + 0.5) / (len(y) + 1))
        else:
            model = LogisticRegression(C=1 / (PENALTY * len(y)), max_iter=1000).fit(expanded, y > 0.5)
            weight, bias = model.coef_[0], model.intercept_[0]
        return cls(*(tuple(column.tolist()) for column in (mean, scale, weight)), float(bias))

    def log_odds(self, x: Floats) -> Floats:
        """[n]"""
        z = (x - np.array(self.mean)) / np.array(self.scale)
        return _expand(np.clip(z, -5, 5)) @ np.array(self.weight) + self.bias

    def probability(self, x: Floats) -> Floats:
        return expit(self.log_odds(x))


_pairs = functools.cache(np.triu_indices)


def _expand(z: Floats) -> Floats:
    first, second = _pairs(z.shape[1])
    return np.concatenate([z, z[:, first] * z[:, second]], -1)


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


def stage_of(tokens: Floats | Ints) -> NDArray[np.int64]:
    """[n] 0, 1, 2, 3, … for 0, 1, 2-3, 4-7, … tokens."""
    return np.ceil(np.log2(np.asarray(tokens, np.float64) + 1)).astype(np.int64)


@dataclass(frozen=True)
class JointCalibration:
    """q ∝ q^(1/temperature) · exp(tilt · reward): a flatter or sharper joint, with more or less weight on high rewards."""

    temperature: float = 1.0
    tilt: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.temperature < np.inf and abs(self.tilt) < np.inf):
            raise UserError(f"expected temperature > 0 and a finite tilt, found {self.temperature} and {self.tilt}.")

    def apply(self, joint: Floats, grid: BinGrid) -> NDArray[np.float32]:
        """[n, C] calibrated joints that sum to one."""
        out = np.empty(np.shape(joint), np.float32)
        reward = np.repeat(np.asarray(grid.reward_centres), grid.L)
        for start in range(0, len(out), STATES_AT_ONCE):
            rows = slice(start, start + STATES_AT_ONCE)
            out[rows] = _tilted(joint[rows], 1 / self.temperature, self.tilt, reward)
        return out

    @classmethod
    def fit(cls, joint: Floats, score: Floats, grid: BinGrid) -> JointCalibration:
        """The numbers under which E_q[reward] best predicts the scores [n] of joints [n, C], by log-likelihood."""
        target = np.asarray(score, np.float64)
        if len(target) != len(joint) or not np.all((target >= 0) & (target <= 1)):
            raise UserError(f"expected {len(joint)} scores in [0, 1], one for each joint, found {len(target)}.")
        reward = np.repeat(np.asarray(grid.reward_centres), grid.L)
        log_joint = np.log(np.maximum(joint, LEAST, dtype=np.float64))

        def loss(numbers: Floats) -> tuple[float, Floats]:
            """Mean negative log-likelihood and its gradient by (power, tilt): covariances with the reward."""
            q = _tilted(joint, *numbers, reward)
            mean = q @ reward
            predicted = np.clip(mean, JOINT_CLIP, 1 - JOINT_CLIP)
            value = -(target * np.log(predicted) + (1 - target) * np.log1p(-predicted)).sum()
            slope = (predicted - target) / (predicted * (1 - predicted))
            weight = q * (reward - mean[:, None])
            gradient = np.array([slope @ (weight * log_joint).sum(-1), slope @ (weight @ reward)])
            return float(value) / len(target), gradient / len(target)

        found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=(POWERS, TILTS))
        return cls(temperature=float(1 / found.x[0]), tilt=float(found.x[1]))


def _tilted(joint: Floats, power: float, tilt: float, reward: Floats) -> NDArray[np.float64]:
    """[n, C]; cells of zero stay zero. `reward` [C] of each cell."""
    q = np.asarray(joint, np.float64)
    q = q / np.maximum(q.max(-1, keepdims=True), LEAST)
    q = q**power * np.exp(tilt * reward)
    return q / np.maximum(q.sum(-1, keepdims=True), LEAST)

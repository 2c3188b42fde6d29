"""What is fitted on validation prompts after training, and stored with the checkpoint as plain numbers.

Nothing here is trained on what it is judged by: the head never saw the validation prompts, and test prompts are never
fitted on. Shapes: N prompts, K rollouts, T readings, C cells of the joint, n states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaln, expit

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling import features as f
from ziprc.sampling.replay import Pool, pool_orders
from ziprc.sampling.score import INPUTS, JointCalibration, Logistic, Stages, inputs, stage_of, token_inputs
from ziprc.sampling.selection import VoteModel
from ziprc.sampling.tree import NO_ANSWER, Bools, Floats, Ints, Status, Trees
from ziprc.store.files import read_json

VOTE_SIZES = (1, 2, 4, 8, 16)  # numbers of samples on which the vote model is fitted
STATES_FOR_JOINT = 50_000
ALL_INPUTS = tuple(range(len(INPUTS)))


@dataclass(frozen=True)
class Calibration:
    """P(right) of a branch on the way and of a finished one, P(right) of an answer, and the strength κ of θ's prior.

    `columns` are the inputs that the fused score may look at (all; fewer in ablations).
    """

    on_the_way: Stages
    finished: Logistic
    vote: VoteModel
    strength: float
    columns: tuple[int, ...] = ALL_INPUTS

    @classmethod
    def fit(cls, pool: Pool, grid: BinGrid, seed: int, columns: tuple[int, ...] = ALL_INPUTS) -> Calibration:
        """From a pool of validation rollouts."""
        rng = np.random.default_rng(seed)
        flat, first = pool.length.ravel(), pool.first.ravel()
        score = (pool.score.ravel() > 0.5).astype(np.float64)

        def look(rows: Ints) -> Floats:
            return inputs(pool.joint[rows], pool.features[rows], grid)[:, columns]

        rows, whose = _states(flat, first, rng)
        on_the_way = Stages.fit(look(rows), score[whose], pool.features[rows, f.TOKENS])
        x = look(first + flat - 1)
        finished = Logistic.fit(x, score)
        log_odds = finished.log_odds(x).reshape(pool.length.shape)
        start = pool.first[:, 0]
        prior = on_the_way.log_odds(look(start), np.zeros(len(start)))
        sizes = [n for n in VOTE_SIZES if n <= pool.length.shape[1]]
        vote = VoteModel.fit([_case(pool, log_odds, prior, n, rng) for n in sizes])
        return cls(on_the_way, finished, vote, fit_strength(expit(prior), pool.score), columns)

    def inputs(self, joint: Floats, features: Floats, grid: BinGrid) -> Floats:
        """[n, D] what the fused score sees."""
        return inputs(joint, features, grid)[:, self.columns]


@dataclass(frozen=True)
class Fitted:
    """Everything that samplers need besides the checkpoint: ours, the published policy's, and the baselines'."""

    grid: BinGrid
    fused: Calibration
    joint: JointCalibration
    logprob: Logistic

    @classmethod
    def fit(cls, pool: Pool, grid: BinGrid, seed: int) -> Fitted:
        """From a pool of validation rollouts."""
        score = (pool.score.ravel() > 0.5).astype(np.float64)
        rows = np.random.default_rng(seed).permutation(len(pool.joint))[:STATES_FOR_JOINT]
        of_rollout = np.repeat(score, pool.length.ravel())
        last = pool.first.ravel() + pool.length.ravel() - 1
        joint = JointCalibration.fit(np.asarray(pool.joint[rows], np.float32), of_rollout[rows], grid)
        logprob = Logistic.fit(token_inputs(pool.features[last]), score)
        return cls(grid, Calibration.fit(pool, grid, seed), joint, logprob)

    def to_dict(self) -> dict[str, Any]:
        parts = {"fused": self.fused, "joint": self.joint, "logprob": self.logprob}
        return {name: asdict(part) for name, part in parts.items()} | {"grid": self.grid.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fitted:
        """From the record of calibration.json."""

        def logistic(own: Mapping[str, Any]) -> Logistic:
            return Logistic(*(tuple(own[name]) for name in ("mean", "scale", "weight")), own["bias"])

        own = record["fused"]
        stages = Stages(tuple(logistic(model) for model in own["on_the_way"]["models"]))
        vote, columns = VoteModel(**own["vote"]), tuple(own["columns"])
        fused = Calibration(stages, logistic(own["finished"]), vote, own["strength"], columns)
        grid, joint = BinGrid.from_dict(record["grid"]), JointCalibration(**record["joint"])
        return cls(grid, fused, joint, logistic(record["logprob"]))


def read_fitted(checkpoint: Path, grid: BinGrid) -> Fitted:
    """The calibration of a checkpoint; UserError when there is none or when it belongs to another grid."""
    path = checkpoint / "calibration.json"
    if not path.exists():
        raise UserError(f"{checkpoint} is not calibrated: there is no {path.name}. Build it: `make {path}`.")
    fitted = Fitted.from_dict(read_json(path))
    if fitted.grid != grid:
        raise UserError(
            f"{path} was fitted for another grid of bins than the checkpoint has. Build it again: `make {path}`."
        )
    return fitted


def _states(length: Ints, first: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Rows of one random state per rollout and stage (score.stage_of), and the rollout of each."""
    rows, whose = [], []
    for stage in range(int(stage_of(length.max())) + 1):
        low, high = (1 << stage) >> 1, 1 << stage
        there = np.flatnonzero(length > low)
        stop = np.minimum(high, length[there]) if stage else np.ones(len(there))
        rows.append(first[there] + low + (rng.random(len(there)) * (stop - low)).astype(np.int64))
        whose.append(there)
    return np.concatenate(rows), np.concatenate(whose)


def _case(
    pool: Pool, log_odds: Floats, prior: Floats, samples: int, rng: np.random.Generator
) -> tuple[Trees, Floats, Floats, Bools]:
    """Every prompt with `samples` random rollouts finished, as the vote model sees them."""
    prompts, rollouts = pool.length.shape
    order = pool_orders(prompts, rollouts, 1, int(rng.integers(1 << 31)))[0][:, :samples]
    rows = np.arange(prompts)[:, None]
    trees = Trees.empty(prompts, order.shape[1], 0)
    trees.status[:] = Status.FINISHED
    trees.answer[:] = np.where(pool.finished, pool.answer, NO_ANSWER)[rows, order]
    return trees, log_odds[rows, order], prior, pool.score[rows, order] > 0.5


def fit_strength(prior: Floats, score: Floats) -> float:
    """κ of the Beta(κ·p, κ·(1 - p)) that best explains how many of each prompt's samples are right (beta-binomial).

    `prior` [N] are the p, `score` [N, K].
    """
    right, n = (score > 0.5).sum(-1), score.shape[1]
    mean = np.clip(prior, 1e-3, 1 - 1e-3)

    def loss(log_kappa: float) -> float:
        a, b = np.exp(log_kappa) * mean, np.exp(log_kappa) * (1 - mean)
        return -float((betaln(a + right, b + n - right) - betaln(a, b)).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 5.0), method="bounded").x))

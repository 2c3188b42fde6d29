"""ZIP-RC sampling as published: always run the set of samples with the highest sampling utility.

Every sample predicts, with each token, the joint distribution of its own final reward and remaining length. Before every
decision interval all sets of unfinished samples are compared, paused ones and new ones from the prompt included; the set
that is worth most (utility.py: expected best reward minus the price of tokens and of time) runs, the others pause, and the
plan is made anew after the interval. It ends when waiting for nobody is worth it (ZIP-RC, arXiv 2512.01457, §4).

Departures from the published simulator, whose faults are not repeated: a prompt never stops without a finished sample (there
the empty set is worth 0 and wins when every price is too high), and the sample that must run then is not exchanged on the
way; finished samples keep their exact value under every horizon; a short budget drops by value and not by index; the fold is
priced at its edge; sets are searched exhaustively where that is cheap; new samples from the prompt compete in every decision
instead of in the first alone. A sample that ran into the cap or gave no answer is worth 0. `JointCalibration` is ours: two
numbers that make the predicted reward agree with the scores.
Shapes: P prompts, S slots, R reward centres, L length bins, C = R·L cells, n states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling.controller import NONE, Choice, Decision
from ziprc.sampling.policies import utility
from ziprc.sampling.policies.base import MAJORITY, Best, Selector, Source, Vote, answered, candidates
from ziprc.sampling.policies.search import best_set, initial_count
from ziprc.sampling.policies.utility import Fold, Horizons, Prices, normaliser, tables
from ziprc.sampling.score import joint_summary
from ziprc.sampling.tree import Trees

PROMPTS_AT_ONCE = 512  # bounds the memory of the search: some 100 MB with 16 slots and 56 cells
STATES_AT_ONCE = 1 << 16
POWERS = (0.05, 20.0)  # of the joint, 1 / temperature: bounds of the fit
TILTS = (-20.0, 20.0)
CLIP = 1e-6
LEAST = 1e-300  # in place of zero, where one divides or takes a logarithm
Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Pick(StrEnum):
    """Which finished sample is the answer."""

    VALUE = "value"  # the highest predicted value: as published
    MAJORITY = "majority"
    VALUE_VOTE = "value-vote"  # vote weighted by value


SELECTORS: dict[Pick, Selector] = {
    Pick.VALUE: Best(Source.VALUE),
    Pick.MAJORITY: MAJORITY,
    Pick.VALUE_VOTE: Vote(Source.VALUE),
}


# --------------------------------------------------------------------------------------------------- calibrated joint


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
        for rows in _chunks(np.arange(len(out)), STATES_AT_ONCE):
            out[rows] = _tilted(joint[rows], 1 / self.temperature, self.tilt, grid)
        return out

    @classmethod
    def fit(cls, joint: Floats, score: Floats, grid: BinGrid) -> JointCalibration:
        """The numbers under which E_q[reward] best predicts the scores [n] of joints [n, C], by log-likelihood."""
        target = np.asarray(score, np.float64)
        if len(target) != len(joint) or not np.all((target >= 0) & (target <= 1)):
            raise UserError(f"expected {len(joint)} scores in [0, 1], one for each joint, found {len(target)}.")

        def loss(numbers: Floats) -> tuple[float, Floats]:
            parts = [
                _loss(joint[rows], target[rows], numbers, grid)
                for rows in _chunks(np.arange(len(target)), STATES_AT_ONCE)
            ]
            return sum(p[0] for p in parts) / len(target), sum(p[1] for p in parts) / len(target)

        found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=(POWERS, TILTS))
        return cls(temperature=float(1 / found.x[0]), tilt=float(found.x[1]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> JointCalibration:
        return cls(float(record["temperature"]), float(record["tilt"]))


def _tilted(joint: Floats, power: float, tilt: float, grid: BinGrid) -> NDArray[np.float64]:
    """[n, C]; cells of zero stay zero."""
    q = np.asarray(joint, np.float64)
    q = q / np.maximum(q.max(-1, keepdims=True), LEAST)
    q = q**power * np.exp(tilt * _cell_rewards(grid))
    return q / np.maximum(q.sum(-1, keepdims=True), LEAST)


def _cell_rewards(grid: BinGrid) -> NDArray[np.float64]:
    """[C]"""
    return np.repeat(np.asarray(grid.reward_centres, np.float64), grid.L)


def _loss(joint: Floats, score: Floats, numbers: Floats, grid: BinGrid) -> tuple[float, Floats]:
    """Summed negative log-likelihood and its gradient by (power, tilt), which are covariances with the reward."""
    q, reward = _tilted(joint, numbers[0], numbers[1], grid), _cell_rewards(grid)
    mean = q @ reward
    predicted = np.clip(mean, CLIP, 1 - CLIP)
    value = -(score * np.log(predicted) + (1 - score) * np.log1p(-predicted)).sum()
    slope = (predicted - score) / (predicted * (1 - predicted))
    weight = q * (reward - mean[:, None])
    by_power = (weight * np.log(np.maximum(joint, LEAST, dtype=np.float64))).sum(-1)
    return float(value), np.array([slope @ by_power, slope @ (weight @ reward)])


# ------------------------------------------------------------------------------------------------------------- policy


@dataclass(frozen=True)
class ZipRC:
    """α divides the cost between tokens (1) and time (0), β trades it against reward; `k_max` samples per prompt at most.

    Ablations: `horizons`, `independent` (product of the marginals instead of the joint), `can_pause` (False: what does not
    run is dropped for good), `can_branch` (live only: a second continuation of the strongest prefix is a candidate, too).
    """

    grid: BinGrid
    alpha: float
    beta: float
    k_max: int = 8
    horizons: Horizons = Horizons.SHARED
    fold: Fold = Fold.EDGE
    independent: bool = False
    can_pause: bool = True
    can_branch: bool = False
    selector: Pick = Pick.VALUE
    calibration: JointCalibration | None = None

    def __post_init__(self) -> None:
        Prices.of(self.alpha, self.beta, 1.0)
        if self.k_max < 1:
            raise UserError(f"k_max must be at least 1, found {self.k_max}.")

    @property
    def name(self) -> str:
        words = {
            f"k{self.k_max}": self.k_max != 8,
            f"horizons-{self.horizons}": self.horizons != Horizons.SHARED,
            f"fold-{self.fold}": self.fold != Fold.EDGE,
            "independent": self.independent,
            "no-pausing": not self.can_pause,
            "branching": self.can_branch,
            str(self.selector): self.selector != Pick.VALUE,
            "calibrated": self.calibration is not None,
        }
        return "/".join([f"zip-rc@{self.alpha:g},{self.beta:g}", *(word for word, said in words.items() if said)])

    @property
    def signals(self) -> int:
        return self.grid.size

    def read(self, joint: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, C] the joint itself."""
        return joint if self.calibration is None else self.calibration.apply(joint, self.grid)

    def decide(self, trees: Trees, interval: int) -> Decision:
        decision = Decision.stop(trees)
        first = (trees.used.sum(-1) == 1) & (trees.length[:, 0] <= 1) & ~trees.finished[:, 0]
        for rows in _chunks(np.flatnonzero(first), PROMPTS_AT_ONCE):
            self._open(decision, trees.take(rows), rows)
        for rows in _chunks(np.flatnonzero(~first), PROMPTS_AT_ONCE):
            self._plan(decision, trees.take(rows), rows)
        return decision

    def expectations(self, trees: Trees) -> tuple[Floats, Floats]:
        """Expected reward and expected remaining tokens of every branch, [P, S] each."""
        value, remaining = self._summary(trees)
        return value, np.where(trees.finished, 0.0, remaining)

    def choose(self, trees: Trees) -> Choice:
        """Among finished samples, those with an answer first; the probability is the value, or the share of the votes."""
        selector = SELECTORS[Pick(self.selector)]
        value = np.where(answered(trees), self._summary(trees)[0], 0.0)
        score = np.ones_like(value) if selector.by is None else value
        return selector.choose(trees, score, candidates(trees, trees.finished))

    def _open(self, decision: Decision, trees: Trees, rows: Ints) -> None:
        """The first decision: how many samples, by the joint at the prompt."""
        root = trees.root.reshape(-1, self.grid.R, self.grid.L)
        length = joint_summary(trees.root, self.grid)[1]
        prices = Prices.of(self.alpha, self.beta, np.maximum(length, 1.0))
        rule = {"fold": self.fold, "independent": self.independent}
        count = initial_count(root, self._most(trees), self.grid, prices, horizons=self.horizons, **rule)
        value = utility.utility(tables(root[:, None], self.grid, **rule), count[:, None], prices, self.horizons).utility
        decision.run[rows] = trees.running
        decision.start[rows] = count - 1
        decision.priority[rows] = self._summary(trees)[0]
        decision.utility[rows] = value

    def _plan(self, decision: Decision, trees: Trees, rows: Ints) -> None:
        """Every later decision. Columns of the search: the slots, new samples, and one more copy of the strongest."""
        value, remaining = self._summary(trees)
        mine = trees.unfinished if self.can_pause else trees.running
        strongest = np.where(mine, value, -np.inf).argmax(-1)
        room = np.maximum(self._most(trees) - trees.used.sum(-1), 0)
        limits = np.column_stack([mine, room, mine.any(-1) & (room > 0) & self.can_branch]).astype(np.int64)
        rule, prices = self._tables(trees, strongest, value), self._prices(trees, remaining)
        members, decision.utility[rows] = self._best(rule, prices, limits, ~trees.finished.any(-1))
        run, start, fork = members[:, :-2] > 0, members[:, -2], members[:, -1] > 0
        each = np.arange(len(run))
        alone = fork & ~run[each, strongest]  # the same set with the original instead of its copy
        run[alone, strongest[alone]] = True
        start, fork = self._share(room, start, fork & ~alone, trees, value[each, strongest])
        decision.run[rows], decision.start[rows], decision.priority[rows] = run, start, value
        decision.branch[rows] = np.where(fork, strongest, NONE)
        decision.branch_at[rows] = np.where(fork, trees.length[each, strongest], 0)

    def _prices(self, trees: Trees, remaining: Floats) -> Prices:
        """A reading has not seen the newest token, so it still counts it as remaining."""
        seen = np.where(trees.finished, trees.length, trees.length - 1)
        left = np.where(trees.finished, 0.0, remaining)
        return Prices.of(self.alpha, self.beta, normaliser(seen, left, trees.used))

    def _tables(self, trees: Trees, strongest: Ints, value: Floats) -> utility.Tables:
        copy = np.take_along_axis(trees.signals, strongest[:, None, None], 1)
        joints = np.concatenate([trees.signals, trees.root[:, None], copy], 1)
        added = ((0, 0), (0, 2))
        return tables(
            joints.reshape(*joints.shape[:2], self.grid.R, self.grid.L),
            self.grid,
            finished=np.pad(trees.finished, added),
            finished_value=np.pad(np.where(answered(trees), value, 0.0), added),
            fold=self.fold,
            independent=self.independent,
        )

    def _best(self, rule: utility.Tables, prices: Prices, limits: Ints, must: Bools) -> tuple[Ints, Floats]:
        """Counts [P, columns] and their utility [P]. Where no set is worth its price but one `must` run, to the very end:
        of the unfinished samples if there are any, of new ones else. (A horizon would let one run after the other begin.)
        """
        found = best_set(rule, prices, limits=limits, horizons=self.horizons)
        members, value = found.members, found.utility
        rows = np.flatnonzero(must & ~members.any(-1) & limits.any(-1))
        if len(rows):
            begun = np.where(np.arange(limits.shape[1]) < limits.shape[1] - 2, limits[rows], 0)
            limits = np.where(begun.any(-1, keepdims=True), begun, limits[rows])
            forced = np.ones(len(rows), bool)
            rule, prices = rule.take(rows), prices.take(rows)
            found = best_set(rule, prices, limits=limits, must_run=forced, horizons=Horizons.NONE)
            members[rows], value[rows] = found.members, found.utility
        return members, value

    def _share(self, room: Ints, start: Ints, fork: Bools, trees: Trees, value: Floats) -> tuple[Ints, Bools]:
        """New samples and the copy compete for the last free slot, by expected reward."""
        crowded = fork & (start >= room)
        better = value >= joint_summary(trees.root, self.grid)[0]
        return np.where(crowded & better, room - 1, start), fork & (~crowded | better)

    def _most(self, trees: Trees) -> int:
        return min(self.k_max, trees.slots)

    def _summary(self, trees: Trees) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[P, S] expected reward and expected remaining tokens by the newest reading."""
        reward, remaining = joint_summary(trees.signals.reshape(-1, self.grid.size), self.grid)
        return reward.reshape(trees.status.shape), remaining.reshape(trees.status.shape)


def _chunks(rows: Ints, size: int) -> Iterator[Ints]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]

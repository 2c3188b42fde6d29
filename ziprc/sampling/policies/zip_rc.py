"""ZIP-RC sampling as published: always run the set of samples with the highest sampling utility.

Every sample predicts, with each token, the joint distribution of its own final reward and remaining length. Before every
decision interval all sets of unfinished samples are compared, paused ones and new ones from the prompt included; the set
that is worth most (utility.py: expected best reward minus the price of tokens and of time) runs, the others pause, and the
plan is made anew after the interval. It ends when waiting for nobody is worth it (ZIP-RC, arXiv 2512.01457, §4).

Departures from the published simulator, whose faults are not repeated: a prompt never stops without a finished sample (there
the empty set is worth 0 and wins when every price is too high), and the sample that must run then is not exchanged on the
way; finished samples keep their exact value under every horizon; a short budget drops by value and not by index; the fold is
priced at its edge; sets are searched exhaustively where that is cheap; new samples from the prompt compete in every decision
instead of in the first alone. A sample that ran into the cap or gave no answer is worth 0.
Shapes: P prompts, S slots, R reward centres, L length bins, C = R·L cells, n states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling.controller import NONE, Choice, Decision
from ziprc.sampling.policies.base import Best, Source, answered, candidates
from ziprc.sampling.policies.search import best_set, initial_count
from ziprc.sampling.policies.utility import Horizons, Prices, Tables, normaliser, tables, utility
from ziprc.sampling.score import JointCalibration, joint_summary
from ziprc.sampling.tree import Bools, Floats, Ints, Trees

PROMPTS_AT_ONCE = 512  # bounds the memory of the search: some 100 MB with 16 slots and 56 cells


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
    independent: bool = False
    can_pause: bool = True
    can_branch: bool = False
    calibration: JointCalibration | None = None

    def __post_init__(self) -> None:
        Prices.of(self.alpha, self.beta, 1.0)
        if self.k_max < 1:
            raise UserError(f"k_max must be at least 1, found {self.k_max}.")

    @property
    def name(self) -> str:
        """zip-rc@alpha,beta and, behind it, what departs from the published rule."""
        words = {
            f"k{self.k_max}": self.k_max != 8,
            f"horizons-{self.horizons}": self.horizons != Horizons.SHARED,
            "independent": self.independent,
            "no-pausing": not self.can_pause,
            "branching": self.can_branch,
            "calibrated": self.calibration is not None,
        }
        return "/".join([f"zip-rc@{self.alpha:g},{self.beta:g}", *(word for word, said in words.items() if said)])

    @property
    def signals(self) -> int:
        return self.grid.size

    def read(self, joint: Floats, features: Floats) -> Floats:
        """[n, C] the joint itself."""
        return joint if self.calibration is None else self.calibration.apply(joint, self.grid)

    def decide(self, trees: Trees, interval: int) -> Decision:
        """Open prompts that have their first token, plan anew for all others, some prompts at a time for memory's sake."""
        decision = Decision.stop(trees)
        first = (trees.used.sum(-1) == 1) & (trees.length[:, 0] <= 1) & ~trees.finished[:, 0]
        for step, mine in ((self._open, first), (self._plan, ~first)):
            rows = np.flatnonzero(mine)
            for start in range(0, len(rows), PROMPTS_AT_ONCE):
                chunk = rows[start : start + PROMPTS_AT_ONCE]
                step(decision, trees.take(chunk), chunk)
        return decision

    def expectations(self, trees: Trees) -> tuple[Floats, Floats]:
        """Expected reward and expected remaining tokens of every branch by its newest reading, [P, S] each."""
        reward, remaining = joint_summary(trees.signals.reshape(-1, self.grid.size), self.grid)
        shape = trees.status.shape
        return reward.reshape(shape), np.where(trees.finished, 0.0, remaining.reshape(shape))

    def choose(self, trees: Trees) -> Choice:
        """The highest value among finished samples, those with an answer first; the value is the probability."""
        value = np.where(answered(trees), self.expectations(trees)[0], 0.0)
        return Best(Source.VALUE).choose(trees, value, candidates(trees, trees.finished))

    def _open(self, decision: Decision, trees: Trees, rows: Ints) -> None:
        """The first decision: how many samples, by the joint at the prompt."""
        length = joint_summary(trees.root, self.grid)[1]
        prices = Prices.of(self.alpha, self.beta, np.maximum(length, 1.0))
        joint = trees.root.reshape(-1, 1, self.grid.R, self.grid.L)
        root = tables(joint, self.grid, independent=self.independent)
        count = initial_count(root, min(self.k_max, trees.slots), prices, self.horizons)
        decision.run[rows] = trees.running
        decision.start[rows] = count - 1
        decision.priority[rows] = self.expectations(trees)[0]
        decision.utility[rows] = utility(root, count[:, None], prices, self.horizons).utility

    def _plan(self, decision: Decision, trees: Trees, rows: Ints) -> None:
        """Every later decision. Columns of the search: the slots, new samples, and one more copy of the strongest."""
        value, remaining = self.expectations(trees)
        mine = trees.unfinished if self.can_pause else trees.running
        strongest = np.where(mine, value, -np.inf).argmax(-1)
        room = np.maximum(min(self.k_max, trees.slots) - trees.used.sum(-1), 0)
        limits = np.column_stack([mine, room, mine.any(-1) & (room > 0) & self.can_branch]).astype(np.int64)
        copy = np.take_along_axis(trees.signals, strongest[:, None, None], 1)
        joints = np.concatenate([trees.signals, trees.root[:, None], copy], 1)
        added = ((0, 0), (0, 2))
        rule = tables(
            joints.reshape(*joints.shape[:2], self.grid.R, self.grid.L),
            self.grid,
            finished=np.pad(trees.finished, added),
            finished_value=np.pad(np.where(answered(trees), value, 0.0), added),
            independent=self.independent,
        )
        # A reading has not seen the newest token, so it still counts it as remaining.
        seen = np.where(trees.finished, trees.length, trees.length - 1)
        prices = Prices.of(self.alpha, self.beta, normaliser(seen, remaining, trees.used))
        members, decision.utility[rows] = self._best(rule, prices, limits, ~trees.finished.any(-1))
        run, start, fork = members[:, :-2] > 0, members[:, -2], members[:, -1] > 0
        each = np.arange(len(run))
        alone = fork & ~run[each, strongest]  # the same set with the original instead of its copy
        run[alone, strongest[alone]] = True
        fork &= ~alone
        crowded = fork & (start >= room)  # new samples and the copy compete for the last free slot, by expected reward
        better = value[each, strongest] >= joint_summary(trees.root, self.grid)[0]
        start, fork = np.where(crowded & better, room - 1, start), fork & (~crowded | better)
        decision.run[rows], decision.start[rows], decision.priority[rows] = run, start, value
        decision.branch[rows] = np.where(fork, strongest, NONE)
        decision.branch_at[rows] = np.where(fork, trees.length[each, strongest], 0)

    def _best(self, rule: Tables, prices: Prices, limits: Ints, must: Bools) -> tuple[Ints, Floats]:
        """Counts [P, columns] and their utility [P]. Where no set is worth its price but one `must` run, to the very end:
        of the unfinished samples if there are any, of new ones else. (A horizon would let one run after the other begin.)
        """
        found = best_set(rule, prices, limits=limits, horizons=self.horizons)
        members, value = found.members, found.utility
        rows = np.flatnonzero(must & ~members.any(-1) & limits.any(-1))
        if len(rows):
            begun = np.where(np.arange(limits.shape[1]) < limits.shape[1] - 2, limits[rows], 0)
            limits = np.where(begun.any(-1, keepdims=True), begun, limits[rows])
            rule, prices = rule.take(rows), prices.take(rows)
            found = best_set(rule, prices, limits=limits, must_run=True, horizons=Horizons.NONE)
            members[rows], value[rows] = found.members, found.utility
        return members, value

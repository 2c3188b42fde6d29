"""zip-rc-plus, ours: spend where the selected answer gains most per token.

Three ideas, each with its ablation. (1) *Fused score*: the joint knows which prompts are hard, the log-probabilities of
the same forward pass know which branch slipped; a calibrated logistic over both gives P(right) of every branch
(score.py). (2) *Gain of the selected answer*: more compute helps only if the present answer is wrong and the next one right:

    gain = (1 - P(selected answer is right)) · P(this branch is right | none so far was)

where the share of right samples of a prompt is latent, θ ~ Beta with the mean that the joint at the prompt predicts and
a strength κ fitted on validation prompts, so that failures of one prompt are correlated: after n of them a new sample is
right with κ·θ0 / (κ + n), and a branch on the way has the odds that its own evidence makes of that. (3) *Gain per token*:
continuing, resuming, branching before a slip and starting anew compete by gain over expected remaining tokens; what is not
worth `price` does not run. Differs from the published rule, which credits coverage as if the best sample were always
chosen and as if errors of one prompt were independent. Shapes: P, S, K as in tree.py; C = 2·S + 1 candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling import features as f
from ziprc.sampling.controller import NONE, Choice, Decision
from ziprc.sampling.fitting import Calibration
from ziprc.sampling.score import joint_summary
from ziprc.sampling.tree import Bools, Floats, Status, Trees

ON_THE_WAY, FINISHED, REMAINING, VALUE = range(4)  # signals
MOST_LOG_ODDS = 30.0  # of a prompt: beyond it 1 - p is lost in rounding

# How much a failure after a prefix says about the prefix: Beta strength, as `strength` is for prompts. Small, since the
# estimate of a prefix misses what went wrong before; with the strength of prompts (11 at toy) forks repeat their errors.
FORK_STRENGTH = 1.0


@dataclass(frozen=True)
class FusedScore:
    """Policies that see P(right) of every branch and of every answer. `calibration` says how."""

    calibration: Calibration
    grid: BinGrid
    signals: ClassVar[int] = 4

    def read(self, joint: Floats, features: Floats) -> NDArray[np.float32]:
        """[n, 4] log odds on the way, log odds if finished, expected remaining tokens, expected reward of the joint."""
        own = self.calibration
        x = own.inputs(joint, features, self.grid)
        reward, remaining = joint_summary(joint, self.grid)
        columns = [own.on_the_way.log_odds(x, features[:, f.TOKENS]), own.finished.log_odds(x), remaining, reward]
        return np.stack(columns, -1).astype(np.float32)

    def _log_odds(self, trees: Trees) -> Floats:
        """[P, S] of a branch being right, from its own evidence and the prompt."""
        return np.where(trees.finished, trees.signals[..., FINISHED], trees.signals[..., ON_THE_WAY]).astype(np.float64)

    def _answers(self, trees: Trees) -> Floats:
        """[P, S] probability that the answer of a finished branch is right."""
        return self.calibration.vote.probabilities(trees, self._log_odds(trees), trees.root[:, ON_THE_WAY])

    def expectations(self, trees: Trees) -> tuple[Floats, Floats]:
        """P(right) and expected remaining tokens of every branch, [P, S] each."""
        return expit(self._log_odds(trees)), np.where(trees.finished, 0.0, trees.signals[..., REMAINING])

    def choose(self, trees: Trees) -> Choice:
        found = self._answers(trees)
        slot = np.where(found.max(-1) > 0, found.argmax(-1), trees.finished.argmax(-1))
        return Choice(slot, np.take_along_axis(found, slot[:, None], 1)[:, 0])


@dataclass(frozen=True)
class FusedThreshold(FusedScore):
    """Ablation: the same score without the utility. One whole sample after the other, `most` in all, until P(right) reaches
    `level`."""

    level: float = 0.9
    most: int = 1 << 10
    can_branch: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"fused-threshold@{self.most}/{self.level:g}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        decision = Decision.stop(trees)
        decision.run = trees.unfinished
        wanting = ~trees.unfinished.any(-1) & (self._answers(trees).max(-1) < self.level)
        wanting &= trees.used.sum(-1) < min(self.most, trees.slots)
        decision.start = wanting.astype(np.int64)
        return decision


@dataclass(frozen=True)
class ZipRCPlus(FusedScore):
    """`price`: how much probability of a right answer one token must buy. `width`: branches in flight at most.

    Ablations: `latent=False`, failures of a prompt say nothing about its next sample; `can_pause=False`, a branch that is
    not continued is dropped for good.
    """

    price: float = 1e-3
    width: int = 1
    can_branch: bool = False
    latent: bool = True
    can_pause: bool = True
    label: str = "zip-rc-plus"

    def __post_init__(self) -> None:
        if not self.price > 0 or self.width < 1:
            raise UserError(f"price must be above 0 and width at least 1, found {self.price} and {self.width}.")

    @property
    def name(self) -> str:
        return f"{self.label}@{self.price:.2g}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        """One pick after the other, up to `width`: what gains most per token, as long as it is worth its price."""
        decision = Decision.stop(trees)
        doubt = 1 - self._answers(trees).max(-1)
        chance, cost, allowed = self._candidates(trees)
        slots, rows = trees.slots, np.arange(len(trees))
        free = (trees.status == Status.FREE).sum(-1)
        must = ~trees.finished.any(-1)
        for pick in range(self.width):
            worth = np.where(allowed, doubt[:, None] * chance / cost, -np.inf)
            best = worth.argmax(-1)
            good = worth[rows, best] >= self.price
            if pick == 0:
                decision.utility = worth[rows, best]
                decision.priority = worth[:, :slots]
                own = np.where(allowed[:, :slots], worth[:, :slots], -np.inf)
                best = np.where(good, best, own.argmax(-1))
                good |= must & allowed[:, :slots].any(-1)
            running, branching = good & (best < slots), good & (best >= slots) & (best < 2 * slots)
            decision.run[rows[running], best[running]] = True
            decision.branch = np.where(branching, best - slots, decision.branch)
            decision.start += good & (best == 2 * slots)
            doubt = np.where(good, doubt * (1 - chance[rows, best]), doubt)
            allowed[rows[good], np.minimum(best[good], 2 * slots)] = False
            allowed[:, slots : 2 * slots] &= ((decision.branch == NONE) & (decision.start < free))[:, None]
            allowed[:, 2 * slots] = decision.start + (decision.branch != NONE) < free
        if self.can_branch:
            branch = np.maximum(decision.branch, 0)
            decision.branch_at = trees.spot[rows, branch].astype(np.int64)
        return decision

    def _candidates(self, trees: Trees) -> tuple[Floats, Floats, Bools]:
        """Chance to be right if none so far was, expected tokens, and whether it can be done; all [P, C].

        The columns are: every branch, a fork before the slip of every branch, a new sample.
        """
        root = np.clip(trees.root[:, ON_THE_WAY].astype(np.float64), -MOST_LOG_ODDS, MOST_LOG_ODDS)[:, None]
        alone, prior = self._log_odds(trees), expit(root)
        kappa = self.calibration.strength if self.latent else np.inf
        lost = np.clip(1 - expit(alone) / prior, 0.0, 1.0)
        failures = np.where(trees.finished, 1.0, np.where(trees.unfinished, lost, 0.0))
        total = failures.sum(-1, keepdims=True)
        fresh = prior / (1 + total / kappa)
        shift = logit(prior / (1 + (total - failures) / kappa)) - root  # by the failures of the others; 0 without any
        free = (trees.status == Status.FREE).any(-1, keepdims=True)
        chance, cost = expit(alone + shift), trees.signals[..., REMAINING]
        forks, fork_cost, can_fork = np.zeros_like(chance), np.ones_like(chance), np.zeros_like(trees.unfinished)
        if self.can_branch:
            spot = trees.spot_signals
            tried = (trees.parent[:, None, :] == np.arange(trees.slots)[:, None]).sum(-1)
            again = FORK_STRENGTH / (FORK_STRENGTH + 1 + tried)  # the parent itself went on from there, and failed
            forks, fork_cost = expit(spot[..., ON_THE_WAY] + shift) * again, spot[..., REMAINING]
            can_fork = trees.used & (trees.spot > trees.fork) & (trees.spot < trees.length) & free
        return (
            np.concatenate([chance, forks, fresh], -1),
            np.maximum(np.concatenate([cost, fork_cost, trees.root[:, REMAINING, None]], -1), 1.0),
            np.concatenate([trees.unfinished if self.can_pause else trees.running, can_fork, free], -1),
        )

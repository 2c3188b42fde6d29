"""Which answer to give: votes, values and both, over the finished branches of each prompt.

`VoteModel` is ours: value and vote combined into a probability. The answers of a prompt compete in a softmax, together
with "none of them is right"; the score of an answer is linear in the log odds of its best branch and in the log of its
votes. Fitted by maximum likelihood on validation prompts (a conditional logit model, McFadden 1974), it keeps the
weights near one: the odds of the best branch times the number of branches that agree. Shapes: P prompts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from ziprc.sampling.tree import NO_ANSWER, Bools, Floats, Ints, Trees

LOG = np.log(np.maximum(np.arange(1 << 12), 1))  # of counts
RIDGE = 1e-3  # keeps the fit finite when a handful of prompts is separable


def same_answer(trees: Trees) -> Bools:
    """[P, S, S] pairs of finished branches that give the same answer."""
    voting = trees.finished & (trees.answer != NO_ANSWER)
    return (trees.answer[:, :, None] == trees.answer[:, None, :]) & voting[:, :, None] & voting[:, None, :]


def best_vote(trees: Trees, weight: Floats, tie: Floats) -> Ints:
    """[P] a branch of the answer with most weight [P, S]; ties go to the branch with the highest `tie` [P, S]."""
    same = same_answer(trees)
    total = np.where(same.any(-1), (same * weight[:, None, :]).sum(-1), -np.inf)
    leading = total >= total.max(-1, keepdims=True) - 1e-9
    return np.where(leading & trees.finished, tie, -np.inf).argmax(-1)


def answer_inputs(trees: Trees, log_odds: Floats, prior: Floats) -> tuple[Floats, Bools]:
    """[P, S, 4] of the answer that each finished branch gives: best log odds, log votes, prior log odds [P], one; and the
    first branch of every answer [P, S], which speaks for it."""
    same = same_answer(trees)
    count = same.sum(-1, dtype=np.int16)
    best = np.where(same, log_odds[:, None, :].astype(np.float32), -np.inf).max(-1)
    columns = [np.where(count > 0, best, 0.0), LOG[np.maximum(count, 1)], np.broadcast_to(prior[:, None], best.shape)]
    return np.stack([*columns, np.ones(best.shape)], -1), (count > 0) & (same.argmax(-1) == np.arange(trees.slots))


@dataclass(frozen=True)
class VoteModel:
    """Weights of an answer's score: log odds of its best branch, log votes, log odds of the prompt, and a constant."""

    best: float = 1.0
    votes: float = 1.0
    prior: float = 0.0
    bias: float = 0.0

    def probabilities(self, trees: Trees, log_odds: Floats, prior: Floats) -> Floats:
        """[P, S] that the answer of a branch is right, at the first branch of each answer and 0 elsewhere."""
        out = np.zeros(trees.status.shape)
        rows = np.flatnonzero(trees.finished.any(-1))
        if len(rows):
            columns = int(np.flatnonzero(trees.finished.any(0))[-1]) + 1
            x, first = answer_inputs(trees.take(rows, columns), log_odds[rows, :columns], prior[rows])
            score = np.where(first, x @ np.array([self.best, self.votes, self.prior, self.bias]), -np.inf)
            top = np.maximum(score.max(-1, keepdims=True), 0.0)  # "none of them" scores 0
            odds = np.exp(score - top)
            out[rows, :columns] = odds / (odds.sum(-1, keepdims=True) + np.exp(-top))
        return out

    @classmethod
    def fit(cls, cases: list[tuple[Trees, Floats, Floats, Bools]]) -> VoteModel:
        """From cases of (trees, log odds [P, S], prior [P], which branches are right [P, S])."""
        data = [(*answer_inputs(trees, log_odds, prior), right) for trees, log_odds, prior, right in cases]

        def loss(weights: Floats) -> float:
            """Mean negative log-likelihood of what was right: an answer, or none of them."""
            total, count = 0.0, 0
            for x, lead, right in data:
                score = np.concatenate([np.where(lead, x @ weights, -np.inf), np.zeros((len(x), 1))], -1)
                true = lead & right
                truth = np.concatenate([true, ~true.any(-1, keepdims=True)], -1)
                total += (logsumexp(score, -1) - logsumexp(np.where(truth, score, -np.inf), -1)).sum()
                count += len(x)
            return total / count + RIDGE * float(weights @ weights)

        found = minimize(loss, np.array([1.0, 1.0, 0.0, 0.0]), method="BFGS")
        return cls(*(float(w) for w in found.x))

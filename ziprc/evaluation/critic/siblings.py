"""Critics without a network: what graded siblings of a rollout say about it, for nothing. Any critic has to beat them.

The prior is of the training prompts. *Mean*: the share of right siblings, shrunk to the prior. *Lookup*: at the end, the mean
score of the siblings with the same answer; an answer that no sibling gave is almost surely wrong where a right one is
known; before the end, the mean. *Trie*: after t tokens, the mean score of the siblings that begin with the same t tokens,
every node of this tree of prefixes shrunk to its parent and the root to the prior.

On short, repetitive responses the tree is strong; where no two responses share more than some tokens, it is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import betabinom

from ziprc.reading.logits import Candidates
from ziprc.training.packs import Graded

UNSEEN = 0.02  # chance of an answer that no sibling gave, where a right one is known
TRIE_STRENGTH = 2.0  # siblings' worth of its parent in every node


@dataclass(frozen=True)
class Prior:
    """Beta distribution of a prompt's pass rate: its mean, and how many rollouts it weighs as much as."""

    mean: float
    strength: float

    @classmethod
    def fitted(cls, prompts: ArrayLike, success: ArrayLike) -> Prior:
        """The likeliest one for the outcomes [n] of rollouts of these prompts [n], by the prompts' counts of successes."""
        _, group, asked = np.unique(prompts, return_inverse=True, return_counts=True)
        right = np.bincount(group, success)
        mean = float(np.clip(right.sum() / asked.sum(), 1e-3, 1 - 1e-3))

        def loss(log_strength: float) -> float:
            strength = np.exp(log_strength)
            return -float(betabinom.logpmf(right, asked, mean * strength, (1 - mean) * strength).sum())

        return cls(mean, float(np.exp(minimize_scalar(loss, bounds=(-3, 6), method="bounded").x)))


def sibling_mean(scores: Sequence[float], prior: Prior) -> float:
    """The expected score of the next rollout, from the scores of the siblings."""
    return (sum(scores) + prior.strength * prior.mean) / (len(scores) + prior.strength)


def answer_lookup(target: Graded, siblings: Sequence[Graded], prior: Prior) -> float:
    """The expected score of a finished rollout, from the siblings' answers."""
    same = [s.score for s in siblings if s.answer == target.answer and target.answer]
    if same:
        return float(np.mean(same))
    mean = sibling_mean([s.score for s in siblings], prior)
    return UNSEEN if any(s.score >= 0.5 for s in siblings) else mean


def trie_values(target: Graded, siblings: Sequence[Graded], prior: Prior) -> NDArray[np.float64]:
    """[m + 1] expected score after each of the first 0 … m tokens of a response of m tokens."""
    m = len(target.response)
    shared = np.array([_common(target.response, s.response) for s in siblings], dtype=np.int64)
    scores = np.array([s.score for s in siblings])
    values = np.full(m + 1, sibling_mean([s.score for s in siblings], prior))
    for t in range(1, int(shared.max(initial=0)) + 1):
        there = shared >= t
        values[t] = (scores[there].sum() + TRIE_STRENGTH * values[t - 1]) / (there.sum() + TRIE_STRENGTH)
    values[int(shared.max(initial=0)) + 1 :] = values[int(shared.max(initial=0))]
    return values


def trie_candidates(
    target: Graded, siblings: Sequence[Graded], values: NDArray[np.float64], of: Candidates
) -> NDArray[np.float64]:
    """[n] expected score once each candidate stands there, of a target with the `values` [m + 1] that the tree gives it."""
    state = of.state
    q = values[state]  # where no sibling goes on so, nothing is learned: the parent's value
    taken = of.ids == target.response[state]
    q[taken] = values[state[taken] + 1]
    gone: dict[tuple[int, int], list[float]] = {}
    for sibling in siblings:
        t = _common(target.response, sibling.response)
        if t < min(len(target.response), len(sibling.response)):  # the state where it goes on otherwise
            gone.setdefault((t, int(sibling.response[t])), []).append(sibling.score)
    for (t, token), scores in gone.items():
        at = np.flatnonzero((state == t) & (of.ids == token))
        q[at] = (sum(scores) + TRIE_STRENGTH * values[t]) / (len(scores) + TRIE_STRENGTH)
    return q


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Tokens with which both begin."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n

"""The honest competitors of adaptive ZIP-RC sampling: fixed votes, stopping rules and pruning rules of the literature.

Each is a policy as in controller.py and runs in the same loop and the same executors, so that every token is counted by
the same code. What a policy knows of a branch is one number per `Source`, read from the same forward pass; log-probabilities
are turned into probabilities (exp), so that every score lies in [0, 1] and serves as a vote weight, as a stopping threshold
and as the reported probability alike. Two layers:

* selectors, which answer to give: `Vote` (majority or weighted; self-consistency, arXiv 2203.11171) and `Best` (best of k);
* policies, what to run: `Fixed`, `AdaptiveConsistency` (arXiv 2305.11860), `DeepConfOffline` and `DeepConfOnline` (arXiv
  2508.15260), `SequentialStop`, pruning by value, length, chance or style, and `StyleStop`.

Deliberate differences from DeepConf as published: confidence is the geometric mean probability of the sampled tokens in the
worst exponential window of about eight, instead of top-k log-probabilities in windows of 2,048 tokens; votes are weighted
by a power of it. A dropped branch is paused and never resumed; its tokens have been paid for. A sample without an answer
never wins over one with an answer: that it has none is known to everybody for free.
Shapes: P prompts, S slots, K signals, n states, C cells of the joint, F features, E episodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling import features as f
from ziprc.sampling.controller import Choice, Decision
from ziprc.sampling.replay import Pool
from ziprc.sampling.score import Logistic, joint_summary, token_inputs
from ziprc.sampling.selection import best_vote, same_answer
from ziprc.sampling.tree import NO_ANSWER, Status, Trees

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

STYLE_COLUMN = len(f.FEATURES)  # replays may append the style code of each rollout; UNKNOWN_STYLE until it shows
UNKNOWN_STYLE = -1
CHUNK = 1 << 16  # states that are read at once: bounds the memory of the quadratic logistic


# What a policy can know of a branch.


class Source(StrEnum):
    """One number per state."""

    MEAN = "logprob"  # exp of the mean log-probability
    LOW = "min-logprob"  # exp of the least
    WINDOW = "window"  # exp of that of the worst window: DeepConf's confidence
    LOGISTIC = "logistic"  # logistic regression on log-probability statistics, without the joint
    VALUE = "value"  # expected reward of the joint
    ENTROPY = "entropy"  # mean entropy
    STYLE = "style"  # code of the style


LOG_PROBS = {Source.MEAN: f.MEAN, Source.LOW: f.LOW, Source.WINDOW: f.LOW_WINDOW}
SCORES = (Source.MEAN, Source.LOW, Source.LOGISTIC, Source.VALUE)


@dataclass(frozen=True)
class Reader:
    """Turns readings into scores. `logistic` was fitted on `token_inputs` of finished branches."""

    grid: BinGrid
    logistic: Logistic | None = None

    def read(self, sources: tuple[Source, ...], joint: NDArray, features: NDArray) -> NDArray[np.float32]:
        """[n, K] one column per source."""
        out = np.empty((len(features), len(sources)), np.float32)
        for start in range(0, len(features), CHUNK):
            rows = slice(start, start + CHUNK)
            for column, source in enumerate(sources):
                out[rows, column] = self._column(source, joint[rows], features[rows])
        return out

    def _column(self, source: Source, joint: NDArray, features: NDArray) -> NDArray[np.floating]:
        if source in LOG_PROBS:
            return np.exp(features[:, LOG_PROBS[source]])
        if source is Source.VALUE:
            return joint_summary(joint, self.grid)[0]
        if source is Source.LOGISTIC:
            return self._fitted().probability(token_inputs(features))
        return features[:, f.ENTROPY if source is Source.ENTROPY else _style_column(features)]

    def _fitted(self) -> Logistic:
        if self.logistic is None:
            raise UserError("This policy scores with the log-probability logistic, and the reader was given none.")
        return self.logistic


def _style_column(features: NDArray) -> int:
    if features.shape[1] <= STYLE_COLUMN:
        raise UserError(
            f"Policies that look at the style expect its code in column {STYLE_COLUMN} of the features, found "
            f"{features.shape[1]} columns. Append it to the pool; live sampling has none."
        )
    return STYLE_COLUMN


# Which branches may be chosen, and which is.


def answered(trees: Trees) -> Bools:
    """[P, S] finished branches with an answer."""
    return trees.finished & (trees.answer != NO_ANSWER)


def candidates(trees: Trees, liked: Bools) -> Bools:
    """[P, S] the liked ones among the answered; where there are none, all answered; else all finished."""
    mask = answered(trees)
    mask = np.where(mask.any(-1, keepdims=True), mask, trees.finished)
    return np.where((mask & liked).any(-1, keepdims=True), mask & liked, mask)


def answer_share(trees: Trees, weight: Floats, slot: Ints) -> Floats:
    """[P] what share of all weight the answer of `slot` holds; 0 for no answer."""
    answer = np.take_along_axis(trees.answer, slot[:, None], 1)
    agreeing = answered(trees) & (trees.answer == answer)
    return (weight * agreeing).sum(-1) / np.maximum(weight.sum(-1), 1e-300)


@dataclass(frozen=True)
class Vote:
    """The answer with most weight, a sample's weight being its score to the power `sharpness` (1 where `by` is None)."""

    by: Source | None = None
    sharpness: float = 1.0

    @property
    def label(self) -> str:
        return "majority" if self.by is None else f"vote-{self.by}{power_label(self.sharpness)}"

    def choose(self, trees: Trees, score: Floats, voters: Bools) -> Choice:
        """Ties between answers go to the higher score, or to the earlier sample."""
        weight = self.weights(score, voters)
        tie = -np.arange(trees.slots) if self.by is None else score
        slot = best_vote(trees, weight, np.where(voters, tie, -np.inf))
        return Choice(slot, answer_share(trees, weight, slot))

    def weights(self, score: Floats, voters: Bools) -> Floats:
        """[P, S] relative to the best of a prompt, so that tolerances and sums behave at any sharpness."""
        score = np.where(voters, score, 0.0)
        return voters * (score / np.maximum(score.max(-1, keepdims=True), 1e-300)) ** self.sharpness


@dataclass(frozen=True)
class Best:
    """The sample with the highest score."""

    by: Source

    @property
    def label(self) -> str:
        return f"best-{self.by}"

    def choose(self, trees: Trees, score: Floats, voters: Bools) -> Choice:
        """Ties go to the earlier sample."""
        slot = np.where(voters, score, -np.inf).argmax(-1)
        return Choice(slot, np.take_along_axis(score, slot[:, None], 1)[:, 0])


def power_label(sharpness: float) -> str:
    """The part of a name that tells the power of a score, where it is not the score itself."""
    return "" if sharpness == 1 else f"^{sharpness:g}"


Selector = Vote | Best
MAJORITY = Vote()


# What the policies share.


def started(trees: Trees) -> Ints:
    """[P] branches so far."""
    return trees.used.sum(-1)


def decision(trees: Trees, run: Bools, start: ArrayLike) -> Decision:
    """Run these [P, S] and start so many [P], as far as there are slots; a short budget cuts the shortest branches."""
    out = Decision.stop(trees)
    out.run = run
    out.start = np.clip(start, 0, (trees.status == Status.FREE).sum(-1))
    out.priority = trees.length.astype(np.float64)
    return out


def keep_one(choice: Decision, trees: Trees, preference: Floats | None = None) -> Decision:
    """Where nothing is finished and nothing would run, one running branch goes on: the preferred, or the first."""
    rank = -np.arange(trees.slots) if preference is None else preference
    stuck = ~trees.finished.any(-1) & ~choice.going & trees.running.any(-1)
    last = np.where(trees.running, rank, -np.inf).argmax(-1)
    choice.run[stuck, last[stuck]] = True
    return choice


@dataclass(frozen=True)
class Baseline(ABC):
    """A policy without branching that knows the `sources` of its selector and those it asks for in `looks_at`."""

    reader: Reader
    can_branch: ClassVar[bool] = False
    looks_at: ClassVar[tuple[Source, ...]] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """With its settings."""

    @property
    @abstractmethod
    def chooser(self) -> Selector:
        """How the answer is chosen."""

    @abstractmethod
    def decide(self, trees: Trees, interval: int) -> Decision:
        """What runs next."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What each signal is; policies with equal sources and readers can share one reading of a pool."""
        own = (self.chooser.by, *self.looks_at)
        return tuple(dict.fromkeys(s for s in own if s is not None))

    @property
    def signals(self) -> int:
        return len(self.sources)

    def read(self, joint: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
        """[n, K]"""
        return self.reader.read(self.sources, joint, features)

    def score(self, trees: Trees, source: Source | None) -> Floats:
        """[P, S] newest score of each branch; 1 for no source."""
        if source is None:
            return np.ones(trees.status.shape)
        return trees.signals[..., self.sources.index(source)].astype(np.float64)

    def liked(self, trees: Trees) -> Bools:
        """[P, S] branches that the answer should come from, if any of them has one."""
        return trees.finished

    def expectations(self, trees: Trees) -> tuple[Floats, Floats]:
        """The value of every branch where the policy reads it, [P, S]; nothing about lengths."""
        unknown = np.full(trees.status.shape, np.nan)
        return self.score(trees, Source.VALUE) if Source.VALUE in self.sources else unknown, unknown

    def choose(self, trees: Trees) -> Choice:
        """From the liked branches, by the selector."""
        return self.chooser.choose(trees, self.score(trees, self.chooser.by), candidates(trees, self.liked(trees)))


@dataclass(frozen=True)
class Selecting(Baseline):
    """A baseline whose selector is a setting."""

    selector: Selector = MAJORITY

    @property
    def chooser(self) -> Selector:
        return self.selector

    @property
    def suffix(self) -> str:
        """Names a selector that is not the usual one."""
        return "" if self.selector == type(self).selector else f"/{self.selector.label}"


# Fixed numbers of samples.


@dataclass(frozen=True)
class Fixed(Selecting):
    """k samples in parallel, to the end."""

    k: int = 1

    @property
    def name(self) -> str:
        return f"{self.selector.label}@{self.k}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        return decision(trees, trees.running, self.k - started(trees))


@dataclass(frozen=True)
class DeepConfOffline(Baseline):
    """k samples to the end; those of the most confident share `keep` vote, weighted by confidence."""

    k: int = 8
    keep: float = 0.5
    sharpness: float = 1.0

    @property
    def name(self) -> str:
        return f"deepconf-offline@{self.k}/{self.keep:g}{power_label(self.sharpness)}"

    @property
    def chooser(self) -> Vote:
        return Vote(Source.WINDOW, self.sharpness)

    def decide(self, trees: Trees, interval: int) -> Decision:
        return decision(trees, trees.running, self.k - started(trees))

    def liked(self, trees: Trees) -> Bools:
        confidence = self.score(trees, Source.WINDOW)
        return confidence >= lower_bound(confidence, answered(trees), self.keep)[:, None]


def lower_bound(values: Floats, among: Bools, keep: float) -> Floats:
    """[P] the (1 - keep) quantile of `values` [P, S] over the slots of `among`; -inf where there are none."""
    ordered = np.sort(np.where(among, values, np.inf), -1)
    count = among.sum(-1)
    position = np.maximum(count - 1, 0) * (1 - keep)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(count - 1, 0))
    low, high = (np.take_along_axis(ordered, i[:, None], 1)[:, 0] for i in (below, above))
    with np.errstate(invalid="ignore"):  # inf - inf where there are none
        bound = low + (high - low) * (position - below)
    return np.where(count > 0, bound, -np.inf)


# Rules that decide how many samples to take.


@dataclass(frozen=True)
class AdaptiveConsistency(Selecting):
    """`batch` samples at a time, until the leading answer is more common than the runner-up with some certainty.

    Aggarwal et al. 2023: with v1 and v2 votes, the share of the leader among the two is Beta(v1 + 1, v2 + 1); stop as soon
    as the probability that it is above one half reaches `threshold`.
    """

    threshold: float = 0.95
    k_max: int = 24
    batch: int = 1

    @property
    def name(self) -> str:
        return f"adaptive-consistency@{self.k_max}/{self.threshold:g}/b{self.batch}{self.suffix}"

    def decide(self, trees: Trees, interval: int) -> Decision:
        idle, used = ~trees.running.any(-1), started(trees)
        goal = np.full(len(trees), self.batch)
        rows = np.flatnonzero(idle & (used >= self.batch))
        unsure = leader_certainty(trees.take(rows)) < self.threshold
        goal[rows] = used[rows] + np.where(unsure, self.batch, 0)
        return decision(trees, trees.running, np.minimum(goal, self.k_max) - used)


def leader_certainty(trees: Trees) -> Floats:
    """[P] probability that the leading answer is more common than the runner-up."""
    count = same_answer(trees).sum(-1)
    leader = np.take_along_axis(trees.answer, count.argmax(-1)[:, None], 1)
    rival = np.where(trees.answer != leader, count, 0)
    return betainc(rival.max(-1) + 1.0, count.max(-1) + 1.0, 0.5)


class Sequential(Baseline):
    """One sample after the other until one is `good`; dataclasses below add `k_max`."""

    k_max: int

    @abstractmethod
    def good(self, trees: Trees) -> Bools:
        """[P, S]"""

    def decide(self, trees: Trees, interval: int) -> Decision:
        more = ~trees.running.any(-1) & ~(answered(trees) & self.good(trees)).any(-1)
        return decision(trees, trees.running, more & (started(trees) < self.k_max))


@dataclass(frozen=True)
class SequentialStop(Sequential):
    """Until one scores at least `threshold`; the answer is the best of all so far, or a vote weighted by the score."""

    by: Source = Source.LOGISTIC
    threshold: float = 0.5
    k_max: int = 24
    vote: bool = False

    @property
    def name(self) -> str:
        return f"sequential-{self.by}@{self.k_max}/{self.threshold:g}{'/vote' if self.vote else ''}"

    @property
    def chooser(self) -> Selector:
        return Vote(self.by) if self.vote else Best(self.by)

    def good(self, trees: Trees) -> Bools:
        return self.score(trees, self.by) >= self.threshold


@dataclass(frozen=True)
class StyleStop(Sequential):
    """Until one of the given style; majority of those of this style, else of all."""

    style: int = 0
    k_max: int = 24
    looks_at: ClassVar[tuple[Source, ...]] = (Source.STYLE,)

    @property
    def name(self) -> str:
        return f"style-stop@{self.k_max}/{self.style}"

    @property
    def chooser(self) -> Vote:
        return MAJORITY

    def good(self, trees: Trees) -> Bools:
        return self.score(trees, Source.STYLE) == self.style

    liked = good


# Rules that drop samples on the way.


@dataclass(frozen=True)
class DeepConfOnline(Baseline):
    """`warmup` samples set the bar, the others are dropped for good as soon as their worst window falls below it.

    The bar is the (1 - keep) quantile of the warm-up's confidences. After it `batch` samples run at a time, each replaced
    when it ends, until `k` have been started or the leading answer holds `consensus` (above 1: never) of the confidence of
    all finished ones, as in Algorithm 2 of the paper. At the end only those above the bar vote, warm-up included, as in the
    released code.
    """

    k: int = 16
    warmup: int = 4
    keep: float = 0.5
    consensus: float = 0.95
    batch: int = 1
    sharpness: float = 1.0

    @property
    def name(self) -> str:
        rest = f"w{self.warmup}/c{self.consensus:g}/b{self.batch}{power_label(self.sharpness)}"
        return f"deepconf-online@{self.k}/{self.keep:g}/{rest}"

    @property
    def chooser(self) -> Vote:
        return Vote(Source.WINDOW, self.sharpness)

    def decide(self, trees: Trees, interval: int) -> Decision:
        first = self._first(trees)
        warm = (trees.used | ~first).all(-1) & ~(trees.running & first).any(-1)
        run = trees.running & (first | self.liked(trees))
        spare = self.batch - run.sum(-1)
        rows = np.flatnonzero(warm & (spare > 0))  # elsewhere nothing has ended since the last look
        done = rows[self._agreed(trees.take(rows))]
        run[done] = False
        start = np.where(warm, spare, self.warmup - started(trees))
        start[done] = 0
        start = np.minimum(start, self.k - started(trees))
        return decision(trees, run, start)

    def _first(self, trees: Trees) -> Bools:
        """[1, S] the slots of the warm-up."""
        return np.arange(trees.slots)[None] < self.warmup

    def _agreed(self, trees: Trees) -> Bools:
        """[P]"""
        voters = candidates(trees, trees.finished)
        return self.chooser.choose(trees, self.score(trees, Source.WINDOW), voters).probability >= self.consensus

    def liked(self, trees: Trees) -> Bools:
        confidence = self.score(trees, Source.WINDOW)
        return confidence >= lower_bound(confidence, trees.finished & self._first(trees), self.keep)[:, None]


@dataclass(frozen=True)
class Pruning(Baseline):
    """k samples in parallel, some of which are dropped; never the last one while nothing is finished."""

    k: int = 8

    @abstractmethod
    def keep(self, trees: Trees) -> Bools:
        """[P, S]"""

    def preference(self, trees: Trees) -> Floats | None:
        """[P, S] who stays when all would be dropped; None: the first."""
        return None

    def decide(self, trees: Trees, interval: int) -> Decision:
        """A branch of one token is kept: nothing has been read of it yet but the prompt."""
        run = trees.running & (self.keep(trees) | (trees.generated <= 1))
        return keep_one(decision(trees, run, self.k - started(trees)), trees, self.preference(trees))

    @property
    def chooser(self) -> Selector:
        return MAJORITY


@dataclass(frozen=True)
class ValuePruning(Pruning):
    """Drops branches whose expected reward is below `threshold`; vote weighted by it."""

    threshold: float = 0.25

    @property
    def name(self) -> str:
        return f"value-pruning@{self.k}/{self.threshold:g}"

    @property
    def chooser(self) -> Selector:
        return Vote(Source.VALUE)

    def keep(self, trees: Trees) -> Bools:
        return self.preference(trees) >= self.threshold

    def preference(self, trees: Trees) -> Floats:
        return self.score(trees, Source.VALUE)


@dataclass(frozen=True)
class LengthPruning(Pruning):
    """Drops branches that are not finished after `cap` tokens."""

    cap: int = 1 << 30

    @property
    def name(self) -> str:
        return f"length-pruning@{self.k}/{self.cap}"

    def keep(self, trees: Trees) -> Bools:
        return trees.length < self.cap


@dataclass(frozen=True)
class RandomPruning(Pruning):
    """Drops each branch with probability `rate` at every decision: the control for all other pruning.

    Chance is a hash of (seed, prompt, slot, length), so a run can be repeated exactly whatever else is in the batch; the
    prompt is known by the entropy of its own reading.
    """

    rate: float = 0.05
    seed: int = 0
    looks_at: ClassVar[tuple[Source, ...]] = (Source.ENTROPY,)

    @property
    def name(self) -> str:
        return f"random-pruning@{self.k}/{self.rate:g}/s{self.seed}"

    def keep(self, trees: Trees) -> Bools:
        entropy = trees.root[:, self.sources.index(Source.ENTROPY)]
        prompt = np.ascontiguousarray(entropy, np.float32).view(np.uint32)
        parts = (prompt[:, None], np.arange(trees.slots)[None], trees.length)
        return hashed_uniform(self.seed, parts) >= self.rate


def hashed_uniform(seed: int, parts: Iterable[NDArray]) -> Floats:
    """Numbers in [0, 1) from integers, mixed one after the other as in SplitMix64 (Steele et al. 2014)."""
    state = np.full((1, 1), seed, np.uint64)
    for part in parts:
        state = _mix(state ^ part.astype(np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class FixedStyle(Baseline):
    """k samples of one style: others are dropped as soon as their style shows, and replaced while there are slots."""

    k: int = 4
    style: int = 0
    looks_at: ClassVar[tuple[Source, ...]] = (Source.STYLE,)

    @property
    def name(self) -> str:
        return f"fixed-style@{self.k}/{self.style}"

    @property
    def chooser(self) -> Vote:
        return MAJORITY

    def decide(self, trees: Trees, interval: int) -> Decision:
        open_ = self.liked(trees) | (self.score(trees, Source.STYLE) == UNKNOWN_STYLE)
        run = trees.running & open_
        kept = run | (trees.finished & self.liked(trees))
        return keep_one(decision(trees, run, self.k - kept.sum(-1)), trees)

    def liked(self, trees: Trees) -> Bools:
        return self.score(trees, Source.STYLE) == self.style


# What no policy reaches, and the settings to sweep over.


def oracle(pool: Pool, orders: Ints, k: int) -> Floats:
    """[E] the best score among the first k rollouts of each order; episodes as in `replay`."""
    return np.take_along_axis(pool.score[None], orders[..., :k], -1).max(-1).ravel().astype(np.float64)


COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
MOST = COUNTS[-1]
SHARPNESS = {
    Source.MEAN: (20.0,),
    Source.LOW: (0.5,),
    Source.LOGISTIC: (1.0, 4.0),
    Source.VALUE: (1.5,),
}  # toy validation
CAP_QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95)
THRESHOLDS = {
    Source.LOGISTIC: (0.4, 0.6, 0.7, 0.8, 0.9, 0.95),
    Source.VALUE: (0.25, 0.4, 0.55, 0.7),
    Source.MEAN: (0.9, 0.93, 0.95, 0.965, 0.98),
}
NEVER = float("inf")
Families = dict[str, list[Baseline]]


def families(grid: BinGrid, logistic: Logistic, styles: int, lengths: ArrayLike | None = None) -> Families:
    """Settings of every family, for validation prompts to choose from at each token budget.

    `styles` is the number of style codes (0: none), `lengths` those of validation rollouts, whose quantiles are the caps.
    """
    reader = Reader(grid, logistic)
    found: Families = {"majority": [Fixed(reader, MAJORITY, k) for k in range(1, MOST + 1)]}
    return (
        found
        | _scored(reader)
        | _stopping(reader)
        | _deepconf(reader)
        | _pruning(reader, lengths)
        | _styles(reader, styles)
    )


def _scored(reader: Reader) -> Families:
    """Weighted votes and best of k. Up to two samples the sharpness makes no difference."""
    found: Families = {}
    for source in SCORES:
        first, *others = SHARPNESS[source]
        settings = [(first, k) for k in COUNTS] + [(power, k) for power in others for k in COUNTS if k > 2]
        found[f"vote-{source}"] = [Fixed(reader, Vote(source, power), k) for power, k in settings]
        found[f"best-{source}"] = [Fixed(reader, Best(source), k) for k in COUNTS]
    return found


def _stopping(reader: Reader) -> Families:
    """Settings that cannot differ are left out: 0.7 stops after one vote; 0.95 and 0.99 need four and six equal ones."""
    settings = [(0.7, MOST, 1)]
    settings += [(t, k, 1) for t in (0.8, 0.9, 0.95, 0.99) for k in (4, 8, 16, MOST) if t < 0.95 or k > 4]
    settings += [(t, k, 2) for t in (0.7, 0.95, 0.99) for k in (8, 16, MOST)]
    found: Families = {"adaptive-consistency": [AdaptiveConsistency(reader, MAJORITY, *s) for s in settings]}
    for source, thresholds in THRESHOLDS.items():
        found[f"sequential-{source}"] = [SequentialStop(reader, source, t, MOST) for t in thresholds]
    for source in (Source.LOGISTIC, Source.MEAN):
        found[f"sequential-{source}"] += [
            SequentialStop(reader, source, t, k) for t in THRESHOLDS[source][1::2] for k in (2, 3, 4)
        ]
    found["sequential-logistic"] += [
        *(SequentialStop(reader, Source.LOGISTIC, t, 6) for t in (0.6, 0.8, 0.95)),
        *(SequentialStop(reader, Source.LOGISTIC, t, MOST, vote=True) for t in (0.7, 0.8, 0.9, 0.95)),
    ]
    return found


def _deepconf(reader: Reader) -> Families:
    """Keeping 0.1 and 0.9 are the published "low" and "high"."""
    offline = [DeepConfOffline(reader, k, keep) for k in (4, 8, 16, MOST) for keep in (0.5, 0.9)]
    sizes = ((6, 2), (8, 4), (16, 4), (MOST, 4))
    online = [DeepConfOnline(reader, k, w, keep, 0.9) for k, w in sizes for keep in (0.1, 0.5, 0.9)]
    online += [DeepConfOnline(reader, k, 1, 0.5, NEVER) for k in (2, 3, 4)]  # one sample has one quantile, and agrees
    return {"deepconf-offline": offline, "deepconf-online": online}


def _pruning(reader: Reader, lengths: ArrayLike | None) -> Families:
    found: Families = {
        "value-pruning": [ValuePruning(reader, k, t) for k in (4, 8, 16) for t in (0.05, 0.1, 0.25)],
        "random-pruning": [RandomPruning(reader, 8, rate) for rate in (0.02, 0.1)],
    }
    if lengths is not None:
        caps = np.unique(np.ceil(np.quantile(lengths, CAP_QUANTILES)).astype(int))
        found["length-pruning"] = [LengthPruning(reader, 8, int(cap)) for cap in caps]
    return found


def _styles(reader: Reader, styles: int) -> Families:
    if not styles:
        return {}
    return {
        "fixed-style": [FixedStyle(reader, k, s) for s in range(styles) for k in (1, 4)],
        "style-stop": [StyleStop(reader, s) for s in range(styles)],
    }

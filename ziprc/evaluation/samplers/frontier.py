"""Accuracy against tokens: families of policies compared at exactly equal cost.

Validation prompts choose: of each family the settings on the upper hull of (tokens, accuracy) are kept, nothing else is
played on the test prompts. There, a family with a budget of B tokens per prompt plays a random mixture of the two kept
settings whose costs enclose B, with weights (from costs alone) that make its mean cost exactly B; a family that has nothing
to spend more on stays below. What is compared is the accuracy of each prompt under the mixture, so every comparison is
paired over prompts. Shapes: N prompts, E episodes (N times the orders of the pool).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.evaluation.bootstrap import Resampling
from ziprc.sampling.controller import Budget, Controller
from ziprc.sampling.families import Setting
from ziprc.sampling.replay import Pool, replay

Floats = NDArray[np.float64]
SMALL_READING = 8  # signals; wider readings of a pool are kept one at a time


@dataclass(frozen=True)
class Outcome:
    """One setting on N prompts, means over the episodes of each prompt."""

    name: str
    accuracy: Floats  # [N]
    tokens: Floats  # [N] generated
    latency: Floats  # [N] serial decoding steps
    samples: Floats  # [N] branches started
    prompt: NDArray[np.int64]  # [E]
    probability: Floats  # [E] of the answer given
    score: Floats  # [E]


@dataclass
class Player:
    """Plays settings on one pool; readings of the pool are shared between policies that read alike."""

    pool: Pool
    orders: NDArray[np.int64]
    branches: int
    _readings: dict[Any, NDArray[np.float32]] = field(default_factory=dict)

    def play(self, setting: Setting) -> Outcome:
        """The setting on every prompt, in every order."""
        policy = setting.policy
        own = getattr(policy, "sources", None) or (type(policy).__name__, getattr(policy, "calibration", None))
        key = (setting.window, own)
        if key not in self._readings:
            self._readings = {k: r for k, r in self._readings.items() if r.shape[1] <= SMALL_READING}
            self._readings[key] = policy.read(self.pool.smoothed(setting.window), self.pool.features)
        controller = Controller(policy, Budget(branches=self.branches, interval=setting.interval))
        played = replay(controller, self.pool, self._readings[key], self.orders)
        count = np.bincount(played.prompt)
        columns = (played.score, played.tokens, played.latency, played.samples)
        means = [np.bincount(played.prompt, x) / count for x in columns]
        return Outcome(setting.name, *means, played.prompt, played.probability, played.score)


def hull(tokens: Floats, accuracy: Floats) -> list[int]:
    """Indices of the points on the upper left hull, by rising tokens: no mixture of others is better and cheaper."""
    x, y, kept = tokens, accuracy, []
    for i in np.lexsort((-accuracy, tokens)).tolist():
        if kept and y[i] <= y[kept[-1]]:
            continue
        while len(kept) > 1:
            a, b = kept[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) > (y[i] - y[a]) * (x[b] - x[a]):
                break  # b lies above the line from a to i
            kept.pop()
        kept.append(i)
    return kept


@dataclass(frozen=True)
class Mixture:
    """Two settings and the share of the second."""

    low: Outcome
    high: Outcome
    share: float

    def column(self, name: str) -> Floats:
        """[N] expectation of a per-prompt quantity."""
        return (1 - self.share) * getattr(self.low, name) + self.share * getattr(self.high, name)

    @property
    def likelier(self) -> Outcome:
        """The setting that is played more often."""
        return self.high if self.share > 0.5 else self.low


@dataclass(frozen=True)
class Family:
    """The kept settings of one family on the test prompts; `tried` is how many there were to choose from."""

    name: str
    settings: Sequence[Setting]
    outcomes: Sequence[Outcome]
    tried: int

    def at(self, budget: float) -> Mixture | None:
        """The mixture that costs `budget` tokens per prompt; None when even the cheapest setting costs more."""
        kept = sorted(self.outcomes, key=lambda o: o.tokens.mean())
        cost = [float(o.tokens.mean()) for o in kept]
        above = bisect.bisect_right(cost, budget * (1 + 1e-9))
        if above == 0:
            return None
        if above == len(kept):
            return Mixture(kept[-1], kept[-1], 0.0)
        low = above - 1
        return Mixture(kept[low], kept[above], (budget - cost[low]) / (cost[above] - cost[low]))


def choose_and_play(name: str, settings: Sequence[Setting], validation: Player, test: Player) -> Family:
    """Settings that validation keeps, played on the test prompts."""
    tried = [validation.play(setting) for setting in settings]
    tokens, accuracy = (np.array([getattr(o, c).mean() for o in tried]) for c in ("tokens", "accuracy"))
    kept = [settings[i] for i in hull(tokens, accuracy)]
    return Family(name, kept, [test.play(s) for s in kept], len(settings))


@dataclass(frozen=True)
class Comparison:
    """How families are compared: draws of the prompts, tokens per prompt by name of the budget, and the paper's cost.

    The cost counts tokens (weight `alpha`) and serial steps (the rest) in units of one `plain` [N] sample of the same prompt.
    """

    boot: Resampling
    budgets: Mapping[str, float]
    plain: Floats
    alpha: float
    confidence: float

    def record(self, family: Family) -> dict[str, Any]:
        """The points of one family at every budget it can keep to, and its kept settings as (tokens, accuracy)."""
        points = {}
        for key, tokens in self.budgets.items():
            if mixture := family.at(tokens):
                cost = self.alpha * mixture.column("tokens") + (1 - self.alpha) * mixture.column("latency")
                points[key] = {
                    "accuracy": self.boot.ratio(mixture.column("accuracy")).interval(self.confidence),
                    **{name: float(mixture.column(name).mean()) for name in ("tokens", "latency", "samples")},
                    "cost": float((cost / self.plain).mean()),
                    "setting": mixture.likelier.name,
                }
        kept = [[o.name, float(o.tokens.mean()), float(o.accuracy.mean())] for o in family.outcomes]
        return {"points": points, "kept": kept, "tried": family.tried}

    def difference(self, ours: Family, others: Sequence[Family]) -> dict[str, dict[str, Any]]:
        """Accuracy of ours minus each other family, paired over prompts, by budget that both can keep to."""
        out: dict[str, dict[str, Any]] = {}
        for key, tokens in self.budgets.items():
            mine, rivals = ours.at(tokens), {f.name: f.at(tokens) for f in others}
            gaps = {name: mine.column("accuracy") - r.column("accuracy") for name, r in rivals.items() if mine and r}
            out[key] = {name: self.boot.ratio(gap).interval(self.confidence) for name, gap in gaps.items()}
        return out

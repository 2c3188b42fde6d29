"""Accuracy against tokens: families of policies compared at exactly equal cost.

Validation prompts choose: of each family the settings on the upper hull of (tokens, accuracy) are kept, nothing else is
played on the test prompts. There, a family with a budget of B tokens per prompt plays a random mixture of the two kept
settings whose costs enclose B, with weights (from costs alone) that make its mean cost exactly B; a family that has nothing
to spend more on stays below. What is compared is the accuracy of each prompt under the mixture, so every comparison is
paired over prompts. Shapes: N prompts, E episodes (N times the orders of the pool).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.evaluation.bootstrap import Estimate, Resampling
from ziprc.sampling.controller import Budget, Controller
from ziprc.sampling.families import Setting
from ziprc.sampling.replay import Played, Pool, replay

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

    @classmethod
    def of(cls, name: str, played: Played) -> Outcome:
        prompts = int(played.prompt.max()) + 1
        count = np.bincount(played.prompt, minlength=prompts)
        columns = (played.score, played.tokens, played.latency, played.samples)
        means = [np.bincount(played.prompt, x, prompts) / count for x in columns]
        return cls(name, *means, played.prompt, played.probability, played.score)


@dataclass
class Player:
    """Plays settings on one pool; readings of the pool are shared between policies that read alike."""

    pool: Pool
    orders: NDArray[np.int64]
    branches: int
    _readings: dict[Any, NDArray[np.float32]] = field(default_factory=dict)

    def play(self, setting: Setting) -> Outcome:
        controller = Controller(setting.policy, Budget(branches=self.branches, interval=setting.interval))
        return Outcome.of(setting.name, replay(controller, self.pool, self._reading(setting), self.orders))

    def _reading(self, setting: Setting) -> NDArray[np.float32]:
        policy = setting.policy
        own = getattr(policy, "sources", None) or (type(policy).__name__, getattr(policy, "calibration", None))
        key = (setting.window, own)
        if key not in self._readings:
            self._readings = {k: r for k, r in self._readings.items() if r.shape[1] <= SMALL_READING}
            self._readings[key] = policy.read(self.pool.smoothed(setting.window), self.pool.features)
        return self._readings[key]


def hull(tokens: Floats, accuracy: Floats) -> list[int]:
    """Indices of the points on the upper left hull, by rising tokens: no mixture of others is better and cheaper."""
    kept: list[int] = []
    for i in np.lexsort((-accuracy, tokens)).tolist():
        if kept and accuracy[i] <= accuracy[kept[-1]]:
            continue
        while len(kept) > 1 and _below(tokens, accuracy, kept[-2], kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _below(x: Floats, y: Floats, a: int, b: int, c: int) -> bool:
    """Whether point b lies on or below the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) <= (y[c] - y[a]) * (x[b] - x[a]))


def kept_settings(outcomes: Sequence[Outcome]) -> list[int]:
    """The settings on the hull of their mean tokens and accuracy."""
    tokens, accuracy = (np.array([getattr(o, c).mean() for o in outcomes]) for c in ("tokens", "accuracy"))
    return hull(tokens, accuracy)


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
        order = np.argsort([o.tokens.mean() for o in self.outcomes], kind="stable")
        kept = [self.outcomes[i] for i in order]
        cost = np.array([o.tokens.mean() for o in kept])
        below = np.flatnonzero(cost <= budget * (1 + 1e-9))
        if not len(below):
            return None
        low = int(below[-1])
        if low == len(kept) - 1:
            return Mixture(kept[low], kept[low], 0.0)
        return Mixture(kept[low], kept[low + 1], float((budget - cost[low]) / (cost[low + 1] - cost[low])))


def choose_and_play(name: str, settings: Sequence[Setting], validation: Player, test: Player) -> Family:
    """Settings that validation keeps, played on the test prompts."""
    kept = [settings[i] for i in kept_settings([validation.play(s) for s in settings])]
    return Family(name, kept, [test.play(s) for s in kept], len(settings))


def compare(boot: Resampling, ours: Mixture, other: Mixture) -> Estimate:
    """Accuracy of ours minus the other's, paired over prompts."""
    return boot.ratio(ours.column("accuracy") - other.column("accuracy"))


@dataclass(frozen=True)
class Costs:
    """Cost of one plain sample of each prompt, [N] each, for the normalised cost of the paper."""

    tokens: Floats
    alpha: float

    def normalised(self, mixture: Mixture) -> Floats:
        """[N] α · tokens + (1 - α) · serial steps, both in units of one sample of the same prompt."""
        return (self.alpha * mixture.column("tokens") + (1 - self.alpha) * mixture.column("latency")) / self.tokens


def point_record(boot: Resampling, mixture: Mixture, costs: Costs, confidence: float) -> dict[str, Any]:
    """What a family shows at one budget."""
    return {
        "accuracy": boot.ratio(mixture.column("accuracy")).interval(confidence),
        **{name: float(mixture.column(name).mean()) for name in ("tokens", "latency", "samples")},
        "cost": float(costs.normalised(mixture).mean()),
        "setting": mixture.likelier.name,
    }


def family_record(
    boot: Resampling, family: Family, budgets: Mapping[str, float], costs: Costs, confidence: float
) -> dict[str, Any]:
    """The points of one family at every budget it can keep to, and its kept settings as (tokens, accuracy)."""
    points = {key: family.at(tokens) for key, tokens in budgets.items()}
    return {
        "points": {k: point_record(boot, m, costs, confidence) for k, m in points.items() if m},
        "kept": [[o.name, float(o.tokens.mean()), float(o.accuracy.mean())] for o in family.outcomes],
        "tried": family.tried,
    }


def difference_records(
    boot: Resampling, ours: Family, others: Sequence[Family], budgets: Mapping[str, float], confidence: float
) -> dict[str, dict[str, Any]]:
    """Accuracy of ours minus each other family, by budget."""
    out: dict[str, dict[str, Any]] = {}
    for key, tokens in budgets.items():
        mine = ours.at(tokens)
        rivals = {f.name: f.at(tokens) for f in others}
        out[key] = {n: compare(boot, mine, r).interval(confidence) for n, r in rivals.items() if mine and r}
    return out

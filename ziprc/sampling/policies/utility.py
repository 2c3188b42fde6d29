"""The sampling utility: what a set of unfinished samples is worth, and which set is worth most.

ZIP-RC (arXiv 2512.01457, §4) plans with the joint distribution that each sample predicts for itself. Advancing a set A of
samples for at most t_h tokens buys E[max reward] and costs tokens (their sum) and time (their maximum):

    U(A) = max_h E[max_A Z] − β/N̄ · ( α · Σ_A E[len] + (1 − α) · E[max_A len] )

A horizon h folds all mass at length bins ≥ h into one outcome: no reward, because abandoned, at the price of having waited
until bin h. Samples are taken as independent, so every expected maximum is a sum over products of CDFs:
E[max] = x_0 + Σ_k (x_{k+1} − x_k) · (1 − Π_A F(x_k)). All sets, horizons and prompts are evaluated at once.

Deliberate differences from the published simulator: the fold is priced at the edge t_h, which is when one stops, and not at
the midpoint of bin h (`Fold.MIDPOINT` for parity); finished samples are not folded and keep their exact value; small
problems are searched exhaustively (search.py); horizons may differ between samples; a cap on active samples drops by
utility.

Identical copies (r forks of one prefix, new samples from the root) are one slot with a count: their CDF is F^r.

Shapes: P prompts, S slots (samples, or forkable prefixes) per prompt, R reward centres, L length bins, M sets,
H horizons: all of 1..L, where L means "none, run to completion", or that one alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid

TIE = 1e-12  # utilities closer than this are equal, as in the published simulator
SWEEPS = 2  # over the samples, when each has its own horizon
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Fold(StrEnum):
    """What an outcome beyond horizon h is charged."""

    EDGE = "edge"  # t_h
    MIDPOINT = "midpoint"  # of bin h


class Horizons(StrEnum):
    """How far ahead a set may be planned."""

    NONE = "none"  # everything runs to completion
    SHARED = "shared"  # one horizon for the set
    PER_SAMPLE = "per_sample"  # one for each member


@dataclass(frozen=True)
class Prices:
    """Reward that a token costs: `compute` [P] for each token, `latency` [P] for each step of the longest sample."""

    compute: Floats
    latency: Floats

    @classmethod
    def of(cls, alpha: float, beta: float, normaliser: ArrayLike) -> Prices:
        """α = 1 is pure compute, α = 0 pure latency; β trades cost against reward; `normaliser` is N̄ [P]."""
        if not (0 <= alpha <= 1 and 0 <= beta < np.inf):
            raise UserError(f"expected alpha in [0, 1] and a finite beta ≥ 0, found alpha {alpha}, beta {beta}.")
        per_token = beta / np.asarray(normaliser, dtype=np.float64)
        return cls(alpha * per_token, (1 - alpha) * per_token)

    def take(self, rows: NDArray) -> Prices:
        return Prices(self.compute[rows], self.latency[rows])


@dataclass(frozen=True)
class Tables:
    """What every utility of these samples is computed from. Slots that are finished or absent are no candidates."""

    candidate: Bools  # [P, S]
    reward_cdf: Floats  # [P, S, H, R − 1] Pr(reward ≤ centre k) under a horizon; one at the last centre
    length_cdf: Floats  # [P, S, L − 1] Pr(length ≤ midpoint k); below the fold it is the same for all horizons
    expected_length: Floats  # [P, S, H]
    finished_best: Floats  # [P] best value among finished samples, 0 without any
    reward_floor: Floats  # [P] least reward once something runs
    reward_steps: Floats  # [P, R − 1] between the centres, those below the best finished value moved up to it
    horizons: Ints  # [H]
    shortest: float  # m_0
    price_steps: Floats  # [2L − 2] between m_0, price_1, m_1, price_2, … m_{L−1}
    length_steps: Floats  # [H, L − 1] the same, gathered for a shared horizon

    def take(self, rows: NDArray, slots: NDArray | slice = slice(None)) -> Tables:
        """Some prompts [p] and, of each, some slots ([s], or [p, s] when they differ)."""
        at = rows[:, None] if isinstance(slots, np.ndarray) else rows
        return replace(
            self,
            candidate=self.candidate[at, slots],
            reward_cdf=self.reward_cdf[at, slots],
            length_cdf=self.length_cdf[at, slots],
            expected_length=self.expected_length[at, slots],
            finished_best=self.finished_best[rows],
            reward_floor=self.reward_floor[rows],
            reward_steps=self.reward_steps[rows],
        )

    def to_completion(self) -> Tables:
        """The same without any horizon but "none"."""
        return replace(
            self,
            reward_cdf=self.reward_cdf[:, :, -1:],
            expected_length=self.expected_length[:, :, -1:],
            horizons=self.horizons[-1:],
            length_steps=self.length_steps[-1:],
        )


@dataclass(frozen=True)
class Choice:
    """Sets with their utilities. `...` is empty for a chosen set, M for several sets that were asked about."""

    members: Ints  # [P, ..., S] counts
    utility: Floats  # [P, ...]
    horizon: Ints  # [P, ...] longest of a member; L: to completion (also of the empty set)
    horizons: Ints  # [P, ..., S] of each member; 0 where not a member


def tables(
    joint: ArrayLike,
    grid: BinGrid,
    *,
    finished: ArrayLike | None = None,
    finished_value: ArrayLike | None = None,
    fold: Fold | str = Fold.EDGE,
    independent: bool = False,
) -> Tables:
    """From joints [P, S, R, L]; `finished` [P, S] slots count by their `finished_value` [P, S] alone.

    A joint of zeros marks an empty slot. `independent` replaces each joint by the product of its marginals (ablation).
    """
    q = np.asarray(joint, dtype=np.float64)
    if q.ndim != 4 or q.shape[2:] != (grid.R, grid.L):
        raise UserError(f"expected joints of shape [P, S, {grid.R}, {grid.L}], found {list(q.shape)}.")
    done = np.zeros(q.shape[:2], dtype=bool) if finished is None else np.asarray(finished, dtype=bool)
    values = np.zeros(q.shape[:2]) if finished_value is None else np.asarray(finished_value, dtype=np.float64)
    q, candidate = _normalised(np.where(done[..., None, None], 0.0, q))
    if independent:
        q = q.sum(-1, keepdims=True) * q.sum(-2, keepdims=True)

    price_steps, length_steps = _price_steps(grid, Fold(fold))
    best = np.where(done, values, 0.0).max(-1, initial=0.0)
    centres = np.maximum(np.asarray(grid.reward_centres), best[:, None])
    length_cdf = np.clip(np.cumsum(q.sum(-2), -1)[..., :-1], 0.0, 1.0)
    return Tables(
        candidate=candidate,
        reward_cdf=_reward_cdf(q),
        length_cdf=length_cdf,
        expected_length=grid.length_midpoints[0] + (1 - length_cdf) @ length_steps.T,
        finished_best=best,
        reward_floor=centres[:, 0],
        reward_steps=np.diff(centres, axis=-1),
        horizons=np.arange(1, grid.L + 1),
        shortest=float(grid.length_midpoints[0]),
        price_steps=price_steps,
        length_steps=length_steps,
    )


def _normalised(q: Floats) -> tuple[Floats, Bools]:
    """Joints that sum to one exactly (float16 ones do not), and which slots hold one at all."""
    total = q.sum((-2, -1))
    if not np.all(np.isfinite(total)) or q.min(initial=0.0) < 0:
        raise UserError("a joint distribution must not hold NaN or negative numbers.")
    return q / np.where(total > 0, total, 1.0)[..., None, None], total > 0


def _reward_cdf(q: Floats) -> Floats:
    """[P, S, H, R − 1]: one minus the mass above a centre that ends before the horizon; the fold lies at the lowest."""
    before = np.cumsum(q, -1)  # entry h − 1: Σ_{l < h}
    above = np.cumsum(before[:, :, :0:-1], axis=2)[:, :, ::-1]
    return np.ascontiguousarray(np.clip(1 - above, 0.0, 1.0).swapaxes(-1, -2))


def _price_steps(grid: BinGrid, fold: Fold) -> tuple[Floats, Floats]:
    """Steps between all prices that can occur, in order, and their weights under each shared horizon."""
    middle = grid.length_midpoints
    folded = np.asarray(grid.length_edges, dtype=np.float64)[1:-1] if fold is Fold.EDGE else middle[1:]
    prices = np.empty(2 * grid.L - 1)
    prices[0::2], prices[1::2] = middle, folded
    steps = np.diff(prices)
    horizon = np.arange(1, grid.L + 1)[:, None]
    reached = np.arange(len(steps)) < 2 * horizon - 1
    return steps, (steps * reached).reshape(grid.L, grid.L - 1, 2).sum(-1)


def normaliser(tokens_so_far: ArrayLike, expected_remaining: ArrayLike, known: ArrayLike) -> Floats:
    """N̄ [P]: mean total length of the `known` samples of a group, all [P, S]; a finished one has nothing remaining."""
    mask = np.asarray(known, dtype=bool)
    if not mask.any(-1).all():
        raise UserError("a prompt without any sample has no mean length; give the root's expected length as one.")
    total = np.where(mask, np.asarray(tokens_so_far) + np.asarray(expected_remaining, dtype=np.float64), 0.0)
    return np.maximum(total.sum(-1) / mask.sum(-1), 1.0)  # at least a token, so that prices stay finite


def utility(tables: Tables, members: ArrayLike, prices: Prices, horizons: Horizons | str = Horizons.SHARED) -> Choice:
    """Utilities of the sets `members` [P, ..., S] (counts), each at its best horizon; ties go to the longest."""
    counts = np.asarray(members, dtype=np.int64)
    if np.any((counts > 0) & ~_spread(tables.candidate, counts.ndim, last=1)):
        raise UserError("a set contains a slot that is finished or empty.")
    mode = Horizons(horizons)
    rule = tables.to_completion() if mode is Horizons.NONE else tables
    sets = counts.reshape(len(counts), int(np.prod(counts.shape[1:-1])), counts.shape[-1])  # [P, M, S]
    value, horizon = _best_horizon(rule, _shared_utility(rule, sets, prices))
    each = np.where(sets > 0, horizon[..., None], 0)
    if mode is Horizons.PER_SAMPLE:
        rows = np.repeat(np.arange(len(sets)), sets.shape[1])
        plan = _Plan(tables.take(rows), prices.take(rows), sets.reshape(len(rows), -1), each.reshape(len(rows), -1))
        value, _, each = plan.improved(value.reshape(-1))
    lead = counts.shape[:-1]
    return _choice(tables, counts, value.reshape(lead), each.reshape(counts.shape))


def _choice(tables: Tables, members: Ints, value: Floats, each: Ints) -> Choice:
    longest = each.max(-1, initial=0)
    return Choice(members, value, np.where(longest > 0, longest, tables.horizons[-1]), each)


def _spread(x: NDArray, ndim: int, last: int = 0) -> NDArray:
    """[P, …] with axes of size one put after P, so that it has `ndim`; the `last` trailing axes stay at the end."""
    return x.reshape(x.shape[0], *(1,) * (ndim - 1 - last), *x.shape[x.ndim - last :])


def _shared_utility(tables: Tables, sets: Ints, prices: Prices) -> Floats:
    """[P, M, H] from counts [P, M, S]; one product over the slots, in place."""
    reward: Floats = np.ones((*sets.shape[:2], *tables.reward_cdf.shape[2:]))
    length: Floats = np.ones((*sets.shape[:2], tables.length_cdf.shape[-1]))
    for slot in range(sets.shape[-1]):
        count = sets[:, :, slot, None]
        length *= _power(tables.length_cdf[:, None, slot], count)
        reward *= _power(tables.reward_cdf[:, None, slot], count[..., None])
    return _score(tables, prices, reward, length, sets @ tables.expected_length, sets.any(-1))


def _power(cdf: Floats, count: Ints) -> Floats:
    """CDF of the maximum of `count` copies; one for none of them."""
    return np.where(count > 0, cdf, 1.0) if count.max(initial=0) <= 1 else cdf**count


def _score(tables: Tables, prices: Prices, reward: Floats, length: Floats, total: Floats, some: Bools) -> Floats:
    """[P, M, H] from CDFs of the maxima [P, M, H, R − 1] and [P, M, L − 1], Σ E[len] [P, M, H] and "not empty" [P, M]."""
    above = (1 - reward).reshape(len(reward), total.shape[1] * total.shape[2], reward.shape[-1]) @ tables.reward_steps[
        ..., None
    ]
    value = (
        above.reshape(total.shape)
        + np.where(some, tables.reward_floor[:, None], tables.finished_best[:, None])[..., None]
    )
    longest = (1 - length) @ tables.length_steps.T + tables.shortest * some[..., None]
    return value - prices.compute[:, None, None] * total - prices.latency[:, None, None] * longest


def _best_horizon(tables: Tables, value: Floats) -> tuple[Floats, Ints]:
    """Best utility over the last axis and its horizon, the longest of equal ones."""
    best = value.max(-1)
    from_end = np.argmax(value[..., ::-1] >= best[..., None] - TIE, -1)
    return best, tables.horizons[len(tables.horizons) - 1 - from_end]


@dataclass(frozen=True)
class Rules:
    """Which sets are allowed: at most `limits` [P, S] copies, `most` [P] in total, and at least `least` [P] (0 or 1)."""

    limits: Ints
    most: Ints
    least: Ints

    def take(self, rows: NDArray) -> Rules:
        return Rules(self.limits[rows], self.most[rows], self.least[rows])


@dataclass(frozen=True)
class _Plan:
    """Sets with a horizon per slot, improved one slot at a time; horizon 0 is "not a member".

    Options of a slot are 0..L, so that its membership is one more choice of horizon.
    """

    tables: Tables
    prices: Prices
    members: Ints  # [P, S] counts
    horizons: Ints  # [P, S]

    def improved(self, value: Floats, rules: Rules | None = None) -> tuple[Floats, Ints, Ints]:
        """Utility, counts and horizons, never worse than `value` [P], which this plan has. Without rules, sets stay."""
        value, counts, each = value.copy(), self.members.copy(), self.horizons.copy()
        for _ in range(SWEEPS):
            before = value.copy()
            for slot in range(counts.shape[1]):
                self._choose(slot, value, counts, each, rules)
            if np.array_equal(before, value):
                break
        return value, counts, each

    def _choose(self, slot: int, value: Floats, counts: Ints, each: Ints, rules: Rules | None) -> None:
        """Give one slot its best horizon, the others staying; writes into the last arrays."""
        options = np.where(self._allowed(slot, counts, rules), self._options(slot, counts, each), -np.inf)
        best = options.max(-1)
        pick = options.shape[-1] - 1 - np.argmax(options[:, ::-1] >= best[:, None] - TIE, -1)
        better = best > value + TIE
        value[better] = best[better]
        each[better, slot] = pick[better]
        counts[better, slot] = np.where(pick > 0, np.maximum(counts[:, slot], 1), 0)[better]

    def _allowed(self, slot: int, counts: Ints, rules: Rules | None) -> Bools:
        """[P, 1 + L]"""
        inside = counts[:, slot] > 0
        if rules is None:
            may, may_not = inside, ~inside
        else:
            others = counts.sum(-1) - counts[:, slot]
            may = inside | ((rules.limits[:, slot] > 0) & (others < rules.most))
            may_not = others >= rules.least
        return np.concatenate([may_not[:, None], np.repeat(may[:, None], len(self.tables.horizons), 1)], -1)

    def _options(self, slot: int, counts: Ints, each: Ints) -> Floats:
        """[P, 1 + L] utility of the plan with each horizon of one slot."""
        t = self.tables
        copies = np.maximum(counts[:, slot], 1)
        others = np.delete(np.arange(counts.shape[1]), slot)
        reward, length, total = self._chosen(others, counts, each)
        own_reward = _power(t.reward_cdf[:, slot], copies[:, None, None])
        own_length = _power(self._length_cdf(t.length_cdf[:, slot, None], t.horizons), copies[:, None, None])
        rewards = reward[:, None] * np.pad(own_reward, ((0, 0), (1, 0), (0, 0)), constant_values=1.0)
        lengths = length[:, None] * np.pad(own_length, ((0, 0), (1, 0), (0, 0)), constant_values=1.0)
        totals = total[:, None] + np.pad(copies[:, None] * t.expected_length[:, slot], ((0, 0), (1, 0)))
        some = (counts[:, others].sum(-1) > 0)[:, None] | (np.arange(len(t.horizons) + 1) > 0)
        value = np.where(some, t.reward_floor[:, None], t.finished_best[:, None])
        value = value + ((1 - rewards) @ t.reward_steps[..., None])[..., 0]
        longest = t.shortest * some + (1 - lengths) @ t.price_steps
        return value - self.prices.compute[:, None] * totals - self.prices.latency[:, None] * longest

    def _chosen(self, slots: Ints, counts: Ints, each: Ints) -> tuple[Floats, Floats, Floats]:
        """CDFs of the maxima, [P, R − 1] and [P, 2L − 2], and Σ E[len] [P], of some slots at their horizons."""
        t, count = self.tables, counts[:, slots]
        at = np.maximum(each[:, slots] - 1, 0)
        rows = np.arange(len(count))[:, None]
        reward = _power(t.reward_cdf[rows, slots, at], count[..., None]).prod(1)
        length = _power(self._length_cdf(t.length_cdf[:, slots], each[:, slots]), count[..., None]).prod(1)
        return reward, length, (count * t.expected_length[rows, slots, at]).sum(-1)

    @staticmethod
    def _length_cdf(cdf: Floats, horizon: Ints) -> Floats:
        """[..., 2L − 2] on all prices m_0, price_1, m_1, …: one from the fold on. cdf [..., L − 1], horizon [...]."""
        price = np.arange(2 * cdf.shape[-1])
        return np.where(price >= 2 * horizon[..., None] - 1, 1.0, cdf[..., price // 2])

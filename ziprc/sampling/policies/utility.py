"""The sampling utility: what a set of unfinished samples is worth.

ZIP-RC (arXiv 2512.01457, §4) plans with the joint distribution that each sample predicts for itself. Advancing a set A of
samples for at most t_h tokens buys E[max reward] and costs tokens (their sum) and time (their maximum):

    U(A) = max_h E[max_A Z] − β/N̄ · ( α · Σ_A E[len] + (1 − α) · E[max_A len] )

A horizon h folds all mass at length bins ≥ h into one outcome: no reward, because abandoned, at the price of having waited
until bin h. Samples are taken as independent, so every expected maximum is a sum over products of CDFs:
E[max] = x_0 + Σ_k (x_{k+1} − x_k) · (1 − Π_A F(x_k)). All sets, horizons and prompts are evaluated at once.

Deliberate differences from the published simulator: the fold is priced at the edge t_h, which is when one stops, and not at
the midpoint of bin h (`fold="midpoint"` for parity); finished samples are not folded and keep their exact value; small
problems are searched exhaustively (search.py); horizons may differ between samples.

Identical copies (r forks of one prefix, new samples from the root) are one slot with a count: their CDF is F^r.

Shapes: P prompts, S slots (samples, or forkable prefixes) per prompt, R reward centres, L length bins, M sets,
H horizons: all of 1..L, where L means "none, run to completion", or that one alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling.tree import Bools, Floats, Ints

TIE = 1e-12  # utilities closer than this are equal, as in the published simulator
SWEEPS = 2  # over the samples, when each has its own horizon
Fold = Literal["edge", "midpoint"]  # of bin h: what an outcome beyond horizon h is charged


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

    def take(self, rows: Ints) -> Prices:
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

    def take(self, rows: Ints, slots: Ints | slice = slice(None)) -> Tables:
        """Some prompts [p] and, of each, some slots ([s], or [p, s] when they differ)."""
        at = rows[:, None] if isinstance(slots, np.ndarray) else rows
        by_slot = ("candidate", "reward_cdf", "length_cdf", "expected_length")
        found = {name: getattr(self, name)[at, slots] for name in by_slot}
        found |= {name: getattr(self, name)[rows] for name in ("finished_best", "reward_floor", "reward_steps")}
        return replace(self, **found)

    def planned(self, horizons: Horizons) -> Tables:
        """The same with the horizons that may be chosen from."""
        if Horizons(horizons) is not Horizons.NONE:
            return self
        reward_cdf, expected_length = self.reward_cdf[:, :, -1:], self.expected_length[:, :, -1:]
        last = {"horizons": self.horizons[-1:], "length_steps": self.length_steps[-1:]}
        return replace(self, reward_cdf=reward_cdf, expected_length=expected_length, **last)


@dataclass(frozen=True)
class Valued:
    """Sets with their utilities. `...` is empty for a chosen set, M for several sets that were asked about."""

    members: Ints  # [P, ..., S] counts
    utility: Floats  # [P, ...]
    horizons: Ints  # [P, ..., S] of each member; 0 where not a member


def tables(
    joint: ArrayLike,
    grid: BinGrid,
    *,
    finished: ArrayLike = False,
    finished_value: ArrayLike = 0.0,
    fold: Fold = "edge",
    independent: bool = False,
) -> Tables:
    """From joints [P, S, R, L]; `finished` [P, S] slots count by their `finished_value` [P, S] alone.

    A joint of zeros marks an empty slot. `independent` replaces each joint by the product of its marginals (ablation).
    """
    q = np.asarray(joint, dtype=np.float64)
    if q.ndim != 4 or q.shape[2:] != (grid.R, grid.L):
        raise UserError(f"expected joints of shape [P, S, {grid.R}, {grid.L}], found {list(q.shape)}.")
    done = np.broadcast_to(np.asarray(finished, dtype=bool), q.shape[:2])
    q = np.where(done[..., None, None], 0.0, q)
    total = q.sum((-2, -1))
    if not np.all(np.isfinite(total)) or q.min(initial=0.0) < 0:
        raise UserError("a joint distribution must not hold NaN or negative numbers.")
    q = q / np.where(total > 0, total, 1.0)[..., None, None]  # float16 joints do not sum to one
    if independent:
        q = q.sum(-1, keepdims=True) * q.sum(-2, keepdims=True)

    price_steps, length_steps = _price_steps(grid, fold)
    best = np.where(done, finished_value, 0.0).max(-1, initial=0.0)
    centres = np.maximum(np.asarray(grid.reward_centres), best[:, None])
    # One minus the mass above a centre that ends before horizon h, Σ_{l < h}; the fold lies at the lowest centre.
    above = np.cumsum(np.cumsum(q, -1)[:, :, :0:-1], axis=2)[:, :, ::-1]
    length_cdf = np.clip(np.cumsum(q.sum(-2), -1)[..., :-1], 0.0, 1.0)
    return Tables(
        candidate=total > 0,
        reward_cdf=np.ascontiguousarray(np.clip(1 - above, 0.0, 1.0).swapaxes(-1, -2)),
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


def _price_steps(grid: BinGrid, fold: Fold) -> tuple[Floats, Floats]:
    """Steps between all prices that can occur, in order, and their weights under each shared horizon."""
    middle = grid.length_midpoints
    prices = np.empty(2 * grid.L - 1)
    prices[0::2], prices[1::2] = middle, grid.length_edges[1:-1] if fold == "edge" else middle[1:]
    steps = np.diff(prices)
    reached = np.arange(len(steps)) < 2 * np.arange(1, grid.L + 1)[:, None] - 1
    return steps, (steps * reached).reshape(grid.L, grid.L - 1, 2).sum(-1)


def normaliser(tokens_so_far: ArrayLike, expected_remaining: ArrayLike, known: ArrayLike) -> Floats:
    """N̄ [P]: mean total length of the `known` samples of a group, all [P, S]; a finished one has nothing remaining."""
    mask = np.asarray(known, dtype=bool)
    if not mask.any(-1).all():
        raise UserError("a prompt without any sample has no mean length; give the root's expected length as one.")
    total = np.where(mask, np.asarray(tokens_so_far) + np.asarray(expected_remaining, dtype=np.float64), 0.0)
    return np.maximum(total.sum(-1) / mask.sum(-1), 1.0)  # at least a token, so that prices stay finite


def utility(tables: Tables, members: ArrayLike, prices: Prices, horizons: Horizons = Horizons.SHARED) -> Valued:
    """Utilities of the sets `members` [P, ..., S] (counts), each at its best horizon; ties go to the longest."""
    counts = np.asarray(members, dtype=np.int64)
    sets = counts.reshape(len(counts), int(np.prod(counts.shape[1:-1])), counts.shape[-1])  # [P, M, S]
    if np.any((sets > 0) & ~tables.candidate[:, None]):
        raise UserError("a set contains a slot that is finished or empty.")
    rule = tables.planned(horizons)
    found = shared_utility(rule, sets, prices)
    value = found.max(-1)
    from_end = np.argmax(found[..., ::-1] >= value[..., None] - TIE, -1)
    each = np.where(sets > 0, rule.horizons[len(rule.horizons) - 1 - from_end][..., None], 0)
    if horizons == Horizons.PER_SAMPLE:
        rows = np.repeat(np.arange(len(sets)), sets.shape[1])
        flat = Valued(sets.reshape(len(rows), -1), value.reshape(-1), each.reshape(len(rows), -1))
        improved = own_horizons(tables.take(rows), prices.take(rows), flat)
        value, each = improved.utility, improved.horizons
    return Valued(counts, value.reshape(counts.shape[:-1]), each.reshape(counts.shape))


def shared_utility(tables: Tables, sets: Ints, prices: Prices) -> Floats:
    """[P, M, H] from counts [P, M, S]; one product over the slots, in place."""
    reward: Floats = np.ones((*sets.shape[:2], *tables.reward_cdf.shape[2:]))
    length: Floats = np.ones((*sets.shape[:2], tables.length_cdf.shape[-1]))
    for slot in range(sets.shape[-1]):
        count = sets[:, :, slot, None]
        length *= _power(tables.length_cdf[:, None, slot], count)
        reward *= _power(tables.reward_cdf[:, None, slot], count[..., None])
    return net_value(tables, prices, reward, length, sets @ tables.expected_length, sets.any(-1))


def _power(cdf: Floats, count: Ints) -> Floats:
    """CDF of the maximum of `count` copies; one for none of them."""
    return np.where(count > 0, cdf, 1.0) if count.max(initial=0) <= 1 else cdf**count


def net_value(tables: Tables, prices: Prices, reward: Floats, length: Floats, total: Floats, some: Bools) -> Floats:
    """[P, M, H] from CDFs of the maxima [P, M, H, R − 1] and [P, M, L − 1], Σ E[len] [P, M, H] and "not empty" [P, M]."""
    rows = (1 - reward).reshape(len(reward), total.shape[1] * total.shape[2], reward.shape[-1])
    above = (rows @ tables.reward_steps[..., None]).reshape(total.shape)
    value = above + np.where(some, tables.reward_floor[:, None], tables.finished_best[:, None])[..., None]
    longest = (1 - length) @ tables.length_steps.T + tables.shortest * some[..., None]
    return value - prices.compute[:, None, None] * total - prices.latency[:, None, None] * longest


def own_horizons(
    tables: Tables, prices: Prices, start: Valued, limits: Ints | None = None, must_run: bool = False
) -> Valued:
    """Sets [P, S] improved slot by slot: each in turn gets its best horizon while the others stay; never worse than `start`.

    Without `limits` [P, S] the sets stay; with them membership is one more choice, horizon 0, and `must_run` keeps a member.
    """
    counts, value, each = start.members.copy(), start.utility.copy(), start.horizons.copy()
    for _ in range(SWEEPS):
        before = value.copy()
        for slot in range(counts.shape[1]):
            inside = counts[:, slot] > 0
            if limits is None:
                may, may_not = inside, ~inside
            else:
                may, may_not = inside | (limits[:, slot] > 0), counts.sum(-1) - counts[:, slot] >= must_run
            allowed = np.concatenate([may_not[:, None], np.repeat(may[:, None], len(tables.horizons), 1)], -1)
            options = np.where(allowed, _slot_options(tables, prices, slot, counts, each), -np.inf)
            best = options.max(-1)
            pick = options.shape[-1] - 1 - np.argmax(options[:, ::-1] >= best[:, None] - TIE, -1)
            better = best > value + TIE
            value[better] = best[better]
            each[better, slot] = pick[better]
            counts[better, slot] = np.where(pick > 0, np.maximum(counts[:, slot], 1), 0)[better]
        if np.array_equal(before, value):
            break
    return Valued(counts, value, each)


def _slot_options(t: Tables, prices: Prices, slot: int, counts: Ints, each: Ints) -> Floats:
    """[P, 1 + L] utility of sets `counts` [P, S], with horizons `each` [P, S], for no and for each horizon of one slot."""
    rows, others = np.arange(len(counts))[:, None], np.delete(np.arange(counts.shape[1]), slot)
    count, copies, at = counts[:, others], np.maximum(counts[:, slot], 1), np.maximum(each[:, others] - 1, 0)
    reward = _power(t.reward_cdf[rows, others, at], count[..., None]).prod(1)
    length = _power(_length_cdf(t.length_cdf[:, others], each[:, others]), count[..., None]).prod(1)
    total = (count * t.expected_length[rows, others, at]).sum(-1)
    own_reward = _power(t.reward_cdf[:, slot], copies[:, None, None])
    own_length = _power(_length_cdf(t.length_cdf[:, slot, None], t.horizons), copies[:, None, None])
    first = ((0, 0), (1, 0), (0, 0))
    rewards = reward[:, None] * np.pad(own_reward, first, constant_values=1.0)
    lengths = length[:, None] * np.pad(own_length, first, constant_values=1.0)
    totals = total[:, None] + np.pad(copies[:, None] * t.expected_length[:, slot], ((0, 0), (1, 0)))
    some = (count.sum(-1) > 0)[:, None] | (np.arange(len(t.horizons) + 1) > 0)
    value = np.where(some, t.reward_floor[:, None], t.finished_best[:, None])
    value = value + ((1 - rewards) @ t.reward_steps[..., None])[..., 0]
    longest = t.shortest * some + (1 - lengths) @ t.price_steps
    return value - prices.compute[:, None] * totals - prices.latency[:, None] * longest


def _length_cdf(cdf: Floats, horizon: Ints) -> Floats:
    """[..., 2L − 2] on all prices m_0, price_1, m_1, …: one from the fold on. cdf [..., L − 1], horizon [...]."""
    price = np.arange(2 * cdf.shape[-1])
    return np.where(price >= 2 * horizon[..., None] - 1, 1.0, cdf[..., price // 2])

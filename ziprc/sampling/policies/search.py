"""Which set of samples is worth most: all sets where there are few, else adding and dropping samples one at a time.

Shapes: P prompts, S slots, R reward centres, L length bins, M sets, H horizons.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling.policies.utility import (
    TIE,
    Bools,
    Choice,
    Floats,
    Fold,
    Horizons,
    Ints,
    Prices,
    Rules,
    Tables,
    _choice,
    _Plan,
    _score,
    _shared_utility,
    tables,
    utility,
)

EXHAUSTIVE_SETS = 256  # all subsets of 8 samples; above, add-and-drop search
CHUNK_CELLS = 1 << 20  # of one working array in the exhaustive search (8 MiB)


def best_set(
    tables: Tables,
    prices: Prices,
    *,
    limits: ArrayLike | None = None,
    max_active: ArrayLike | None = None,
    must_run: ArrayLike | None = None,
    horizons: Horizons | str = Horizons.SHARED,
    exhaustive_sets: int = EXHAUSTIVE_SETS,
) -> Choice:
    """The set with the highest utility for each prompt; of equal ones the largest, then the first.

    `limits` [P, S] is how often a slot may be taken (default: once). Sets of more than `max_active` ([P] or one number)
    are not considered, nor is the empty one where `must_run` [P]. Exhaustive where there are at most `exhaustive_sets`
    sets, add-and-drop otherwise (finds the same set for 97–100 % of random groups of 8, depending on the prices). A
    prompt's answer does not depend on the prompts beside it. Own horizons are improved from the best shared one,
    sample by sample, where leaving or joining the set is one more option.
    """
    rules = _rules(tables, limits, max_active, must_run)
    mode = Horizons(horizons)
    rule = tables.to_completion() if mode is Horizons.NONE else tables
    members = np.zeros_like(rules.limits)
    few = np.prod(rules.limits + 1.0, -1) <= exhaustive_sets
    for rows in _equal_rows(rules.limits, np.flatnonzero(few)):
        members[rows] = _exhaustive(rule.take(rows), prices.take(rows), rules.take(rows))
    rest = np.flatnonzero(~few)
    if len(rest):
        members[rest] = _add_and_drop(rule.take(rest), prices.take(rest), rules.take(rest))
    chosen = utility(tables, members, prices, Horizons.NONE if mode is Horizons.NONE else Horizons.SHARED)
    if mode is not Horizons.PER_SAMPLE:
        return chosen
    value, members, each = _Plan(tables, prices, members, chosen.horizons).improved(chosen.utility, rules)
    return _choice(tables, members, value, each)


def _rules(tables: Tables, limits: ArrayLike | None, most: ArrayLike | None, must_run: ArrayLike | None) -> Rules:
    prompts = len(tables.candidate)
    copies = np.where(tables.candidate, 1 if limits is None else np.asarray(limits, dtype=np.int64), 0)
    cap = copies.sum(-1) if most is None else np.broadcast_to(np.asarray(most, dtype=np.int64), prompts)
    least = np.zeros(prompts, dtype=np.int64) if must_run is None else np.asarray(must_run, dtype=bool).astype(np.int64)
    impossible = np.flatnonzero(np.minimum(copies.sum(-1), cap) < least)
    if len(impossible):
        raise UserError(f"prompt {impossible[0]} must run a sample but has none that may run.")
    return Rules(np.minimum(copies, cap[:, None]), cap, least)


def _equal_rows(limits: Ints, rows: Ints) -> Iterator[Ints]:
    """Groups of prompts whose sorted limits agree: they enumerate the same sets."""
    if len(rows):
        signature = np.unique(np.sort(limits[rows], -1), axis=0, return_inverse=True)[1].reshape(-1)
        for group in range(int(signature.max()) + 1):
            yield rows[signature == group]


def _exhaustive(tables: Tables, prices: Prices, rules: Rules) -> Ints:
    """[P, S] counts, from all sets; limits are equal up to their order."""
    order = np.argsort(-rules.limits, axis=-1, kind="stable")
    limits = np.take_along_axis(rules.limits, order, -1)[0]
    order = order[:, : np.count_nonzero(limits)]
    limits = limits[limits > 0]
    sets = _all_counts(limits)
    members = np.zeros_like(rules.limits)
    step = max(1, CHUNK_CELLS // (len(sets) * int(np.prod(tables.reward_cdf.shape[2:]))))
    for start in range(0, len(order), step):
        rows = np.arange(start, min(start + step, len(order)))
        best = _best_of(tables.take(rows, order[rows]), prices.take(rows), rules.take(rows), sets, limits)
        members[rows[:, None], order[rows]] = sets[best]
    return members


def _all_counts(limits: Ints) -> Ints:
    """[Π (limits + 1), S] every count from none to the limit, the first slot's fastest."""
    if not len(limits):
        return np.zeros((1, 0), dtype=np.int64)
    return np.stack(np.unravel_index(np.arange(np.prod(limits + 1)), limits + 1, order="F"), -1)


def _best_of(tables: Tables, prices: Prices, rules: Rules, sets: Ints, limits: Ints) -> Ints:
    """[P] index of the best allowed set."""
    reward = _all_products(tables.reward_cdf, limits)
    length = _all_products(tables.length_cdf, limits)
    size = sets.sum(-1)
    some = np.broadcast_to(size > 0, (len(reward), len(sets)))
    value = _score(tables, prices, reward, length, sets @ tables.expected_length, some).max(-1)
    value[(size > rules.most[:, None]) | (size < rules.least[:, None])] = -np.inf
    return _largest_of_best(value, size)


def _largest_of_best(value: Floats, size: Ints) -> Ints:
    """[P] index of the best value [P, M]; of equal ones that with the largest `size`, then the first."""
    return np.argmax(np.where(value >= value.max(-1, keepdims=True) - TIE, size, -1), -1)


def _all_products(cdf: Floats, limits: Ints) -> Floats:
    """[P, Π (limits + 1), ...] products Π_s F_s^{c_s} of cdf [P, S, ...], in the order of `_all_counts`."""
    product = np.ones((len(cdf), 1, *cdf.shape[2:]))
    for slot, limit in enumerate(limits):
        powers = np.stack([cdf[:, slot] ** count for count in range(limit + 1)], 1)
        product = (powers[:, :, None] * product[:, None]).reshape(len(cdf), -1, *cdf.shape[2:])
    return product


def _add_and_drop(tables: Tables, prices: Prices, rules: Rules) -> Ints:
    """[P, S] counts, climbing from nothing and from everything; each copy of a slot is a column of its own."""
    slots = np.repeat(np.arange(rules.limits.shape[1]), rules.limits.max(0))
    copy = np.arange(len(slots)) - np.searchsorted(slots, slots)
    may = copy < rules.limits[:, slots]  # [P, C]
    columns = tables.take(np.arange(len(may)), slots)
    value, sets = zip(*(_climb(columns, prices, rules, may, start) for start in (np.zeros_like(may), may)), strict=True)
    stacked = np.stack(sets, 1)
    best = _largest_of_best(np.stack(value, 1), stacked.sum(-1))
    taken = stacked[np.arange(len(may)), best]
    return taken.astype(np.int64) @ (slots[:, None] == np.arange(rules.limits.shape[1]))


def _climb(tables: Tables, prices: Prices, rules: Rules, may: Bools, start: Bools) -> tuple[Floats, Bools]:
    """Utility [P] and members [P, C] after adding or dropping one column at a time, as long as it helps.

    A set that is not allowed has utility −∞, so a start that is too large first drops what it misses least.
    """
    member = start.copy()
    value = _shared_utility(tables, start[:, None].astype(np.int64), prices)[:, 0].max(-1)
    value[(start.sum(-1) > rules.most) | (start.sum(-1) < rules.least)] = -np.inf
    rows = np.arange(len(may))
    cells = _column_first(tables)
    for _ in range(2 * may.shape[1]):
        now, size = member[rows], member[rows].sum(-1, keepdims=True)
        allowed = may[rows] & np.where(now, size > rules.least[:, None], size < rules.most[:, None])
        moves = np.where(allowed, _toggled(tables, prices, cells, now), -np.inf)
        pick = _largest_of_best(moves, ~now)
        new, adds = moves[np.arange(len(rows)), pick], ~now[np.arange(len(rows)), pick]
        better = (new > value[rows] + TIE) | (adds & (new >= value[rows] - TIE) & np.isfinite(new))
        better_rows, pick = rows[better], pick[better]
        member[better_rows, pick] ^= True
        fits = member[better_rows].sum(-1) <= rules.most[better]
        value[better_rows] = np.where(fits, new[better], -np.inf)
        if not better.all():
            rows, keep = better_rows, np.flatnonzero(better)
            tables, prices, rules, cells = tables.take(keep), prices.take(keep), rules.take(keep), cells[:, keep]
        if not len(rows):
            break
    return value, member


def _column_first(tables: Tables) -> Floats:
    """[C, P, H · (R − 1) + L − 1] both CDFs of a column side by side, so that products over columns run along memory."""
    flat = tables.reward_cdf.reshape(*tables.candidate.shape, int(np.prod(tables.reward_cdf.shape[2:])))
    return np.ascontiguousarray(np.concatenate([flat, tables.length_cdf], -1).swapaxes(0, 1))


def _toggled(tables: Tables, prices: Prices, cells: Floats, member: Bools) -> Floats:
    """[P, C] best utility over horizons after adding (or dropping) each column to (from) the set `member` [P, C]."""
    both = _with_toggle(cells, member.T[..., None]).swapaxes(0, 1)
    reward, length = np.split(both, [both.shape[-1] - tables.length_cdf.shape[-1]], axis=-1)
    reward = reward.reshape(tables.reward_cdf.shape)
    now = member[:, None] @ tables.expected_length  # [P, 1, H]
    total = now + np.where(member[..., None], -1.0, 1.0) * tables.expected_length
    some = member.sum(-1, keepdims=True) + np.where(member, -1, 1) > 0
    return _score(tables, prices, reward, length, total, some).max(-1)


def _with_toggle(cdf: Floats, member: Bools) -> Floats:
    """Product of the members' CDFs [C, P, ...] with each column in turn added or left out (without dividing by zeros)."""
    inside = np.where(member, cdf, 1.0)
    others = np.empty_like(inside)
    others[:1] = 1.0
    for column in range(1, len(inside)):
        np.multiply(others[column - 1], inside[column - 1], out=others[column])
    after = inside[-1].copy()
    for column in range(len(inside) - 2, -1, -1):
        others[column] *= after
        after *= inside[column]
    return np.where(member, others, after * cdf)


def initial_count(
    root_joint: ArrayLike,
    k_max: int,
    grid: BinGrid,
    prices: Prices,
    *,
    fold: Fold | str = Fold.EDGE,
    independent: bool = False,
    horizons: Horizons | str = Horizons.SHARED,
) -> Ints:
    """[P] number of new samples, 1..k_max, whose set of i.i.d. copies of the root's joint [P, R, L] is worth most."""
    if k_max < 1:
        raise UserError(f"k_max must be at least 1, found {k_max}.")
    root = tables(np.asarray(root_joint)[:, None], grid, fold=fold, independent=independent)
    size = np.arange(1, k_max + 1)
    sets = np.broadcast_to(size[:, None], (len(root.candidate), k_max, 1))
    return size[_largest_of_best(utility(root, sets, prices, horizons).utility, size)]

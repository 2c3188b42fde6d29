"""Which set of samples is worth most: all sets where there are few, else adding and dropping samples one at a time.

Shapes: P prompts, S slots, R reward centres, L length bins, M sets, H horizons, C columns (copies of slots).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ziprc.errors import UserError
from ziprc.sampling.policies import utility as u
from ziprc.sampling.policies.utility import TIE, Horizons, Prices, Tables, Valued
from ziprc.sampling.tree import Bools, Floats, Ints

EXHAUSTIVE_SETS = 256  # all subsets of 8 samples; above, add-and-drop search
CHUNK_CELLS = 1 << 20  # of one working array in the exhaustive search (8 MiB)


def best_set(
    tables: Tables,
    prices: Prices,
    *,
    limits: ArrayLike = 1,
    must_run: bool = False,
    horizons: Horizons = Horizons.SHARED,
) -> Valued:
    """The set with the highest utility for each prompt; of equal ones the largest, then the first.

    `limits` [P, S] is how often a slot may be taken; with `must_run` no set may be empty. Exhaustive where there are at most
    EXHAUSTIVE_SETS sets, add-and-drop otherwise (finds the same set for 97–100 % of random groups of 8, depending on the
    prices). A prompt's answer does not depend on the prompts beside it. Own horizons are improved from the best shared
    one, sample by sample, where leaving or joining the set is one more option.
    """
    limits = np.where(tables.candidate, np.asarray(limits, dtype=np.int64), 0)
    impossible = np.flatnonzero(~limits.any(-1))
    if must_run and len(impossible):
        raise UserError(f"prompt {impossible[0]} must run a sample but has none that may run.")
    rule = tables.planned(horizons)
    members = np.zeros_like(limits)
    few = np.prod(limits + 1.0, -1) <= EXHAUSTIVE_SETS
    ordered = np.sort(limits, -1)
    for same in np.unique(
        ordered[few], axis=0
    ):  # prompts whose limits agree but for their order enumerate the same sets
        rows = np.flatnonzero((ordered == same).all(-1))
        members[rows] = _exhaustive(rule.take(rows), prices.take(rows), limits[rows], must_run)
    rest = np.flatnonzero(~few)
    if len(rest):
        members[rest] = _add_and_drop(rule.take(rest), prices.take(rest), limits[rest], must_run)
    own = horizons == Horizons.PER_SAMPLE
    chosen = u.utility(tables, members, prices, Horizons.SHARED if own else horizons)
    return u.own_horizons(tables, prices, chosen, limits, must_run) if own else chosen


def _exhaustive(tables: Tables, prices: Prices, limits: Ints, must_run: bool) -> Ints:
    """[P, S] counts, from all sets; limits [P, S] are equal up to their order."""
    order = np.argsort(-limits, axis=-1, kind="stable")
    most = np.take_along_axis(limits, order, -1)[0]
    order, most = order[:, : np.count_nonzero(most)], most[most > 0]
    sets = np.zeros((1, 0), np.int64)  # [Π (most + 1), S] every count from none to the limit, the first slot's fastest
    if len(most):
        sets = np.stack(np.unravel_index(np.arange(np.prod(most + 1)), most + 1, order="F"), -1)
    size = sets.sum(-1)
    members = np.zeros_like(limits)
    step = max(1, CHUNK_CELLS // (len(sets) * int(np.prod(tables.reward_cdf.shape[2:]))))
    for start in range(0, len(order), step):
        rows = np.arange(start, min(start + step, len(order)))
        part = tables.take(rows, order[rows])
        reward, length = (_all_products(cdf, most) for cdf in (part.reward_cdf, part.length_cdf))
        some = np.broadcast_to(size > 0, (len(rows), len(sets)))
        value = u.net_value(part, prices.take(rows), reward, length, sets @ part.expected_length, some).max(-1)
        value[:, size < must_run] = -np.inf
        members[rows[:, None], order[rows]] = sets[_largest_of_best(value, size)]
    return members


def _largest_of_best(value: Floats, size: Ints | Bools) -> Ints:
    """[P] index of the best value [P, M]; of equal ones that with the largest `size`, then the first."""
    return np.argmax(np.where(value >= value.max(-1, keepdims=True) - TIE, size, -1), -1)


def _all_products(cdf: Floats, limits: Ints) -> Floats:
    """[P, Π (limits + 1), ...] products Π_s F_s^{c_s} of cdf [P, S, ...], in the order of the sets."""
    product = np.ones((len(cdf), 1, *cdf.shape[2:]))
    for slot, limit in enumerate(limits):
        powers = np.stack([cdf[:, slot] ** count for count in range(limit + 1)], 1)
        product = (powers[:, :, None] * product[:, None]).reshape(len(cdf), -1, *cdf.shape[2:])
    return product


def _add_and_drop(tables: Tables, prices: Prices, limits: Ints, must_run: bool) -> Ints:
    """[P, S] counts, climbing from nothing and from everything; each copy of a slot is a column of its own."""
    slots = np.repeat(np.arange(limits.shape[1]), limits.max(0))
    copy = np.arange(len(slots)) - np.searchsorted(slots, slots)
    may = copy < limits[:, slots]  # [P, C]
    columns = tables.take(np.arange(len(may)), slots)
    starts = (np.zeros_like(may), may)
    value, sets = zip(*(_climb(columns, prices, may, start, must_run) for start in starts), strict=True)
    stacked = np.stack(sets, 1)
    best = _largest_of_best(np.stack(value, 1), stacked.sum(-1))
    taken = stacked[np.arange(len(may)), best]
    return taken.astype(np.int64) @ (slots[:, None] == np.arange(limits.shape[1]))


def _climb(tables: Tables, prices: Prices, may: Bools, start: Bools, must_run: bool) -> tuple[Floats, Bools]:
    """Utility [P] and members [P, C] after adding or dropping one column at a time, as long as it helps.

    A set that is not allowed has utility −∞.
    """
    member = start.copy()
    value = u.shared_utility(tables, start[:, None].astype(np.int64), prices)[:, 0].max(-1)
    value[start.sum(-1) < must_run] = -np.inf
    rows = np.arange(len(may))
    # [C, P, H · (R − 1) + L − 1] both CDFs of a column side by side, so that products over columns run along memory
    flat = tables.reward_cdf.reshape(*may.shape, int(np.prod(tables.reward_cdf.shape[2:])))
    cells = np.ascontiguousarray(np.concatenate([flat, tables.length_cdf], -1).swapaxes(0, 1))
    for _ in range(2 * may.shape[1]):
        now = member[rows]
        allowed = may[rows] & (~now | (now.sum(-1, keepdims=True) > must_run))
        moves = np.where(allowed, _toggled(tables, prices, cells, now), -np.inf)
        pick = _largest_of_best(moves, ~now)
        new, adds = moves[np.arange(len(rows)), pick], ~now[np.arange(len(rows)), pick]
        better = (new > value[rows] + TIE) | (adds & (new >= value[rows] - TIE) & np.isfinite(new))
        better_rows = rows[better]
        member[better_rows, pick[better]] ^= True
        value[better_rows] = new[better]
        if not better.all():
            rows, keep = better_rows, np.flatnonzero(better)
            tables, prices, cells = tables.take(keep), prices.take(keep), cells[:, keep]
        if not len(rows):
            break
    return value, member


def _toggled(tables: Tables, prices: Prices, cells: Floats, member: Bools) -> Floats:
    """[P, C] best utility over horizons after adding (or dropping) each column to (from) the set `member` [P, C]."""
    both = _with_toggle(cells, member.T[..., None]).swapaxes(0, 1)
    reward, length = np.split(both, [both.shape[-1] - tables.length_cdf.shape[-1]], axis=-1)
    reward = reward.reshape(tables.reward_cdf.shape)
    now = member[:, None] @ tables.expected_length  # [P, 1, H]
    total = now + np.where(member[..., None], -1.0, 1.0) * tables.expected_length
    some = member.sum(-1, keepdims=True) + np.where(member, -1, 1) > 0
    return u.net_value(tables, prices, reward, length, total, some).max(-1)


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


def initial_count(root: Tables, k_max: int, prices: Prices, horizons: Horizons = Horizons.SHARED) -> Ints:
    """[P] number of new samples, 1..k_max, whose set of i.i.d. copies of the root (the one slot of its tables) is worth most."""
    size = np.arange(1, k_max + 1)
    sets = np.broadcast_to(size[:, None], (len(root.candidate), k_max, 1))
    return size[_largest_of_best(u.utility(root, sets, prices, horizons).utility, size)]

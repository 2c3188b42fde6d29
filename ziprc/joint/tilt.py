"""How a value turns a reference policy into a better one: π(a|s) ∝ π_ref(a|s) · weight(Q(s, a)).

ICL-V. `exp`, the published form, is e^{Q/η}. Maximising E[R] − η·KL(π ‖ π_ref) exactly gives, for rewards 0 and 1, the weight
1 + Q·(e^{1/η} − 1): `soft`. It is milder where Q is small (η = .1, .9 against .1: 9, where `exp` has 2,981). Its limit for
η → 0 is `posterior`, Q itself: the reference given that it succeeds, which is also what fine-tuning on right responses tends
to. `soft_cost` asks the whole joint and charges `price` for every token still to come: Σ p(r, l)·e^{(r − price·l)/η}.

n candidates, R·L cells.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from ziprc.joint.bins import BinGrid

NOTHING = 1e-300  # stands for 0 in a logarithm
LEAST = 1e-6  # a value below it weighs as much: no candidate is ruled out for good


class Tilt(StrEnum):
    """The form of the weight."""

    EXP = "exp"
    POSTERIOR = "posterior"
    SOFT = "soft"
    SOFT_COST = "soft_cost"


def log_weight(
    tilt: Tilt,
    q: ArrayLike,
    eta: float,
    price: float = 0.0,
    cells: ArrayLike | None = None,
    grid: BinGrid | None = None,
) -> NDArray[np.float64]:
    """[n] log of the weight of candidates with values `q` [n] in [0, 1]; `cells` [n, R·L] and `grid` for `soft_cost`."""
    value = np.clip(np.asarray(q, dtype=np.float64), LEAST, 1.0)
    if tilt is Tilt.EXP:
        return value / eta
    if tilt is Tilt.POSTERIOR:
        return np.log(value)
    if tilt is Tilt.SOFT:
        return np.logaddexp(np.log(np.maximum(1 - value, NOTHING)), np.log(value) + 1 / eta)
    assert cells is not None and grid is not None, "soft_cost needs the whole joint"
    gain = np.asarray(grid.reward_centres)[:, None] - price * grid.length_midpoints
    joint = np.clip(np.asarray(cells, dtype=np.float64), 0.0, 1.0)
    found: NDArray[np.float64] = logsumexp(gain.ravel() / eta, b=joint, axis=-1)
    return found

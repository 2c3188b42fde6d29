"""The grid of (reward, remaining length) bins: the one place that turns numbers into bin indices.

ZIP-RC (arXiv 2512.01457, §3) writes a joint distribution into R·L reserved logits. Cell (r, l) has the flat index
r·L + l: reward-major, length fastest. Length bin l is [edge_l, edge_{l+1}); everything at or above the last edge joins the
last bin. Reward bins meet half-way between centres. Unlike the published code, a NaN or out-of-range value is refused
instead of landing in bin 0. Shapes: R reward centres, L length bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ziprc.errors import UserError


@dataclass(frozen=True)
class BinGrid:
    """Reward centres × length bins. `length_edges` holds L + 1 token counts, from 0 to the nominal top."""

    reward_centres: tuple[float, ...]
    length_edges: tuple[int, ...]

    def __post_init__(self) -> None:
        centres, edges = self.reward_centres, self.length_edges
        if len(centres) < 2 or not (np.diff(centres) > 0).all():
            raise UserError(f"reward_centres must be at least two increasing numbers, found {centres}.")
        if centres[0] < 0 or centres[-1] > 1:
            raise UserError(f"reward_centres must lie in [0, 1], found {centres}.")
        if len(edges) < 3 or not (np.diff(edges) > 0).all() or edges[0] != 0:
            raise UserError(f"length_edges must be at least three increasing numbers from 0, found {edges}.")

    @property
    def R(self) -> int:
        return len(self.reward_centres)

    @property
    def L(self) -> int:
        return len(self.length_edges) - 1

    @property
    def size(self) -> int:
        return self.R * self.L

    @cached_property
    def reward_edges(self) -> NDArray[np.float64]:
        """[R + 1] edges half-way between centres; the outer ones half a step outside, clamped to [0, 1]."""
        centres = np.asarray(self.reward_centres, dtype=np.float64)
        middle = (centres[1:] + centres[:-1]) / 2
        low, high = centres[0] - (middle[0] - centres[0]), centres[-1] + (centres[-1] - middle[-1])
        return np.concatenate([[max(low, 0.0)], middle, [min(high, 1.0)]])

    @cached_property
    def length_midpoints(self) -> NDArray[np.float64]:
        """[L] midpoints of the length bins, the representative lengths of the published simulator."""
        edges = np.asarray(self.length_edges, dtype=np.float64)
        return (edges[1:] + edges[:-1]) / 2

    def flat_index(self, reward_bin: ArrayLike, length_bin: ArrayLike) -> NDArray[np.int64]:
        """Flat index r·L + l into the slice."""
        return np.asarray(reward_bin, dtype=np.int64) * self.L + np.asarray(length_bin, dtype=np.int64)

    def length_bin(self, remaining: ArrayLike) -> NDArray[np.int64]:
        """Bin of a number of remaining tokens ≥ 0; UserError below 0."""
        tokens = np.asarray(remaining)
        if tokens.size and tokens.min() < 0:
            raise UserError(f"remaining tokens must be at least 0, found {tokens.min()}.")
        return np.clip(np.searchsorted(self.length_edges, tokens, side="right") - 1, 0, self.L - 1)

    def reward_bin(self, value: ArrayLike) -> NDArray[np.int64]:
        """Bin of a score in [0, 1]; UserError for NaN or a number outside."""
        scores = np.asarray(value, dtype=np.float64)
        bad = scores[~((scores >= 0) & (scores <= 1))]
        if bad.size:
            raise UserError(f"a score must be a number in [0, 1], found {bad.flat[0]}.")
        return np.clip(np.searchsorted(self.reward_edges, scores, side="right") - 1, 0, self.R - 1)

    def to_dict(self) -> dict[str, Any]:
        return {"reward_centres": list(self.reward_centres), "length_edges": list(self.length_edges)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BinGrid:
        return cls(tuple(float(c) for c in record["reward_centres"]), tuple(int(e) for e in record["length_edges"]))

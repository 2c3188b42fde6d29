"""What one can ask of a joint distribution over (reward, remaining length).

Expectations of reward use the centres, not the means of the bin edges (they differ in the outermost bins). Lengths are
better reported by the median than by the mean of midpoints: the open top bin biases the mean. Quantiles interpolate
linearly inside a bin. All arrays are [..., R·L] or views of it; the leading dimensions are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid

SUM_TOLERANCE = 1e-2  # float16 tables round each of up to a few hundred cells


@dataclass(frozen=True)
class JointDistribution:
    """Probabilities [..., R·L] on a grid; rows sum to one."""

    grid: BinGrid
    probabilities: NDArray[np.floating]

    def __post_init__(self) -> None:
        if self.probabilities.shape[-1] != self.grid.size:
            raise UserError(f"expected {self.grid.size} cells, found {self.probabilities.shape[-1]}.")
        totals = self.probabilities.sum(-1, dtype=np.float64)
        if not np.all(np.abs(totals - 1) < SUM_TOLERANCE):
            raise UserError("a joint distribution has to sum to 1 and must not hold NaN.")

    @property
    def table(self) -> NDArray[np.floating]:
        """[..., R, L]"""
        return self.probabilities.reshape(*self.probabilities.shape[:-1], self.grid.R, self.grid.L)

    def reward_marginal(self) -> NDArray[np.float64]:
        """[..., R]"""
        return self.table.sum(-1, dtype=np.float64)

    def length_marginal(self) -> NDArray[np.float64]:
        """[..., L]"""
        return self.table.sum(-2, dtype=np.float64)

    def expected_reward(self) -> NDArray[np.float64]:
        """[...] in [0, 1]"""
        total = np.maximum(self.probabilities.sum(-1, dtype=np.float64), 1e-12)
        return np.clip(self.reward_marginal() @ np.asarray(self.grid.reward_centres) / total, 0.0, 1.0)

    def right_within(self, tokens: NDArray[np.int64], least: float = 0.5) -> NDArray[np.float64]:
        """[...] chance of a reward of `least` or more with at most `tokens` [...] still to come, stop token included."""
        edges = np.asarray(self.grid.length_edges, dtype=np.float64)
        share = np.clip((np.asarray(tokens)[..., None] - edges[:-1]) / np.diff(edges), 0.0, 1.0)
        right = np.asarray(self.grid.reward_centres) >= least
        return (self.table[..., right, :].sum(-2, dtype=np.float64) * share).sum(-1)

    def expected_remaining(self) -> NDArray[np.float64]:
        """[...] tokens, mean of the bin midpoints."""
        return self.length_marginal() @ self.grid.length_midpoints

    def length_quantile(self, level: float) -> NDArray[np.float64]:
        """[...] tokens below which the remaining length falls with probability `level`."""
        cdf = np.cumsum(self.length_marginal(), -1)
        cdf = cdf / cdf[..., -1:]
        bin_ = np.minimum((cdf < level).sum(-1), self.grid.L - 1)
        edges = np.asarray(self.grid.length_edges, dtype=np.float64)
        before = np.where(bin_ > 0, np.take_along_axis(cdf, np.maximum(bin_ - 1, 0)[..., None], -1)[..., 0], 0.0)
        inside = np.take_along_axis(cdf, bin_[..., None], -1)[..., 0] - before
        share = np.clip((level - before) / np.maximum(inside, 1e-12), 0.0, 1.0)
        return edges[bin_] + share * (edges[bin_ + 1] - edges[bin_])

    def median_remaining(self) -> NDArray[np.float64]:
        """[...] tokens"""
        return self.length_quantile(0.5)

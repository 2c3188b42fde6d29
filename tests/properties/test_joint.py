"""Properties of bins and distributions, over many random grids and values (seeded, no shrinking needed)."""

from __future__ import annotations

import numpy as np
import pytest

from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.vocabulary import check_layout, derive_layout

SEEDS = range(25)


def random_grid(rng: np.random.Generator) -> BinGrid:
    centres = np.unique(rng.random(int(rng.integers(2, 9))).round(3))
    edges = np.unique(rng.integers(1, 400, int(rng.integers(2, 12))))
    centres = centres if len(centres) > 1 else np.array([0.0, 1.0])
    edges = edges if len(edges) > 1 else np.array([8, 16])
    return BinGrid(tuple(centres.tolist()), (0, *edges.tolist()))


def random_joint(rng: np.random.Generator, grid: BinGrid, rows: int = 6) -> JointDistribution:
    cells = np.exp(rng.normal(0, 3, (rows, grid.size)))
    return JointDistribution(grid, cells / cells.sum(-1, keepdims=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_flat_index_numbers_the_cells_of_the_table(seed: int):
    grid = random_grid(np.random.default_rng(seed))
    flat = np.arange(grid.size)
    reward, length = np.unravel_index(flat, (grid.R, grid.L))
    assert (grid.flat_index(reward, length) == flat).all()
    table = JointDistribution(grid, np.eye(grid.size)).table
    assert (table[flat, reward, length] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_length_lies_in_its_half_open_bin(seed: int):
    grid = random_grid(np.random.default_rng(seed))
    lengths = np.arange(grid.length_edges[-1] + 50)
    bins = grid.length_bin(lengths)
    edges = np.array(grid.length_edges)
    assert (edges[bins] <= lengths).all()
    assert ((lengths < edges[bins + 1]) | (bins == grid.L - 1)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bin_of_a_score_is_that_of_its_nearest_centre(seed: int):
    rng = np.random.default_rng(seed)
    grid = random_grid(rng)
    scores = rng.random(200)
    distance = np.abs(scores[:, None] - np.array(grid.reward_centres))
    chosen = distance[np.arange(200), grid.reward_bin(scores)]
    assert np.allclose(chosen, distance.min(1))
    assert (grid.reward_bin(grid.reward_centres) == np.arange(grid.R)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_marginals_and_quantiles_are_consistent(seed: int):
    rng = np.random.default_rng(seed)
    grid = random_grid(rng)
    joint = random_joint(rng, grid)
    assert np.allclose(joint.reward_marginal().sum(-1), 1) and np.allclose(joint.length_marginal().sum(-1), 1)
    levels = np.linspace(0.01, 0.99, 15)
    quantiles = np.stack([joint.length_quantile(q) for q in levels])
    assert (np.diff(quantiles, axis=0) >= -1e-9).all()
    assert (quantiles >= 0).all() and (quantiles <= grid.length_edges[-1]).all()
    low, high = grid.reward_centres[0], grid.reward_centres[-1]
    assert ((joint.expected_reward() >= low - 1e-9) & (joint.expected_reward() <= high + 1e-9)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_quantile_splits_the_mass_as_asked(seed: int):
    rng = np.random.default_rng(seed)
    grid = random_grid(rng)
    joint = random_joint(rng, grid, rows=1)
    edges = np.array(grid.length_edges, dtype=float)
    for level in (0.1, 0.5, 0.9):
        q = float(joint.length_quantile(level)[0])
        share = np.clip((q - edges[:-1]) / np.diff(edges), 0, 1)  # of each bin that lies below q
        assert np.isclose((joint.length_marginal()[0] * share).sum(), level)


@pytest.mark.parametrize("seed", SEEDS)
def test_float16_storage_moves_expectations_by_little(seed: int):
    rng = np.random.default_rng(seed)
    joint = random_joint(rng, random_grid(rng))
    stored = JointDistribution(joint.grid, joint.probabilities.astype(np.float16))
    assert np.abs(stored.expected_reward() - joint.expected_reward()).max() < 2e-3  # float16 has 11 bits


@pytest.mark.parametrize("seed", SEEDS)
def test_a_derived_layout_always_passes_its_own_check(seed: int):
    rng = np.random.default_rng(seed)
    ids = sorted(set(rng.integers(0, 500, 40).tolist()))

    class Words:
        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in ids}

    layout = derive_layout(Words(), 600, 56)
    check_layout(layout, ids)
    assert not set(range(layout.joint_start, layout.joint_stop)) & set(ids)

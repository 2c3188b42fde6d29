"""The sampling utility on the worked example of the specification, and the rules of the search."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling.policies.search import EXHAUSTIVE_SETS, best_set, initial_count
from ziprc.sampling.policies.utility import Prices, Tables, normaliser, tables, utility

GRID = BinGrid((0.0, 1.0), (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768))
NONE = GRID.L
A, B, AB = (1, 0), (0, 1), (1, 1)
MEAN_LENGTH = 5127.6
TABLE_DIGITS = 1e-6  # the worked example is stated to six decimals


def example() -> np.ndarray:
    """[1, 2, R, L]"""
    joint = np.zeros((1, 2, GRID.R, GRID.L))
    joint[0, 0, 1, 2], joint[0, 0, 0, 2], joint[0, 0, 1, 5], joint[0, 0, 0, 5] = 0.5, 0.1, 0.1, 0.3
    joint[0, 1, 1, 3], joint[0, 1, 0, 3], joint[0, 1, 0, 6] = 0.3, 0.3, 0.4
    return joint


def at_horizon(rule: Tables, horizon: int) -> Tables:
    """The same tables with one horizon to choose from."""
    h = slice(horizon - 1, horizon)
    return replace(
        rule,
        reward_cdf=rule.reward_cdf[:, :, h],
        expected_length=rule.expected_length[:, :, h],
        horizons=rule.horizons[h],
        length_steps=rule.length_steps[h],
    )


def enumerated(
    joint: np.ndarray, members: tuple[int, ...], horizon: int, fold: str, alpha: float, beta: float
) -> float:
    """The definition, outcome by outcome, sharing no code with the module."""
    edges, middle = np.array(GRID.length_edges, float), np.array(GRID.length_midpoints)
    states = []
    for slot in np.flatnonzero(members):
        cells = [(joint[0, slot, r, length], r, length) for r in range(GRID.R) for length in range(GRID.L)]
        price = edges if fold == "edge" else middle
        states.append(
            [(p, 0.0, price[horizon]) if b >= horizon else (p, float(r), middle[b]) for p, r, b in cells if p]
        )
    reward = total = longest = 0.0
    for outcome in itertools.product(*states):
        probability = np.prod([p for p, _, _ in outcome])
        lengths = [length for _, _, length in outcome]
        reward += probability * max(r for _, r, _ in outcome)
        total += probability * sum(lengths)
        longest += probability * max(lengths)
    return reward - beta / MEAN_LENGTH * (alpha * total + (1 - alpha) * longest)


@pytest.mark.parametrize(
    ("alpha", "beta", "members", "horizon", "expected"),
    [
        (0.1, 0.01, A, NONE, 0.594308),
        (0.1, 0.01, B, NONE, 0.288617),
        (0.1, 0.01, AB, NONE, 0.706107),
        (0.1, 0.01, A, 3, 0.497903),
        (0.1, 0.01, AB, 5, 0.640900),
        (1.0, 0.01, AB, NONE, 0.702925),
        (0.1, 0.1, A, NONE, 0.543084),
        (0.1, 0.1, B, 5, 0.234098),
        (0.1, 0.1, AB, NONE, 0.581066),
        (0.1, 0.1, AB, 4, 0.598297),
    ],
)
def test_worked_example(alpha: float, beta: float, members: tuple[int, int], horizon: int, expected: float) -> None:
    rule = at_horizon(tables(example(), GRID, fold="midpoint"), horizon)
    value = utility(rule, [members], Prices.of(alpha, beta, [MEAN_LENGTH])).utility
    assert value == pytest.approx(expected, abs=TABLE_DIGITS)


def test_worked_example_has_its_mean_length() -> None:
    remaining = [[2918.4, 5836.8, np.nan]]
    assert normaliser([[1000, 500, 0]], remaining, [[True, True, False]]) == pytest.approx(MEAN_LENGTH)
    expected = tables(example(), GRID).expected_length[0, :, -1]
    assert expected == pytest.approx(remaining[0][:2])


@pytest.mark.parametrize(
    ("beta", "value", "horizon"),
    [(0.01, 0.706107, NONE), (0.1, 0.598297, 4)],
    ids=["h = 6 ties with none, which is taken", "abandon early"],
)
def test_best_set_of_the_worked_example(beta: float, value: float, horizon: int) -> None:
    chosen = best_set(tables(example(), GRID, fold="midpoint"), Prices.of(0.1, beta, [MEAN_LENGTH]))
    assert chosen.members.tolist() == [[1, 1]]
    assert chosen.horizons.tolist() == [[horizon, horizon]]
    assert chosen.utility == pytest.approx(value, abs=TABLE_DIGITS)


def test_a_horizon_behind_the_last_reward_ties_with_none() -> None:
    rule, prices = tables(example(), GRID, fold="midpoint"), Prices.of(0.1, 0.01, [MEAN_LENGTH])
    six, none = (utility(at_horizon(rule, h), [AB], prices).utility[0] for h in (6, NONE))
    assert abs(six - none) < 1e-12


@pytest.mark.parametrize("fold", ["edge", "midpoint"])
def test_horizons_that_tie_but_for_rounding_go_to_the_longest(fold: str) -> None:
    joint = np.zeros((200, 2, GRID.R, GRID.L))
    joint[..., :4] = np.random.default_rng(0).dirichlet(np.ones(8), (200, 2)).reshape(200, 2, 2, 4)
    chosen = utility(tables(joint, GRID, fold=fold), [AB] * 200, Prices.of(0.1, 0.05, [1000.0] * 200))
    assert {*chosen.horizons.ravel().tolist()} <= {1, 2, 3, NONE}  # from 4 on nothing is folded
    assert NONE in chosen.horizons


def test_nothing_is_worth_nothing_even_where_the_lowest_reward_is_not() -> None:
    grid = BinGrid((0.2, 1.0), GRID.length_edges)
    rule = tables(
        np.repeat(example(), 2, 0), grid, finished=[[False, False], [False, True]], finished_value=[[0, 0], [0, 0.1]]
    )
    value = utility(rule, np.zeros((2, 2)), Prices.of(0.1, 0.01, [MEAN_LENGTH] * 2)).utility
    assert value.tolist() == [0.0, 0.1]


@pytest.mark.parametrize("fold", ["edge", "midpoint"])
@pytest.mark.parametrize("members", [A, B, AB])
@pytest.mark.parametrize("horizon", range(1, NONE + 1))
def test_both_prices_of_the_fold_agree_with_enumeration(fold: str, members: tuple[int, int], horizon: int) -> None:
    rule = at_horizon(tables(example(), GRID, fold=fold), horizon)
    value = utility(rule, [members], Prices.of(0.3, 0.1, [MEAN_LENGTH])).utility[0]
    assert value == pytest.approx(enumerated(example(), members, horizon, fold, 0.3, 0.1), abs=1e-12)


def test_the_edge_is_cheaper_than_the_midpoint_at_every_horizon() -> None:
    edge, middle = (tables(example(), GRID, fold=fold).expected_length for fold in ("edge", "midpoint"))
    assert (edge[..., :-1] <= middle[..., :-1]).all() and (edge[..., 0] < middle[..., 0]).all()
    assert (edge[..., -1] == middle[..., -1]).all()


def test_shared_horizon_equals_the_best_of_all() -> None:
    rule, prices = tables(example(), GRID), Prices.of(0.1, 0.1, [MEAN_LENGTH])
    each = [utility(at_horizon(rule, h), [AB], prices).utility[0] for h in range(1, NONE + 1)]
    chosen = utility(rule, [AB], prices)
    assert chosen.utility[0] == max(each)
    assert (chosen.horizons[0] == 1 + int(np.argmax(each))).all()


def test_finished_samples_count_by_their_own_value_and_cost_nothing() -> None:
    rule = tables(example(), GRID, finished=[[True, False]], finished_value=[[0.65, np.nan]])
    prices = Prices.of(0.1, 0.01, [MEAN_LENGTH])
    chosen = utility(rule, [[[0, 0], [0, 1]]], prices, "none")
    cost = 0.01 / MEAN_LENGTH * 5836.8
    assert chosen.utility[0] == pytest.approx([0.65, 0.65 + 0.3 * 0.35 - cost])
    assert chosen.horizons.tolist() == [[[0, 0], [0, NONE]]]
    with pytest.raises(UserError, match="finished or empty"):
        utility(rule, [[1, 0]], prices)


@pytest.fixture
def exhaustive_sets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ziprc.sampling.policies.search.EXHAUSTIVE_SETS", request.param)


searches = pytest.mark.parametrize("exhaustive_sets", [0, EXHAUSTIVE_SETS], indirect=True)


@searches
def test_a_set_that_is_not_worth_its_cost_is_not_run_unless_it_must(exhaustive_sets: None) -> None:
    rule, prices = tables(example(), GRID), Prices.of(0.1, 100.0, [MEAN_LENGTH])
    free, forced = (best_set(rule, prices, must_run=must) for must in (False, True))
    assert free.members.sum() == 0 and forced.members.tolist() == [[1, 0]]
    assert free.utility[0] == 0 > forced.utility[0]


def test_a_prompt_that_must_run_but_cannot_is_refused() -> None:
    rule = tables(example(), GRID, finished=[[True, True]], finished_value=[[0.1, 0.2]])
    with pytest.raises(UserError, match="prompt 0 must run"):
        best_set(rule, Prices.of(0.1, 0.01, [MEAN_LENGTH]), must_run=True)


@searches
def test_equal_sets_go_to_the_larger(exhaustive_sets: None) -> None:
    sure = np.zeros((1, 2, GRID.R, GRID.L))
    sure[..., 1, 2] = 1.0
    chosen = best_set(tables(sure, GRID), Prices.of(0.0, 0.01, [MEAN_LENGTH]))
    assert chosen.members.tolist() == [[1, 1]]


@searches
def test_copies_of_a_root_equal_that_many_slots(exhaustive_sets: None) -> None:
    joint, prices = example(), Prices.of(0.1, 0.01, [MEAN_LENGTH])
    counted = best_set(tables(joint, GRID), prices, limits=[[1, 4]])
    spelled = best_set(tables(joint[:, [0, 1, 1, 1, 1]], GRID), prices)
    assert counted.utility == pytest.approx(spelled.utility)
    assert counted.members[0, 1] == spelled.members[0, 1:].sum() > 1


def test_the_answer_for_a_prompt_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(3)
    joint = rng.dirichlet(np.full(GRID.size, 0.2), (12, 10)).reshape(12, 10, GRID.R, GRID.L)
    joint[np.arange(10) >= rng.integers(1, 11, (12, 1))] = 0.0
    limits, mean = rng.integers(1, 4, (12, 10)), rng.uniform(2e3, 9e3, 12)
    together = best_set(tables(joint, GRID), Prices.of(0.5, 0.05, mean), limits=limits)
    for p in range(12):
        alone = best_set(tables(joint[[p]], GRID), Prices.of(0.5, 0.05, mean[[p]]), limits=limits[[p]])
        assert (alone.members[0] == together.members[p]).all()
        assert alone.utility[0] == pytest.approx(together.utility[p], abs=1e-12)


def test_initial_count_grows_with_reward_and_falls_with_price() -> None:
    root = tables(example()[:, 1:], GRID)
    dear, cheap, free = (initial_count(root, 8, Prices.of(1.0, beta, [MEAN_LENGTH]))[0] for beta in (3.0, 0.02, 0.0))
    assert 1 == dear < cheap <= free == 8


def test_initial_count_is_the_best_of_all_counts() -> None:
    root, prices = tables(example()[:, :1], GRID), Prices.of(1.0, 0.1, [MEAN_LENGTH])
    chances = 1 - 0.4 ** np.arange(1, 9)
    by_hand = chances - 0.1 / MEAN_LENGTH * 2918.4 * np.arange(1, 9)
    assert initial_count(root, 8, prices, "none") == [1 + np.argmax(by_hand)]


def test_half_precision_joints_are_normalised() -> None:
    joint = (example() * 0.997).astype(np.float16)
    exact, rounded = (utility(tables(q, GRID), [AB], Prices.of(0.1, 0.01, [MEAN_LENGTH])) for q in (example(), joint))
    assert rounded.utility == pytest.approx(exact.utility, abs=1e-3)  # float16 has 11 bits


@pytest.mark.parametrize(
    ("joint", "says"),
    [
        (np.zeros((1, 2, 3, 8)), "shape"),
        (np.full((1, 1, 2, 8), np.nan), "NaN"),
        (np.full((1, 1, 2, 8), -1.0), "negative"),
    ],
)
def test_what_is_no_joint_is_refused(joint: np.ndarray, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tables(joint, GRID)


def test_impossible_prices_and_groups_are_refused() -> None:
    with pytest.raises(UserError, match="alpha"):
        Prices.of(1.5, 0.1, [1.0])
    with pytest.raises(UserError, match="without any sample"):
        normaliser([[1]], [[1]], [[False]])

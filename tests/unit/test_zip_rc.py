"""The published sampling as a policy: what it runs, when it stops, and that it stays inside the rules."""

from __future__ import annotations

import itertools
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling.controller import NONE, Budget, Controller, Decision
from ziprc.sampling.policies.search import initial_count
from ziprc.sampling.policies.utility import Horizons, Prices, tables
from ziprc.sampling.policies.zip_rc import ZipRC
from ziprc.sampling.replay import Played, Pool, pool_orders, replay, track
from ziprc.sampling.score import JointCalibration, joint_summary
from ziprc.sampling.tree import NO_ANSWER, Status, Trees

GRID = BinGrid((0.0, 0.5, 1.0), (0, 4, 8, 16, 40))
PROMPTS, ROLLOUTS, INTERVAL = 20, 8, 3
LONGEST = 30
DEAR = 1e6  # a price at which nothing is worth it
SEEDS = st.integers(0, 2**31)
SETTINGS = [
    {},
    {"horizons": Horizons.NONE},
    {"horizons": Horizons.PER_SAMPLE},
    {"independent": True},
    {"can_pause": False},
    {"k_max": 3},
]


def cells(*entries: tuple[int, int, float]) -> np.ndarray:
    """[C] of (reward bin, length bin, probability)."""
    table = np.zeros((GRID.R, GRID.L), np.float32)
    for reward, length, probability in entries:
        table[reward, length] = probability
    return table.ravel()


def synthetic(seed: int, prompts: int = PROMPTS) -> Pool:
    """Random rollouts with random joints; answer 0 is right, and some rollouts end without any."""
    rng = np.random.default_rng(seed)
    shape = (prompts, ROLLOUTS)
    length = rng.integers(1, LONGEST, shape).astype(np.int32)
    total = int(length.sum())
    finished = rng.random(shape) < 0.9
    answer = np.where(finished & (rng.random(shape) < 0.9), rng.integers(0, 3, shape), NO_ANSWER).astype(np.int32)
    joint = rng.dirichlet(np.full(GRID.size, 0.3), total).astype(np.float32)
    features = track(length.ravel(), np.zeros(total, np.float32), np.zeros(total, np.float32))
    score = (answer == 0).astype(np.float32)
    return Pool(length, finished, answer, score, np.full(prompts, 5, np.int32), joint, features)


def honest(pool: Pool) -> Pool:
    """The same rollouts, where the joint knows how many tokens remain and expects a fair chance."""
    joint = np.zeros((len(pool.joint), GRID.R, GRID.L), np.float32)
    remaining = np.repeat(pool.length.ravel(), pool.length.ravel()) - pool.features[:, 0].astype(int)
    joint[np.arange(len(joint)), :, GRID.length_bin(remaining)] = (0.4, 0.2, 0.4)
    return Pool(**{f.name: getattr(pool, f.name) for f in fields(Pool)} | {"joint": joint.reshape(-1, GRID.size)})


def run(policy: ZipRC, pool: Pool, observe=None, **limits: int) -> Played:
    budget = Budget(**{"branches": ROLLOUTS, "interval": INTERVAL, **limits})
    orders = pool_orders(len(pool.length), ROLLOUTS, 2, 0)
    signals = policy.read(pool.smoothed(1), pool.features)
    return replay(Controller(policy, budget), pool, signals, orders, observe)


def begun(joints: np.ndarray) -> Trees:
    """Trees at the first decision, from joints [P, C] at the prompt."""
    trees = Trees.empty(len(joints), ROLLOUTS, GRID.size)
    trees.status[:, 0], trees.length[:, 0] = Status.RUNNING, 1
    trees.signals[:, 0] = trees.root[:] = joints
    return trees


def later(*branches: tuple[Status, int, np.ndarray], root: np.ndarray) -> Trees:
    """One tree, from (status, length, joint) of its branches; finished ones answer 0."""
    trees = Trees.empty(1, ROLLOUTS, GRID.size)
    trees.root[:] = root
    for slot, (status, length, joint) in enumerate(branches):
        trees.status[0, slot], trees.length[0, slot], trees.signals[0, slot] = status, length, joint
        trees.answer[0, slot] = 0 if status == Status.FINISHED else NO_ANSWER
    return trees


def random_trees(seed: int, prompts: int = 12) -> Trees:
    rng = np.random.default_rng(seed)
    trees = Trees.empty(prompts, ROLLOUTS, GRID.size)
    used = np.arange(ROLLOUTS) < rng.integers(1, ROLLOUTS + 1, (prompts, 1))
    trees.status[used] = rng.choice([Status.RUNNING, Status.PAUSED, Status.FINISHED], used.sum())
    idle = ~trees.running.any(-1)
    trees.status[idle, 0] = Status.RUNNING
    trees.length[used] = rng.integers(1, LONGEST, used.sum())
    trees.signals[used] = rng.dirichlet(np.full(GRID.size, 0.2), used.sum())
    trees.root[:] = rng.dirichlet(np.full(GRID.size, 0.2), prompts)
    trees.answer[trees.finished] = rng.integers(-1, 3, trees.finished.sum())
    return trees


def same(one: Decision, other: Decision) -> bool:
    return all(np.allclose(getattr(one, f.name), getattr(other, f.name)) for f in fields(Decision))


GOOD = cells((2, 1, 1.0))  # right, soon
BAD = cells((0, 1, 1.0))  # wrong, soon
FAIR = cells((0, 1, 0.5), (2, 1, 0.5))


# Settings.


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 1), (1.1, 1), (0.5, -1), (np.nan, 1), (0.5, np.nan), (0, np.inf)])
def test_prices_out_of_range_are_refused_before_anything_runs(alpha: float, beta: float):
    with pytest.raises(UserError, match="alpha"):
        ZipRC(GRID, alpha, beta)


def test_no_samples_at_all_are_refused():
    with pytest.raises(UserError, match="k_max"):
        ZipRC(GRID, 0.5, 0.1, k_max=0)


def test_every_setting_has_its_own_name():
    policies = [ZipRC(GRID, a, b, **kw) for a in (0.1, 1.0) for b in (0.01, 0.1) for kw in SETTINGS]
    policies += [ZipRC(GRID, 1.0, 0.1, can_branch=True), ZipRC(GRID, 1.0, 0.1, calibration=JointCalibration())]
    assert len({p.name for p in policies}) == len(policies)
    assert policies[0].name == "zip-rc@0.1,0.01"


# The first decision.


@pytest.mark.parametrize(("horizons", "independent"), [*((mode, False) for mode in Horizons), (Horizons.SHARED, True)])
def test_the_first_decision_starts_as_many_as_the_initial_count(horizons: Horizons, independent: bool):
    joints = np.random.default_rng(0).dirichlet(np.full(GRID.size, 0.3), 50).astype(np.float32)
    policy = ZipRC(GRID, 0.5, 0.2, horizons=horizons, independent=independent)
    decision = policy.decide(begun(joints), INTERVAL)
    prices = Prices.of(0.5, 0.2, joint_summary(joints, GRID)[1])
    root = tables(joints.reshape(-1, 1, GRID.R, GRID.L), GRID, independent=independent)
    count = initial_count(root, ROLLOUTS, prices, horizons)
    assert len(np.unique(count)) > 2
    assert (1 + decision.start == count).all()
    assert decision.run.sum() == len(joints)


def test_the_tree_and_k_max_both_limit_the_first_decision():
    joints = FAIR[None]
    assert ZipRC(GRID, 0.5, 0.0, k_max=5).decide(begun(joints), INTERVAL).start == 4
    assert ZipRC(GRID, 0.5, 0.0, k_max=50).decide(begun(joints), INTERVAL).start == ROLLOUTS - 1


# Extreme prices.


def test_where_nothing_is_worth_its_price_one_sample_finishes():
    for seed in range(3):
        pool = synthetic(seed)
        played = run(ZipRC(GRID, 0.5, DEAR), pool)
        assert (played.samples == 1).all()
        assert played.trees.finished[:, 0].all()
        assert (played.tokens == pool.length[played.prompt, played.rollout[:, 0]]).all()


def test_where_tokens_are_free_everything_runs_to_its_end():
    pool = synthetic(0)
    played = run(ZipRC(GRID, 0.5, 0.0), pool)
    assert played.trees.finished.all()
    assert (played.tokens == np.tile(pool.length.sum(-1), 2)).all()


# Replays.


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(SETTINGS), st.floats(0, 1), st.sampled_from((0.0, 0.01, 0.1, 1.0)), st.booleans())
def test_every_prompt_is_answered_inside_its_budget(seed: int, kw: dict, alpha: float, beta: float, informed: bool):
    pool = honest(synthetic(seed, 6)) if informed else synthetic(seed, 6)
    limits = {"branches": 4, "tokens": 5 * LONGEST, "latency": 5 * LONGEST}
    played = run(ZipRC(GRID, alpha, beta, **kw), pool, **limits)
    assert (played.tokens <= limits["tokens"]).all() and (played.latency <= limits["latency"]).all()
    assert played.trees.finished.any(-1).all()
    assert ((played.probability >= 0) & (played.probability <= 1 + 1e-6)).all()


@pytest.mark.parametrize("kw", SETTINGS)
def test_a_replay_pays_for_what_it_revealed_and_for_no_more(kw: dict):
    pool = synthetic(1)
    played = run(ZipRC(GRID, 0.5, 0.05, **kw), pool)
    length = pool.length[played.prompt[:, None], played.rollout]
    assert (played.tokens == played.trees.length.sum(-1)).all()
    assert (played.trees.length <= length).all()
    assert (played.trees.length[played.trees.finished] == length[played.trees.finished]).all()
    assert (played.samples == played.trees.used.sum(-1)).all() and played.samples.max() <= kw.get("k_max", ROLLOUTS)
    assert (played.latency >= played.trees.length.max(-1)).all() and (played.latency <= played.tokens).all()


def test_without_pausing_what_stops_never_goes_on():
    resumed = {True: 0, False: 0}
    for can_pause in resumed:

        def observe(rows, trees: Trees, decision: Decision, can_pause=can_pause):
            resumed[can_pause] += (decision.run & (trees.status == Status.PAUSED)).sum()

        for seed in range(3):
            run(ZipRC(GRID, 1.0, 0.1, can_pause=can_pause), synthetic(seed), observe)
    assert resumed[False] == 0 and resumed[True] > 0


def test_dearer_tokens_are_used_less():
    pool = honest(synthetic(2))
    tokens = [run(ZipRC(GRID, 1.0, beta), pool).tokens.mean() for beta in (0.01, 0.1, 0.2, 0.5)]
    assert all(a > b for a, b in itertools.pairwise(tokens))


# Later decisions.


def test_a_paused_sample_goes_on_when_the_others_ended_badly():
    policy = ZipRC(GRID, 1.0, 0.1, k_max=2)
    waiting = (Status.PAUSED, 5, FAIR)
    ahead = policy.decide(later(waiting, (Status.RUNNING, 5, GOOD), root=FAIR), INTERVAL)
    assert ahead.run[0, :2].tolist() == [False, True]
    well = policy.decide(later(waiting, (Status.FINISHED, 9, GOOD), root=FAIR), INTERVAL)
    assert not well.going[0]
    badly = policy.decide(later(waiting, (Status.FINISHED, 9, BAD), root=FAIR), INTERVAL)
    assert badly.run[0, :2].tolist() == [True, False]


def test_a_new_sample_starts_when_all_others_ended_badly():
    ended = (Status.FINISHED, 9, BAD)
    decision = ZipRC(GRID, 1.0, 0.1, k_max=3).decide(later(ended, ended, root=FAIR), INTERVAL)
    assert decision.start[0] == 1
    assert not ZipRC(GRID, 1.0, 0.1, k_max=2).decide(later(ended, ended, root=FAIR), INTERVAL).going[0]


def test_a_sample_without_an_answer_is_worth_nothing():
    trees = later((Status.FINISHED, 9, GOOD), root=FAIR)
    assert not ZipRC(GRID, 1.0, 0.1).decide(trees, INTERVAL).going[0]
    trees.answer[0, 0] = NO_ANSWER
    assert ZipRC(GRID, 1.0, 0.1).decide(trees, INTERVAL).going[0]
    assert ZipRC(GRID, 1.0, 0.1).choose(trees).probability == 0


def test_what_must_run_is_a_sample_already_begun():
    trees = later((Status.RUNNING, 9, cells((0, 3, 1.0))), (Status.PAUSED, 9, cells((0, 2, 1.0))), root=FAIR)
    decision = ZipRC(GRID, 1.0, DEAR).decide(trees, INTERVAL)
    assert decision.run[0, :2].tolist() == [False, True] and decision.start[0] == 0


def test_the_strongest_prefix_is_branched_from_where_that_is_worth_it():
    strong = cells((0, 1, 0.2), (2, 1, 0.8))
    trees = later((Status.PAUSED, 7, FAIR), (Status.RUNNING, 9, strong), root=BAD)
    decision = ZipRC(GRID, 0.0, 0.1, can_branch=True).decide(trees, INTERVAL)
    assert decision.branch[0] == 1 and decision.branch_at[0] == 9 and decision.run[0, 1]
    alone = ZipRC(GRID, 1.0, 1.0, can_branch=True).decide(trees, INTERVAL)
    assert alone.branch[0] == NONE and alone.run[0, :2].tolist() == [False, True]
    assert ZipRC(GRID, 0.0, 0.1).decide(trees, INTERVAL).branch[0] == NONE
    assert ZipRC(GRID, 0.0, 0.1, k_max=2, can_branch=True).decide(trees, INTERVAL).branch[0] == NONE


def test_the_last_free_slot_goes_to_the_better_of_a_copy_and_a_new_sample():
    policy = ZipRC(GRID, 0.0, 0.01, k_max=2, can_branch=True)
    for root, start in ((cells((0, 1, 0.1), (2, 1, 0.9)), 1), (cells((0, 1, 0.9), (2, 1, 0.1)), 0)):
        decision = policy.decide(later((Status.RUNNING, 9, FAIR), root=root), INTERVAL)
        assert decision.run[0, 0] and decision.start[0] == start and (decision.branch[0] == NONE) == bool(start)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(SETTINGS), st.booleans())
def test_a_prompts_decision_does_not_depend_on_its_neighbours(seed: int, kw: dict, can_branch: bool):
    trees = random_trees(seed)
    policy = ZipRC(GRID, 0.3, 0.1, can_branch=can_branch, **kw)
    together = policy.decide(trees, INTERVAL)
    for row in range(len(trees)):
        rows = np.array([row])
        part = Decision(**{f.name: getattr(together, f.name)[rows] for f in fields(Decision)})
        assert same(policy.decide(trees.take(rows), INTERVAL), part)


def test_chunks_of_prompts_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    trees, policy = random_trees(0), ZipRC(GRID, 0.3, 0.1)
    whole = policy.decide(trees, INTERVAL)
    monkeypatch.setattr("ziprc.sampling.policies.zip_rc.PROMPTS_AT_ONCE", 5)
    assert same(policy.decide(trees, INTERVAL), whole)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_with_a_product_and_no_horizon_the_joint_is_its_marginals(seed: int):
    rng, trees = np.random.default_rng(seed), random_trees(seed)

    def product(shape: tuple[int, ...]) -> np.ndarray:
        reward, length = rng.dirichlet(np.ones(GRID.R), shape), rng.dirichlet(np.ones(GRID.L), shape)
        return (reward[..., None] * length[..., None, :]).reshape(*shape, GRID.size)

    trees.signals[:] = product(trees.status.shape)
    trees.root[:] = product((len(trees),))
    joint, marginals = (ZipRC(GRID, 0.3, 0.1, horizons=Horizons.NONE, independent=i) for i in (False, True))
    assert same(joint.decide(trees, INTERVAL), marginals.decide(trees, INTERVAL))


def test_only_the_unfinished_run_and_k_max_is_kept():
    for seed in range(20):
        trees = random_trees(seed)
        decision = ZipRC(GRID, 0.3, 0.05, k_max=6, can_branch=True).decide(trees, INTERVAL)
        assert not (decision.run & ~trees.unfinished).any()
        after = trees.used.sum(-1) + decision.start + (decision.branch != NONE)
        assert (after <= np.maximum(6, trees.used.sum(-1))).all()
        assert (decision.going | trees.finished.any(-1)).all()


# The answer.


def test_the_answer_has_the_highest_value_whatever_the_votes():
    half = cells((1, 0, 1.0))
    trees = later(*[(Status.FINISHED, 5, q) for q in (half, GOOD, half, half)], root=FAIR)
    trees.answer[0, :4] = [1, 2, 1, 1]
    chosen = ZipRC(GRID, 1.0, 0.1).choose(trees)
    assert (chosen.slot, chosen.probability) == (1, 1.0)


def test_an_answer_is_preferred_to_none_whatever_the_value():
    trees = later((Status.FINISHED, 5, GOOD), (Status.FINISHED, 5, BAD), root=FAIR)
    trees.answer[0, 0] = NO_ANSWER
    assert ZipRC(GRID, 1.0, 0.1).choose(trees).slot == 1


# Calibration.


def test_calibration_finds_the_numbers_that_made_the_scores():
    joint = np.random.default_rng(0).dirichlet(np.full(GRID.size, 0.5), 3000)
    truth = JointCalibration(1.7, -0.6)
    score = joint_summary(truth.apply(joint, GRID), GRID)[0]  # the likelihood of expected scores peaks at the truth
    found = JointCalibration.fit(joint, score, GRID)
    assert (found.temperature, found.tilt) == pytest.approx((1.7, -0.6), abs=0.01)
    drawn = np.random.default_rng(1).random(len(score)) < score
    found = JointCalibration.fit(joint.astype(np.float16), drawn, GRID)
    assert (found.temperature, found.tilt) == pytest.approx((1.7, -0.6), abs=0.4)  # 3,000 coin flips


def test_calibration_of_one_and_zero_changes_nothing():
    joint = np.random.default_rng(0).dirichlet(np.full(GRID.size, 0.1), 50).astype(np.float32)
    joint[:, 3] = 0
    joint /= joint.sum(-1, keepdims=True)
    assert np.allclose(JointCalibration().apply(joint, GRID), joint, atol=1e-6)


def test_calibration_moves_rewards_the_way_it_says():
    joint = np.random.default_rng(0).dirichlet(np.full(GRID.size, 0.3), 50)
    before = joint_summary(joint, GRID)[0]
    up, flat = JointCalibration(1.0, 1.0).apply(joint, GRID), JointCalibration(1e6, 0.0).apply(joint, GRID)
    assert (joint_summary(up, GRID)[0] > before).all()
    assert np.allclose(flat, 1 / GRID.size, atol=1e-3)
    assert np.allclose(up.sum(-1), 1, atol=1e-6)


def test_calibration_is_read_by_the_policy():
    found = JointCalibration(1.3, 0.2)
    pool = synthetic(0)
    policy = ZipRC(GRID, 0.5, 0.1, calibration=found)
    assert np.array_equal(policy.read(pool.joint, pool.features), found.apply(pool.joint, GRID))
    assert np.array_equal(ZipRC(GRID, 0.5, 0.1).read(pool.joint, pool.features), pool.joint)


@pytest.mark.parametrize("score", [[0.5], [0.5, 1.5], [0.5, np.nan]])
def test_scores_that_are_none_are_refused(score: list[float]):
    with pytest.raises(UserError, match="scores"):
        JointCalibration.fit(np.full((2, GRID.size), 1 / GRID.size), np.array(score), GRID)


def test_impossible_calibrations_are_refused():
    for temperature, tilt in ((0.0, 0.0), (-1.0, 0.0), (1.0, np.nan)):
        with pytest.raises(UserError, match="temperature"):
            JointCalibration(temperature, tilt)


def test_play_reads_through_the_policy():
    pool = synthetic(3)
    policy = ZipRC(GRID, 0.5, 0.05, calibration=JointCalibration(1.3, 0.2))
    orders = pool_orders(PROMPTS, ROLLOUTS, 2, 0)
    played = replay(
        Controller(policy, Budget(branches=ROLLOUTS, interval=INTERVAL)),
        pool,
        policy.read(pool.smoothed(1), pool.features),
        orders,
    )
    assert np.array_equal(played.tokens, run(policy, pool).tokens)

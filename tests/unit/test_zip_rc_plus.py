"""zip-rc-plus on trees that are made by hand: what it runs, pauses, resumes, branches and stops, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import logit

from tests.unit.test_sampling import GRID, PROMPTS, ROLLOUTS, planted
from ziprc.errors import UserError
from ziprc.sampling.controller import NONE, Budget, Controller, Decision
from ziprc.sampling.fitting import Calibration, Fitted
from ziprc.sampling.policies.zip_rc_plus import (
    FINISHED,
    FORK_STRENGTH,
    ON_THE_WAY,
    REMAINING,
    VALUE,
    FusedThreshold,
    ZipRCPlus,
)
from ziprc.sampling.replay import Played, pool_orders, replay
from ziprc.sampling.score import INPUTS, Logistic, Stages, joint_summary
from ziprc.sampling.selection import VoteModel
from ziprc.sampling.tree import ROOT, Status, Trees

SLOTS, STRENGTH, PRICE = 5, 2.0, 0.005
FLAT = Logistic((0.0,), (1.0,), (0.0, 0.0), 0.0)  # not looked at: signals are written by hand
BY_HAND = Calibration(Stages((FLAT,)), FLAT, VoteModel(), STRENGTH)
ROUNDING = 1e-5  # signals are float32


@dataclass(frozen=True)
class Branch:
    """`right` is the probability that its own evidence gives it."""

    status: Status
    right: float
    remaining: float = 10.0
    length: int = 10
    answer: int = -1
    parent: int = ROOT
    fork: int = 0
    spot: int = 0
    spot_right: float = 0.5
    spot_remaining: float = 10.0


def running(right: float, remaining: float = 10.0, **more: float) -> Branch:
    return Branch(Status.RUNNING, right, remaining, **more)


def paused(right: float, remaining: float = 10.0, **more: float) -> Branch:
    return Branch(Status.PAUSED, right, remaining, **more)


def finished(right: float, answer: int = 0, **more: float) -> Branch:
    return Branch(Status.FINISHED, right, answer=answer, **more)


def trees_of(
    branches: Sequence[Branch], prior: float = 0.5, remaining: float = 20.0, slots: int = SLOTS, branching: bool = False
) -> Trees:
    """One prompt; `prior` and `remaining` are what its own reading says."""
    trees = Trees.empty(1, slots, 4, branching)
    trees.root[0, [ON_THE_WAY, REMAINING]] = logit(prior), remaining
    for slot, own in enumerate(branches):
        for name in ("status", "length", "answer", "parent", "fork"):
            getattr(trees, name)[0, slot] = getattr(own, name)
        trees.signals[0, slot, [ON_THE_WAY, FINISHED, REMAINING]] = logit(own.right), logit(own.right), own.remaining
        if branching:
            trees.spot[0, slot] = own.spot
            trees.spot_signals[0, slot, [ON_THE_WAY, REMAINING]] = logit(own.spot_right), own.spot_remaining
    return trees


def plus(price: float = PRICE, **options: object) -> ZipRCPlus:
    return ZipRCPlus(BY_HAND, GRID, price, **options)  # type: ignore[arg-type]


def decided(policy: ZipRCPlus, *branches: Branch, **prompt: float) -> Decision:
    return policy.decide(trees_of(branches, branching=policy.can_branch, **prompt), 8)  # type: ignore[arg-type]


def ran(decision: Decision) -> list[int]:
    return np.flatnonzero(decision.run[0]).tolist()


# One decision.


def test_the_first_sample_goes_on():
    assert ran(decided(plus(), running(0.5, 19))) == [0]


def test_a_doomed_branch_is_paused_for_a_new_one():
    decision = decided(plus(), running(0.02, 10), remaining=12)
    assert ran(decision) == [] and decision.start[0] == 1


def test_a_poor_branch_goes_on_when_a_new_one_costs_too_much():
    decision = decided(plus(), running(0.02, 10), remaining=400)
    assert ran(decision) == [0] and decision.start[0] == 0


def test_a_paused_branch_is_resumed_when_it_becomes_the_best():
    assert ran(decided(plus(), paused(0.4, 5), running(0.05, 30), prior=0.4, remaining=40)) == [0]
    assert ran(decided(plus(), paused(0.4, 5), running(0.39, 4), prior=0.4, remaining=40)) == [1]


def test_what_cannot_be_paused_is_not_resumed():
    assert ran(decided(plus(can_pause=False), paused(0.4, 5), running(0.05, 30), prior=0.4, remaining=400)) == [1]
    decision = decided(plus(can_pause=False), paused(0.9, 1), finished(0.3))
    assert ran(decision) == [] and decision.start[0] == 1


def test_a_confident_answer_stops_the_prompt():
    assert not decided(plus(), finished(0.99), paused(0.5, 10)).going[0]
    assert decided(plus(), finished(0.4), paused(0.5, 10)).going[0]


def test_agreement_makes_an_answer_confident():
    """At log odds 0 one vote is worth ½, four equal ones ⁴⁄₅, two against two 1 - ⅖: the doubt decides."""
    price = 0.5 * 0.1 / 10  # of a branch that has one chance in ten, in doubt
    rest = paused(0.1, 10)
    agreed = decided(plus(price), *[finished(0.5)] * 4, rest)
    split = decided(plus(price), *[finished(0.5, answer=i % 4) for i in range(2)], rest)
    assert agreed.utility[0] < split.utility[0]


@pytest.mark.parametrize("price", [1.0, 1e9])
def test_no_price_is_high_enough_to_leave_a_prompt_unanswered(price: float):
    decision = decided(plus(price), paused(0.2), running(0.01), paused(0.3))
    assert ran(decision) == [2] and not decision.start[0], "the best of what is there"
    assert not decided(plus(price), paused(0.2), finished(0.01)).going[0]


def test_a_failure_makes_the_next_sample_less_likely_to_be_right():
    """κ·θ0 / (κ + n) after n failures."""
    for failures in range(4):
        decision = decided(plus(), *[finished(0.2, answer=-1)] * failures, running(0.5), remaining=1e6)
        now = decided(plus(), *[finished(0.2, answer=-1)] * failures, prior=0.5, remaining=20)
        assert now.utility[0] == pytest.approx(0.5 * STRENGTH / (STRENGTH + failures) / 20, rel=ROUNDING)
        assert decision.utility[0] <= 0.5 / 10 * (1 + ROUNDING)


def test_without_the_latent_difficulty_failures_say_nothing():
    for failures in range(4):
        now = decided(plus(latent=False), *[finished(0.2, answer=-1)] * failures, prior=0.5, remaining=20)
        assert now.utility[0] == pytest.approx(0.5 / 20, rel=ROUNDING)


def test_a_branch_that_does_worse_than_its_prompt_is_part_of_a_failure():
    """What it has lost of the prior counts: here four fifths."""
    now = decided(plus(), paused(0.1, 1e6), prior=0.5, remaining=20)
    assert now.utility[0] == pytest.approx(0.5 / (1 + 0.8 / STRENGTH) / 20, rel=ROUNDING)
    better = decided(plus(), paused(0.9, 1e6), prior=0.5, remaining=20)
    assert better.utility[0] == pytest.approx(0.5 / 20, rel=ROUNDING), "success is no evidence against failures"


def test_other_failures_shift_the_odds_of_a_branch_but_its_own_do_not():
    alone = decided(plus(), running(0.3, 10), remaining=1e6)
    assert alone.utility[0] == pytest.approx(0.3 / 10, rel=ROUNDING)
    other = 0.5 * STRENGTH / (STRENGTH + 1)
    odds = 0.3 / 0.7 * other / (1 - other)  # the prior's own odds are one
    after = decided(plus(), running(0.3, 10), finished(0.5, answer=-1), remaining=1e6)
    assert after.utility[0] == pytest.approx(odds / (1 + odds) / 10, rel=ROUNDING)


@pytest.mark.parametrize("log_odds", [-5.0, 5.0])
def test_without_failures_a_branch_has_its_own_odds(log_odds: float):
    prior = 1 / (1 + np.exp(-log_odds))
    now = decided(plus(), running(prior, 10), prior=prior, remaining=1e6)
    assert now.utility[0] == pytest.approx(prior / 10, rel=1e-3)


@pytest.mark.parametrize("log_odds", [-9.0, 9.0])
def test_without_failures_a_branch_of_an_extreme_prompt_has_its_own_odds(log_odds: float):
    prior = 1 / (1 + np.exp(-log_odds))
    own = 1 / (1 + np.exp(-log_odds / 9))
    now = decided(plus(), running(own, 10), prior=prior, remaining=1e6)
    assert now.utility[0] == pytest.approx(own / 10, rel=1e-3)


def test_no_branch_is_cheaper_than_a_token():
    assert decided(plus(), running(0.5, 0.01)).utility[0] == pytest.approx(0.5, rel=ROUNDING)


# Width.


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_width_is_how_much_runs_at_once(width: int):
    decision = decided(plus(1e-9, width=width), running(0.3), paused(0.3), slots=9)
    assert len(ran(decision)) + decision.start[0] == width


def test_a_second_branch_is_worth_the_doubt_that_the_first_leaves():
    """½ right in 10 tokens is worth .05 a token, and half of it when the other is expected to succeed with ½."""
    both = [running(0.5, 10), running(0.5, 10)]
    assert len(ran(decided(plus(0.026, width=2), *both, remaining=1e6))) == 1
    assert len(ran(decided(plus(0.024, width=2), *both, remaining=1e6))) == 2


def test_new_samples_are_no_more_than_the_free_slots():
    assert decided(plus(1e-9, width=9), finished(0.1), slots=3).start[0] == 2
    assert not decided(plus(1e-9, width=9), finished(0.1), finished(0.1), slots=2).going[0]


# Branching.

FORK = {"spot": 6, "spot_right": 0.9, "spot_remaining": 5.0}


@pytest.mark.parametrize(
    ("fork", "spot", "possible"),
    [(0, 0, False), (0, 1, True), (3, 3, False), (3, 4, True), (0, 9, True), (0, 10, False)],
)
def test_a_branch_may_fork_strictly_inside_of_its_own_tokens(fork: int, spot: int, possible: bool):
    own = running(0.02, 10, **(FORK | {"spot": spot, "fork": fork, "parent": 1 if fork else ROOT}))
    decision = decided(plus(can_branch=True), own, finished(0.02))
    assert (decision.branch[0] == 0) == possible
    if possible:
        assert decision.branch_at[0] == spot and not decision.start[0] and ran(decision) == []


def test_only_a_policy_that_can_branches():
    assert decided(plus(), running(0.02, 10, **FORK)).branch[0] == NONE


def test_a_fork_needs_a_free_slot():
    pair = running(0.3, 10, **FORK), finished(0.02)
    assert decided(plus(can_branch=True), *pair, slots=3).branch[0] == 0
    assert decided(plus(can_branch=True), *pair, slots=2).branch[0] == NONE


def test_a_finished_branch_can_be_forked_before_its_slip():
    decision = decided(plus(can_branch=True), finished(0.02, **FORK))
    assert (decision.branch[0], decision.branch_at[0]) == (0, 6)


def test_at_most_one_fork_in_a_decision():
    decision = decided(plus(1e-9, width=3, can_branch=True), finished(0.1, **FORK), finished(0.1, **FORK), slots=9)
    assert decision.branch[0] in (0, 1) and decision.start[0] == 2


def test_a_fork_that_was_tried_counts_less():
    """The parent went on from the spot itself. Nobody is finished or below the prior, so nothing else speaks."""
    first = running(0.5, 1e6, **FORK)
    tried = running(0.5, 1e6, length=8, parent=0, fork=6)
    before = decided(plus(can_branch=True), first, remaining=1e6)
    after = decided(plus(can_branch=True), first, tried, remaining=1e6)
    assert before.utility[0] == pytest.approx(0.9 / 5 * FORK_STRENGTH / (FORK_STRENGTH + 1), rel=ROUNDING)
    assert after.utility[0] == pytest.approx(0.9 / 5 * FORK_STRENGTH / (FORK_STRENGTH + 2), rel=ROUNDING)


def test_a_fork_and_new_samples_share_the_free_slots():
    own = finished(0.1, **(FORK | {"spot_right": 0.2, "spot_remaining": 30.0}))
    decision = decided(plus(1e-9, width=3, can_branch=True), own, remaining=10, slots=2)
    assert decision.start[0] + (decision.branch[0] != NONE) <= 1


# The answer.


def test_the_answer_is_the_likeliest_one_with_its_probability():
    trees = trees_of([finished(0.5, 0), finished(0.7, 1), finished(0.5, 0), running(0.99)])
    choice = plus().choose(trees)
    odds = {0: 2 * 1.0, 1: 0.7 / 0.3}
    assert choice.slot[0] == 1
    assert choice.probability[0] == pytest.approx(odds[1] / (1 + sum(odds.values())), rel=ROUNDING)


def test_a_prompt_whose_samples_have_no_answer_gives_the_first_finished_with_probability_zero():
    choice = plus().choose(trees_of([paused(0.9), finished(0.9, -1), finished(0.95, -1)]))
    assert (choice.slot[0], choice.probability[0]) == (1, 0.0)


def test_people_are_told_the_odds_of_the_stage():
    trees = trees_of([running(0.3, 7), finished(0.8)])
    trees.signals[0, 1, ON_THE_WAY] = -9
    value, remaining = plus().expectations(trees)
    assert value[0, :2].tolist() == pytest.approx([0.3, 0.8]) and remaining[0, :2].tolist() == [7, 0]


@pytest.mark.parametrize(("price", "width"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (0.1, 0)])
def test_settings_without_meaning_are_refused(price: float, width: int):
    with pytest.raises(UserError, match="price must be above 0 and width at least 1"):
        plus(price, width=width)


def test_names_tell_the_price():
    assert plus(0.0123).name == "zip-rc-plus@0.012" and plus(0.5, label="other").name == "other@0.5"


# Whole episodes.

POOL = planted(5)
FITTED = Fitted.fit(planted(6, prompts=200), GRID, 0)
ORDERS = pool_orders(PROMPTS, ROLLOUTS, 1, 0)


def play(price: float, **options: object) -> Played:
    policy = ZipRCPlus(FITTED.fused, GRID, price, **options)  # type: ignore[arg-type]
    controller = Controller(policy, Budget(branches=ROLLOUTS, interval=3))
    return replay(controller, POOL, policy.read(POOL.joint, POOL.features), ORDERS)


def test_signals_are_two_log_odds_and_two_expectations():
    own = FITTED.fused
    found = ZipRCPlus(own, GRID, 0.01).read(POOL.joint, POOL.features)
    x, tokens = own.inputs(POOL.joint, POOL.features, GRID), POOL.features[:, 0]
    reward, remaining = joint_summary(POOL.joint, GRID)
    assert x.shape == (len(found), len(INPUTS))
    assert np.allclose(found[:, ON_THE_WAY], own.on_the_way.log_odds(x, tokens), atol=ROUNDING)
    assert np.allclose(found[:, FINISHED], own.finished.log_odds(x), atol=ROUNDING)
    assert np.allclose(found[:, REMAINING], remaining) and np.allclose(found[:, VALUE], reward)


def test_at_a_high_price_one_sample_runs_to_its_end():
    played = play(1e9)
    order = ORDERS.reshape(-1, ROLLOUTS)
    assert (played.samples == 1).all() and (played.tokens == POOL.length[played.prompt, order[:, 0]]).all()


def test_at_no_price_everything_runs_to_its_end():
    played = play(1e-30)
    assert played.trees.finished.all() and (played.tokens == POOL.length.sum(-1)).all()


def test_less_is_spent_at_a_higher_price():
    spent = [play(price).tokens.sum() for price in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert spent == sorted(spent, reverse=True) and len(set(spent)) == 4


def test_a_wide_policy_is_faster_and_spends_more():
    narrow, wide = play(0.005), play(0.005, width=4)
    assert wide.latency.mean() < narrow.latency.mean() and wide.tokens.mean() > narrow.tokens.mean()


def test_what_it_knows_pays():
    """Against random choices at the same cost it could only tie: here the joint foretells, so it must be better."""
    single, adaptive = play(1e9), play(0.005)
    assert adaptive.score.mean() > single.score.mean() + 0.1


def threshold(branches: Sequence[Branch], level: float, most: int) -> Decision:
    return FusedThreshold(BY_HAND, GRID, level, most).decide(trees_of(branches), 8)


def test_the_threshold_ablation_samples_one_by_one_until_an_answer_is_likely_enough():
    assert threshold([running(0.1)], 0.7, 4).run[0, 0] and threshold([running(0.1)], 0.7, 4).start[0] == 0
    assert threshold([finished(0.3)], 0.7, 4).start[0] == 1
    assert not threshold([finished(0.95)], 0.7, 4).going[0]


def test_the_threshold_ablation_gives_up_after_its_most_samples():
    assert threshold([finished(0.3)], 0.7, 2).going[0]
    assert not threshold([finished(0.3), finished(0.2, answer=1)], 0.7, 2).going[0]

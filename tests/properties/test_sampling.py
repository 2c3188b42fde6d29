"""Samplers against plain Python: features, budgets, votes and decisions on random trees."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from tests.unit.test_sampling import GRID, Dice, planted
from tests.unit.test_zip_rc_plus import BY_HAND
from ziprc.sampling import features
from ziprc.sampling import replay as replay_module
from ziprc.sampling.controller import NONE, Budget, Controller, Decision, apply, keep_best
from ziprc.sampling.policies.zip_rc_plus import FORK_STRENGTH, ZipRCPlus
from ziprc.sampling.replay import pool_orders, replay, track
from ziprc.sampling.selection import VoteModel
from ziprc.sampling.tree import NO_ANSWER, ROOT, Status, Trees

FLOAT32 = 2e-5  # sums of some dozen float32 numbers up to ten in size
SLOTS = 5
seeds = st.integers(0, 2**32 - 1)


# Features.

log_probs = st.lists(st.floats(-10, 0, width=16), min_size=0, max_size=40)
entropies = st.lists(st.floats(0, 6, width=16), min_size=41, max_size=41)


def formulas(log_prob: np.ndarray, entropy: np.ndarray) -> np.ndarray:
    """Features after all readings; `log_prob` of the tokens, one fewer than readings."""
    j = len(log_prob)
    window = [
        sum(features.DECAY * (1 - features.DECAY) ** (n - i) * log_prob[i] for i in range(n + 1)) for n in range(j)
    ]
    return np.array(
        [
            j,
            log_prob.mean() if j else 0.0,
            min(log_prob.min(initial=0.0), 0.0),
            window[-1] if j else 0.0,
            min([0.0, *window]),
            entropy.mean(),
            entropy.max(),
            log_prob.argmin() if j and log_prob.min() < 0 else 0,
        ]
    )


@settings(deadline=None)
@given(tokens=log_probs, entropy=entropies)
def test_features_token_by_token_are_those_of_the_whole_sequence(tokens: list[float], entropy: list[float]):
    log_prob, seen = np.array([0.0, *tokens], np.float32), features.fresh(1)
    said = np.array(entropy[: len(log_prob)], np.float32)
    for j in range(len(log_prob)):
        seen = features.update(seen, log_prob[j : j + 1], said[j : j + 1])
        assert seen[0, features.TOKENS] == j
    assert np.allclose(seen[0], formulas(log_prob[1:].astype(float), said.astype(float)), atol=FLOAT32)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), seed=seeds)
def test_tracking_many_rollouts_is_updating_each(lengths: list[int], seed: int):
    rng = np.random.default_rng(seed)
    log_prob, entropy = (-rng.exponential(1, sum(lengths))).astype(np.float32), rng.random(sum(lengths), np.float32)
    found, row = track(np.array(lengths, np.int32), log_prob, entropy), 0
    for length in lengths:
        seen = features.fresh(1)
        for _ in range(length):
            seen = features.update(seen, log_prob[row : row + 1], entropy[row : row + 1])
            assert (found[row] == seen[0]).all()
            row += 1


# Pools.


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), window=st.integers(1, 30), at_once=st.integers(1, 7))
def test_smoothing_is_causal_and_stays_inside_of_each_rollout(seed: int, window: int, at_once: int):
    pool = planted(seed, prompts=3, rollouts=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_module, "ROLLOUTS_AT_ONCE", at_once)
        found = pool.smoothed(window)
    for first, length in zip(pool.first.ravel(), pool.length.ravel(), strict=True):
        own = pool.joint[first : first + length]
        for j in range(length):
            assert np.allclose(found[first + j], own[max(0, j + 1 - window) : j + 1].mean(0), atol=1e-6)


# Controller.


@settings(deadline=None)
@given(seed=seeds, slots=st.integers(1, 8))
def test_keeping_the_best_is_sorting(seed: int, slots: int):
    rng = np.random.default_rng(seed)
    wanted, priority = rng.random((4, slots)) < 0.6, rng.integers(0, 3, (4, slots)).astype(float)
    room = rng.integers(0, slots + 2, 4)
    for found, mask, rank, count in zip(keep_best(wanted, priority, room), wanted, priority, room, strict=True):
        best = sorted(np.flatnonzero(mask), key=lambda s, rank=rank: (-rank[s], s))[:count]
        assert np.flatnonzero(found).tolist() == sorted(best)


def random_trees(rng: np.random.Generator, prompts: int, branching: bool = False) -> Trees:
    """Whatever can come up: used slots first, answers of finished branches only, forks of earlier slots."""
    trees = Trees.empty(prompts, SLOTS, 4, branching)
    used = np.arange(SLOTS) < rng.integers(1, SLOTS + 1, prompts)[:, None]
    trees.status[:] = np.where(used, rng.choice([Status.RUNNING, Status.PAUSED, Status.FINISHED], used.shape), 0)
    trees.answer[:] = np.where(trees.finished, rng.integers(NO_ANSWER, 3, used.shape), NO_ANSWER)
    forked = used & (rng.random(used.shape) < 0.4) & (np.arange(SLOTS) > 0) & branching
    trees.parent[:] = np.where(forked, rng.integers(0, np.maximum(np.arange(SLOTS), 1), used.shape), ROOT)
    trees.fork[:] = np.where(forked, rng.integers(0, 9, used.shape), 0)
    trees.length[:] = np.where(used, trees.fork + rng.integers(1, 30, used.shape), 0)
    trees.latency[:] = rng.integers(1, 60, prompts)
    trees.signals[..., :2] = np.where(used[..., None], rng.normal(0, 2, (*used.shape, 2)), 0)
    trees.signals[..., 2] = np.where(used, rng.uniform(0.5, 40, used.shape), 0)
    trees.root[:, 0], trees.root[:, 2] = rng.normal(0, 1.5, prompts), rng.uniform(1, 40, prompts)
    if branching:
        trees.spot[:] = np.where(used, rng.integers(0, 30, used.shape), 0)
        trees.spot_signals[..., 0], trees.spot_signals[..., 2] = (
            rng.normal(0, 2, used.shape),
            rng.uniform(1, 40, used.shape),
        )
    return trees


@settings(deadline=None)
@given(seed=seeds, interval=st.integers(1, 9), tokens=st.integers(-9, 60), latency=st.integers(-9, 30))
def test_no_decision_leaves_the_budget(seed: int, interval: int, tokens: int, latency: int):
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, 6)
    spent, late = int(trees.spent.max()), int(trees.latency.max())  # nobody has left the budget so far
    budget = Budget(SLOTS, max(spent, interval + 1, spent + tokens), max(late, interval + 1, late + latency), interval)
    before = trees.take(np.arange(6))

    class Greedy(Dice):
        def decide(self, trees: Trees, interval: int) -> Decision:
            out = super().decide(trees, interval)
            slot = rng.integers(0, trees.used.sum(-1))
            return replace(out, branch=np.where(rng.random(6) < 0.5, slot, NONE), branch_at=np.zeros(6, np.int64))

    decision = Controller(Greedy(), budget).decide(trees)
    assert not (decision.run & ~trees.unfinished).any()
    done = apply(decision, trees)
    new = (done.started | done.branched).sum(-1)
    assert (new == decision.start + (decision.branch != NONE)).all(), "what is wished for has its slots"
    running = trees.running.sum(-1)
    assert (running == decision.run.sum(-1) + new).all()
    going = running > 0
    assert (before.spent + running * interval <= budget.tokens)[going].all()
    assert (before.latency + interval <= budget.latency)[going].all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    interval=st.integers(1, 9),
    branches=st.integers(1, 6),
    tokens=st.integers(1, 80),
    latency=st.integers(1, 50),
)
def test_budgets_are_hard_and_every_prompt_is_answered(
    seed: int, interval: int, branches: int, tokens: int, latency: int
):
    pool = planted(seed, prompts=4, rollouts=5)
    budget = Budget(branches, interval + tokens, interval + latency, interval)
    signals = np.arange(len(pool.joint), dtype=np.float32)[:, None]
    orders = pool_orders(4, 5, 2, seed)
    controller = Controller(Dice(seed, rate=0.9), budget)
    played = replay(controller, pool, signals, orders)
    assert (played.tokens <= budget.tokens).all() and (played.latency <= budget.latency).all()
    assert (played.samples <= branches).all() and (played.tokens == played.trees.length.sum(-1)).all()
    choice = controller.choose(played.trees)
    used = np.take_along_axis(played.trees.used, choice.slot[:, None], 1)[:, 0]
    ended = np.take_along_axis(played.trees.finished, choice.slot[:, None], 1)[:, 0]
    assert used.all() and (ended == played.trees.finished.any(-1)).all()
    assert (played.probability == np.where(ended, 0.5, 0.0)).all() and not played.score[~ended].any()


# Votes.


def plain_votes(model: VoteModel, trees: Trees, log_odds: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Softmax over the answers of each prompt and "none of them"."""
    out = np.zeros(trees.status.shape)
    for p in range(len(trees)):
        groups: dict[int, list[int]] = {}
        for s in range(trees.slots):
            if trees.status[p, s] == Status.FINISHED and trees.answer[p, s] != NO_ANSWER:
                groups.setdefault(int(trees.answer[p, s]), []).append(s)
        odds = {
            answer: math.exp(
                model.best * max(log_odds[p, own])
                + model.votes * math.log(len(own))
                + model.prior * prior[p]
                + model.bias
            )
            for answer, own in groups.items()
        }
        for answer, own in groups.items():
            out[p, own[0]] = odds[answer] / (1 + sum(odds.values()))
    return out


@settings(deadline=None)
@given(seed=seeds, weights=st.tuples(*[st.floats(-2, 3)] * 4))
def test_votes_are_a_softmax_over_answers_and_none(seed: int, weights: tuple[float, float, float, float]):
    rng = np.random.default_rng(seed)
    trees, model = random_trees(rng, 6), VoteModel(*weights)
    log_odds, prior = rng.normal(0, 4, trees.status.shape), rng.normal(0, 2, 6)
    found = model.probabilities(trees, log_odds, prior)
    assert np.allclose(found, plain_votes(model, trees, log_odds, prior), atol=FLOAT32)
    assert (found.sum(-1) <= 1 + 1e-12).all() and not found[~trees.finished].any()


@settings(deadline=None)
@given(seed=seeds)
def test_votes_of_extreme_odds_are_finite(seed: int):
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, 6)
    found = VoteModel().probabilities(trees, rng.choice([-900.0, 900.0], trees.status.shape), np.zeros(6))
    assert np.isfinite(found).all() and (found.sum(-1) <= 1 + 1e-12).all()


# Decisions of zip-rc-plus.


def plain_worths(policy: ZipRCPlus, trees: Trees, p: int) -> dict[tuple[str, int], float]:
    """Gain per token of everything that can be done with one prompt, by the formulas of the module."""
    own, kappa = policy.calibration, policy.calibration.strength if policy.latent else math.inf
    root, status = float(trees.root[p, 0]), trees.status[p]
    prior = expit(root)
    log_odds = [float(trees.signals[p, s, 1 if status[s] == Status.FINISHED else 0]) for s in range(trees.slots)]
    one = trees.take(np.array([p]))
    doubt = 1 - own.vote.probabilities(one, np.array([log_odds]), trees.root[p : p + 1, 0]).max()
    lost = [0.0] * trees.slots
    for s in range(trees.slots):
        if status[s] == Status.FINISHED:
            lost[s] = 1.0
        elif status[s] != Status.FREE:
            lost[s] = min(max(1 - expit(log_odds[s]) / prior, 0.0), 1.0)

    def after(failures: float) -> float:
        return prior / (1 + failures / kappa)

    def chance(alone: float, s: int) -> float:
        p_right = after(sum(lost) - lost[s])
        return float(expit(alone + math.log(p_right / (1 - p_right)) - root))

    found: dict[tuple[str, int], float] = {}
    free = (status == Status.FREE).any()
    for s in range(trees.slots):
        resumable = status[s] == Status.PAUSED and policy.can_pause
        if status[s] == Status.RUNNING or resumable:
            found["run", s] = doubt * chance(log_odds[s], s) / max(float(trees.signals[p, s, 2]), 1.0)
        if policy.can_branch and free and trees.fork[p, s] < trees.spot[p, s] < trees.length[p, s]:
            tried = sum(int(parent) == s for parent in trees.parent[p])
            right = chance(float(trees.spot_signals[p, s, 0]), s) * FORK_STRENGTH / (FORK_STRENGTH + 1 + tried)
            found["branch", s] = doubt * right / max(float(trees.spot_signals[p, s, 2]), 1.0)
    if free:
        found["start", 0] = doubt * after(sum(lost)) / max(float(trees.root[p, 2]), 1.0)
    return found


options = st.fixed_dictionaries({"latent": st.booleans(), "can_pause": st.booleans(), "can_branch": st.booleans()})


@settings(deadline=None)
@given(seed=seeds, price=st.floats(1e-4, 0.1), how=options)
def test_decisions_are_those_of_the_formulas(seed: int, price: float, how: dict[str, bool]):
    """Log odds within ±7 or so, where nothing is clipped."""
    trees = random_trees(np.random.default_rng(seed), 6, how["can_branch"])
    policy = ZipRCPlus(BY_HAND, GRID, price, **how)  # type: ignore[arg-type]
    decision = policy.decide(trees, 8)
    for p in range(6):
        worth = plain_worths(policy, trees, p)
        best = max(worth.values(), default=-math.inf)
        assert decision.utility[p] == pytest.approx(best, rel=1e-4)
        own = {key: value for key, value in worth.items() if key[0] == "run"}
        must = not trees.finished[p].any() and own
        does = [("run", s) for s in np.flatnonzero(decision.run[p])]
        does += [("start", 0)] * int(decision.start[p])
        does += [("branch", int(decision.branch[p]))] * int(decision.branch[p] != NONE)
        if best >= price * (1 + 1e-4):
            assert [worth[key] for key in does] == pytest.approx([best], rel=1e-4)
        elif best < price * (1 - 1e-4):
            assert [worth[key] for key in does] == pytest.approx([max(own.values())] if must else [], rel=1e-4)
        if decision.branch[p] != NONE:
            assert decision.branch_at[p] == trees.spot[p, decision.branch[p]]


@settings(deadline=None)
@given(seed=seeds, price=st.floats(1e-5, 0.1), width=st.integers(1, 7), how=options)
def test_no_more_than_width_runs_and_nothing_twice(seed: int, price: float, width: int, how: dict[str, bool]):
    trees = random_trees(np.random.default_rng(seed), 6, how["can_branch"])
    policy = ZipRCPlus(BY_HAND, GRID, price, width, **how)  # type: ignore[arg-type]
    decision = policy.decide(trees, 8)
    branching = decision.branch != NONE
    assert (decision.run.sum(-1) + decision.start + branching <= width).all()
    assert not (decision.run & ~(trees.unfinished if how["can_pause"] else trees.running)).any()
    assert (decision.start <= (~trees.used).sum(-1)).all() and (how["can_branch"] or not branching.any())
    unanswered = ~trees.finished.any(-1) & (trees.unfinished if how["can_pause"] else trees.running).any(-1)
    assert decision.going[unanswered].all()


@settings(deadline=None)
@given(seed=seeds, price=st.floats(1e-5, 0.1), width=st.integers(1, 4), how=options)
def test_deciding_for_many_prompts_is_deciding_for_each(seed: int, price: float, width: int, how: dict[str, bool]):
    trees = random_trees(np.random.default_rng(seed), 6, how["can_branch"])
    policy = ZipRCPlus(BY_HAND, GRID, price, width, **how)  # type: ignore[arg-type]
    whole, choice = policy.decide(trees, 8), policy.choose(trees)
    for p in range(6):
        one = trees.take(np.array([p]))
        alone: Any = policy.decide(one, 8)
        for name in ("run", "start", "priority", "utility", "branch", "branch_at"):
            assert np.allclose(getattr(whole, name)[p], getattr(alone, name)[0], rtol=1e-6), name
        assert policy.choose(one).slot[0] == choice.slot[p]
        assert policy.choose(one).probability[0] == pytest.approx(choice.probability[p])

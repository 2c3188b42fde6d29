"""What samplers are made of: replays, budgets, scores, votes and the numbers that are fitted on validation prompts."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution
from ziprc.sampling import features, score, selection
from ziprc.sampling.controller import NONE, Budget, Choice, Controller, Decision, apply, keep_best
from ziprc.sampling.fitting import Calibration, Fitted, _states, fit_strength, read_fitted
from ziprc.sampling.policies.base import Reader
from ziprc.sampling.policies.fixed import Fixed
from ziprc.sampling.policies.zip_rc_plus import ZipRCPlus
from ziprc.sampling.replay import Played, Pool, pool_orders, replay, track
from ziprc.sampling.score import Logistic, Stages, stage_of
from ziprc.sampling.selection import VoteModel
from ziprc.sampling.tree import Status, Trees
from ziprc.store.files import write_json

GRID = BinGrid((0.0, 0.5, 1.0), (0, 4, 8, 16, 32))
PROMPTS, ROLLOUTS = 20, 5
LONGEST = 20
STRENGTH = 2.0


def planted(seed: int, prompts: int = PROMPTS, rollouts: int = ROLLOUTS, styles: int = 0) -> Pool:
    """Rollouts whose success the joint foretells better and better, and whose slips show in the log-probabilities.

    0 is the right answer; responses that ran into the cap have none.
    """
    rng = np.random.default_rng(seed)
    shape = (prompts, rollouts)
    mean = rng.uniform(0.15, 0.85, prompts)
    right = rng.random(shape) < rng.beta(STRENGTH * mean, STRENGTH * (1 - mean))[:, None]
    length = rng.integers(2, LONGEST, shape).astype(np.int32)
    finished = rng.random(shape) < 0.95
    right &= finished
    flat = length.ravel()
    total, first = int(flat.sum()), np.cumsum(flat) - flat
    position = np.arange(total) - np.repeat(first, flat)
    sign = np.repeat(np.where(right, 1.0, -1.0).ravel(), flat)
    known = np.repeat(logit(mean), flat.reshape(shape).sum(1)) + 2 * sign * position / LONGEST
    value = expit(known + rng.normal(0, 0.3, total) * (position > 0))
    log_prob = -rng.exponential(0.1, total) - 2 * (sign < 0) * (rng.random(total) < 0.15)
    log_prob[first] = 0  # nothing comes before the first reading
    remaining = GRID.length_bin(np.repeat(flat, flat) - position)
    lengths = 0.3 / GRID.L + 0.7 * np.eye(GRID.L)[remaining]
    rewards = np.stack([(1 - value) ** 2, 2 * value * (1 - value), value**2], -1)
    seen = track(flat, log_prob.astype(np.float32), rng.exponential(0.5, total).astype(np.float32))
    style = np.repeat(rng.integers(0, max(styles, 1), flat.size) if styles else np.full(flat.size, -1), flat)
    return Pool(
        length=length,
        finished=finished,
        answer=np.where(finished, np.where(right, 0, rng.integers(1, 4, shape)), -1).astype(np.int32),
        score=right.astype(np.float32),
        prompt_tokens=np.full(prompts, 5, np.int32),
        joint=(rewards[:, :, None] * lengths[:, None]).reshape(total, -1).astype(np.float32),
        features=np.concatenate([seen, style[:, None].astype(np.float32)], -1),
    )


@dataclass(frozen=True)
class Dice:
    """Runs and starts at random, with more than there is; its chance is a hash of what it sees of the prompt."""

    seed: int = 0
    rate: float = 0.6
    signals: int = 1
    can_branch: bool = False
    name: str = "dice"

    def read(self, joint: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return seen[:, : self.signals]

    def decide(self, trees: Trees, interval: int) -> Decision:
        out = Decision.stop(trees)
        for p in range(len(trees)):
            rng = np.random.default_rng(
                [self.seed, *trees.length[p].tolist(), *np.abs(trees.signals[p, :, 0]).astype(int)]
            )
            out.run[p] = rng.random(trees.slots) < self.rate
            out.priority[p] = rng.random(trees.slots)
            out.start[p] = rng.choice([0, 1, 2, 1000])
        return out

    def expectations(self, trees: Trees) -> tuple[np.ndarray, np.ndarray]:
        unknown = np.full(trees.status.shape, np.nan)
        return unknown, unknown

    def choose(self, trees: Trees) -> Choice:
        return Choice(trees.finished.argmax(-1), np.full(len(trees), 0.5))


POOL = planted(0)
ORDERS = pool_orders(PROMPTS, ROLLOUTS, 2, 0)
ROWS = np.arange(len(POOL.joint), dtype=np.float32)[:, None]  # signals that tell which reading they are
EVERYTHING = Fixed(Reader(GRID), k=ROLLOUTS)


def play(policy: Any, pool: Pool = POOL, orders: np.ndarray = ORDERS, observe: Any = None, **limits: int) -> Played:
    budget = Budget(**{"branches": ROLLOUTS, "interval": 3, **limits})
    signals = np.arange(len(pool.joint), dtype=np.float32)[:, None]
    return replay(Controller(policy, budget), pool, signals, orders, observe)


# Trees.


def test_a_part_of_the_trees_can_be_changed_and_put_back():
    trees = Trees.empty(4, 3, 2, branching=True)
    part = trees.take(np.array([1, 3]))
    part.status[:, 0], part.root[:], part.latency[:], part.spot[:] = Status.RUNNING, 2.0, 7, 5
    assert not trees.used.any()
    trees.put(np.array([1, 3]), part)
    assert trees.used[:, 0].tolist() == [False, True, False, True]
    assert trees.latency.tolist() == [0, 7, 0, 7] and trees.root[:, 0].tolist() == [0, 2, 0, 2]
    assert trees.take(np.array([1]), slots=2).status.shape == (1, 2)


def test_inherited_tokens_are_not_paid_for_twice():
    trees = Trees.empty(1, 3, 0)
    trees.length[:], trees.fork[:] = [[9, 7, 0]], [[0, 4, 0]]
    assert trees.spent.tolist() == [9 + 3]


def test_free_slots_are_handed_out_in_order():
    trees = Trees.empty(2, 4, 0)
    trees.status[0, :2] = Status.FINISHED
    assert trees.open_slots(np.array([1, 3])).tolist() == [[False, False, True, False], [True, True, True, False]]


# Features.


def test_the_reading_of_the_prompt_has_seen_no_token():
    seen = features.update(features.fresh(1), np.zeros(1, np.float32), np.array([0.7], np.float32))[0]
    found = dict(zip(features.FEATURES, seen.round(6).tolist(), strict=True))
    assert found == dict.fromkeys(features.FEATURES, 0) | dict.fromkeys(("entropy", "high entropy"), pytest.approx(0.7))


def test_the_slip_is_the_first_of_equally_unlikely_tokens():
    seen = features.fresh(1)
    for value in (0.0, -1.0, -3.0, -2.0, -3.0):
        seen = features.update(seen, np.array([value], np.float32), np.zeros(1, np.float32))
    assert seen[0, features.TOKENS] == 4 and seen[0, features.SLIP] == 1


# Controller.


@pytest.mark.parametrize("limits", [{"tokens": 8}, {"latency": 8}, {"tokens": 1}, {"interval": 0}, {"branches": 0}])
def test_a_budget_in_which_nothing_fits_is_refused(limits: dict[str, int]):
    with pytest.raises(UserError, match=r"at least 1|first token and one decision"):
        Budget(**{"interval": 8, **limits})


def test_a_budget_of_one_token_and_one_interval_is_allowed():
    Budget(tokens=9, latency=9, interval=8)


def test_the_best_are_kept_and_ties_go_to_the_first():
    wanted = np.array([[True, True, False, True], [True, True, True, True], [True, False, True, False]])
    priority = np.array([[1.0, 3.0, 9.0, 2.0], [5.0, 5.0, 5.0, 5.0], [-np.inf, 0.0, 1.0, 2.0]])
    kept = keep_best(wanted, priority, np.array([2, 2, 9]))
    assert kept.tolist() == [[False, True, False, True], [True, True, False, False], [True, False, True, False]]


def test_a_short_budget_drops_branchings_first_then_new_samples_then_the_least_important():
    trees = Trees.empty(4, 6, 0)
    trees.status[:, :3] = Status.RUNNING
    trees.length[:, :3] = 5
    wish = Decision.stop(trees)
    wish.run[:, :3], wish.priority[:, :3], wish.start[:], wish.branch[:] = True, [1, 3, 2], 1, 0

    class Wish(Dice):
        def decide(self, trees: Trees, interval: int) -> Decision:
            return replace(wish, run=wish.run.copy(), start=wish.start.copy(), branch=wish.branch.copy())

    def found(intervals: int) -> tuple[list[bool], int, bool]:
        decision = Controller(Wish(), Budget(6, tokens=15 + 4 * intervals, interval=4)).decide(trees)
        return decision.run[0, :3].tolist(), int(decision.start[0]), bool(decision.branch[0] != NONE)

    assert found(5) == ([True, True, True], 1, True)
    assert found(4) == ([True, True, True], 1, False)
    assert found(3) == ([True, True, True], 0, False)
    assert found(2) == ([False, True, True], 0, False)
    assert found(0) == ([False, False, False], 0, False)


def test_a_negative_number_of_new_samples_buys_nothing():
    trees = Trees.empty(1, 3, 0)
    trees.status[:, 0], trees.length[:, 0] = Status.RUNNING, 5

    class Wish(Dice):
        def decide(self, trees: Trees, interval: int) -> Decision:
            return replace(Decision.stop(trees), start=np.array([-1]), branch=np.array([0]))

    assert not Controller(Wish(), Budget(3, tokens=5, interval=4)).decide(trees).going.any()


def test_carrying_a_decision_out_pauses_resumes_starts_and_branches():
    trees = Trees.empty(1, 6, 0)
    trees.status[0, :3] = Status.RUNNING, Status.PAUSED, Status.FINISHED
    trees.length[0, :3] = 9
    decision = Decision.stop(trees)
    decision.run[0, 1], decision.start[0], decision.branch[0], decision.branch_at[0] = True, 1, 2, 4
    done = apply(decision, trees)
    assert [np.flatnonzero(m[0]).tolist() for m in (done.started, done.branched, done.resumed, done.paused)] == [
        [3], [4], [1], [0],
    ]  # fmt: skip
    assert [Status(s).name for s in trees.status[0]] == ["PAUSED", "RUNNING", "FINISHED", "RUNNING", "RUNNING", "FREE"]
    assert (trees.parent[0, 4], trees.fork[0, 4], trees.length[0, 4]) == (2, 4, 4)
    assert trees.spent[0] == 27


def test_where_nothing_finished_the_longest_branch_answers_with_probability_zero():
    trees = Trees.empty(2, 3, 1)
    trees.status[:] = [Status.PAUSED, Status.PAUSED, Status.FREE], [Status.FINISHED, Status.PAUSED, Status.FREE]
    trees.length[:] = [3, 5, 0], [2, 9, 0]
    choice = Controller(Dice()).choose(trees)
    assert choice.slot.tolist() == [1, 0] and choice.probability.tolist() == [0.0, 0.5]


# Replay.


def test_running_everything_costs_the_sum_of_the_lengths():
    played = play(EVERYTHING)
    assert (played.tokens == POOL.length.sum(-1)[played.prompt]).all()
    assert (played.samples == ROLLOUTS).all() and played.trees.finished.all()


def test_the_first_decision_sees_one_sample_of_one_token():
    seen = []
    play(EVERYTHING, observe=lambda rows, trees, decision: seen.append(trees.take(np.arange(len(trees)))))
    assert (seen[0].spent == 1).all() and (seen[0].latency == 1).all() and seen[0].used.sum() == 2 * PROMPTS
    assert (seen[0].root == seen[0].signals[:, 0]).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_policy_sees_the_newest_reading_of_what_it_has_paid_for_and_answers_of_what_is_finished(seed: int):
    order = ORDERS.reshape(-1, ROLLOUTS)

    def watch(rows: np.ndarray, trees: Trees, decision: Decision) -> None:
        prompt = (rows % PROMPTS)[:, None]
        rollout = order[rows]
        newest = POOL.first[prompt, rollout] + trees.length - 1
        assert (trees.signals[..., 0] == newest)[trees.length > 0].all()
        assert (trees.finished == (trees.used & (trees.length == POOL.length[prompt, rollout]))).all()
        said = np.where(trees.finished & POOL.finished[prompt, rollout], POOL.answer[prompt, rollout], -1)
        assert (trees.answer == said).all()

    play(Dice(seed), observe=watch)


@pytest.mark.parametrize("seed", range(3))
def test_what_happens_to_a_prompt_depends_on_that_prompt_alone(seed: int):
    """Permuting the prompts permutes the results."""
    mixed = np.random.default_rng(seed).permutation(PROMPTS)
    readings = np.concatenate([np.arange(POOL.first[n, 0], POOL.first[n, -1] + POOL.length[n, -1]) for n in mixed])
    own = {name: getattr(POOL, name)[mixed] for name in ("length", "finished", "answer", "score", "prompt_tokens")}
    pool = Pool(**own, joint=POOL.joint[readings], features=POOL.features[readings])
    controller = Controller(Dice(seed), Budget(branches=4, tokens=50, interval=3))
    theirs = replay(controller, POOL, ROWS, ORDERS)
    ours = replay(controller, pool, ROWS[readings], ORDERS[:, mixed])
    rows = (np.arange(len(ORDERS))[:, None] * PROMPTS + mixed).ravel()
    for name in ("score", "probability", "tokens", "latency", "samples", "rollout"):
        assert (getattr(ours, name) == getattr(theirs, name)[rows]).all(), name


def test_the_answer_that_is_scored_is_the_one_that_was_chosen():
    played = play(EVERYTHING)
    slot = EVERYTHING.choose(played.trees).slot
    rollout = ORDERS.reshape(-1, ROLLOUTS)[np.arange(len(slot)), slot]
    assert (played.score == POOL.score[played.prompt, rollout]).all() and 0 < played.score.mean() < 1


def test_a_prompt_whose_budget_ends_before_its_answer_scores_nothing():
    played = play(EVERYTHING, tokens=4)
    unfinished = ~played.trees.finished.any(-1)
    assert unfinished.any() and not played.score[unfinished].any() and not played.probability[unfinished].any()


def test_a_replay_cannot_branch():
    class Brancher(Dice):
        def decide(self, trees: Trees, interval: int) -> Decision:
            return replace(Decision.stop(trees), branch=np.zeros(len(trees), np.int64))

    with pytest.raises(AssertionError, match="cannot branch"):
        play(Brancher())


def test_orders_are_permutations_and_follow_from_the_seed():
    orders = pool_orders(7, 5, 3, 1)
    assert orders.shape == (3, 7, 5) and (np.sort(orders, -1) == np.arange(5)).all()
    assert (orders == pool_orders(7, 5, 3, 1)).all() and (orders != pool_orders(7, 5, 3, 2)).any()
    assert (orders[0] != orders[1]).any() and (orders[0, 0] != orders[0]).any()


# Score.


def test_the_logistic_finds_the_probabilities_of_a_planted_model():
    """Six weights from 20,000 states: a standard error of √(6/4/20000) ≈ 0.009 in probability; three of them."""
    rng = np.random.default_rng(0)
    x = rng.normal([1, -2], [2, 0.5], (20_000, 2))
    z = (x - [1, -2]) / [2, 0.5]
    truth = expit(0.5 + z[:, 0] - 0.7 * z[:, 1] + 0.6 * z[:, 0] * z[:, 1] - 0.4 * z[:, 1] ** 2)
    found = Logistic.fit(x, (rng.random(len(x)) < truth).astype(float)).probability(x)
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.027


def test_the_logistic_does_not_extrapolate_beyond_five_deviations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 1))
    model = Logistic.fit(x, (rng.random(500) < expit(x[:, 0])).astype(float))
    assert model.log_odds(np.array([[1e6]])) == pytest.approx(model.log_odds(np.array([[5.5]])))


def test_stages_double():
    assert stage_of(np.arange(17)).tolist() == [0, 1, 2, 2, *[3] * 4, *[4] * 8, 5]
    powers = 2 ** np.arange(1, 16)
    assert (stage_of(powers) == stage_of(powers - 1) + 1).all()


def test_every_stage_has_its_own_model():
    """Stage s is right with log odds 2s - 4, whatever the input."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, 20_000)
    x = rng.normal(size=(len(tokens), 1))
    y = (rng.random(len(tokens)) < expit(2.0 * stage_of(tokens) - 4)).astype(float)
    stages = Stages.fit(x, y, tokens)
    assert len(stages.models) == 5
    for number, model in enumerate(stages.models):
        mine = stage_of(tokens) == number
        assert (stages.log_odds(x[mine], tokens[mine]) == model.log_odds(x[mine])).all()
        assert model.probability(x[mine]).mean() == pytest.approx(
            y[mine].mean(), abs=0.005
        )  # the bias is not penalised
    assert (stages.log_odds(x[:9], np.full(9, 1000)) == stages.models[-1].log_odds(x[:9])).all()


def test_a_stage_with_too_little_to_learn_from_shares_the_one_before():
    rng = np.random.default_rng(0)
    tokens = np.repeat([0, 1, 2, 4], [500, 500, 100, 500])
    x = rng.normal(size=(len(tokens), 1))
    y = (rng.random(len(tokens)) < 0.5).astype(float)
    y[tokens == 4] = 1.0  # all right: nothing to learn
    models = Stages.fit(x, y, tokens).models
    assert models[2] == models[1] != models[0] and models[3] == models[1]
    whole = Stages.fit(x[tokens == 2], y[tokens == 2], tokens[tokens == 2]).models
    assert set(whole) == {Logistic.fit(x[tokens == 2], y[tokens == 2])}


def test_the_summary_of_a_joint_is_its_expectations():
    joint = np.random.default_rng(0).dirichlet(np.full(GRID.size, 0.3), 50)
    reward, remaining = score.joint_summary(joint, GRID)
    truth = JointDistribution(GRID, joint)
    assert np.allclose(reward, truth.expected_reward()) and np.allclose(remaining, truth.expected_remaining())
    assert np.allclose(score.joint_summary(3 * joint, GRID), (reward, remaining))  # float16 does not sum to one
    assert np.isfinite(score.joint_summary(np.zeros((1, GRID.size)), GRID)).all()


def test_inputs_are_those_that_their_names_say():
    x = dict(zip(score.INPUTS, score.inputs(POOL.joint, POOL.features, GRID).T, strict=True))
    truth, seen = JointDistribution(GRID, POOL.joint), dict(zip(features.FEATURES, POOL.features.T, strict=False))
    assert np.allclose(expit(x["head"]), np.clip(truth.expected_reward(), 1e-3, 1 - 1e-3))
    assert np.allclose(np.expm1(x["remaining"]), truth.expected_remaining())
    assert np.allclose(np.expm1(x["tokens"]), seen["tokens"], atol=1e-4)  # of float32
    same = ("mean", "window", "low window", "entropy", "high entropy")
    assert all((x[name] == seen[name]).all() for name in same)
    assert (x["low"] == np.maximum(seen["low"], -8)).all()


# Selection.


def ended(answer: list[list[int]]) -> Trees:
    """Finished branches that say this."""
    trees = Trees.empty(*np.shape(answer), 0)
    trees.status[:], trees.answer[:] = Status.FINISHED, answer
    return trees


@pytest.mark.parametrize(("weight", "best"), [(2.0, 1), (0.5, 2)])
def test_votes_are_summed_over_equal_answers(weight: float, best: int):
    trees, weights = ended([[3, 1, 3, -1]]), np.array([[0.5, weight, 0.25, 9.0]])
    assert selection.best_vote(trees, weights, np.arange(4.0)[None]).tolist() == [best]


def test_tied_votes_go_to_the_higher_tie_breaker():
    trees = ended([[0, 1, 1, 0], [0, 1, 1, 0], [2, 1, 1, 0]])
    tie = np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.2, 0.3, 0.4], [9.0, 0.1, 0.2, 9.0]])
    assert selection.best_vote(trees, np.ones((3, 4)), tie).tolist() == [3, 0, 2]


def test_what_is_not_finished_does_not_vote():
    trees = ended([[0, 1, 1]])
    trees.status[0, 1:] = Status.RUNNING
    assert selection.best_vote(trees, np.ones((1, 3)), np.ones((1, 3))).tolist() == [0]
    found = VoteModel().probabilities(trees, np.zeros((1, 3)), np.zeros(1))
    assert found.tolist() == [[pytest.approx(0.5), 0, 0]]


def test_agreement_counts_unless_votes_are_taken_away():
    trees, odds, prior = ended([[0, 1, 0, 0]]), np.zeros((1, 4)), np.zeros(1)
    with_votes = VoteModel().probabilities(trees, odds, prior)[0]
    without = VoteModel(votes=0.0).probabilities(trees, odds, prior)[0]
    assert with_votes.tolist() == pytest.approx([3 / 5, 1 / 5, 0, 0])
    assert without.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0])


def test_the_vote_model_finds_planted_weights():
    """Four weights from 6,000 prompts: a standard error up to 0.03 (by simulation), three of them, and the ridge's 0.06."""
    rng = np.random.default_rng(0)
    truth = VoteModel(0.8, 1.3, 0.4, -0.6)
    cases = []
    for samples in (2, 4, 8):
        trees = ended(rng.integers(0, 3, (2000, samples)).tolist())
        log_odds, prior = rng.normal(0, 1.5, (2000, samples)), rng.normal(size=2000)
        chance = truth.probabilities(trees, log_odds, prior)
        below = np.cumsum(np.concatenate([chance, 1 - chance.sum(-1, keepdims=True)], -1), -1)
        drawn = (rng.random((2000, 1)) > below).sum(-1)
        answer = np.where(drawn < samples, trees.answer[np.arange(2000), np.minimum(drawn, samples - 1)], -1)
        cases.append((trees, log_odds, prior, trees.answer == answer[:, None]))
    found = VoteModel.fit(cases)
    assert astuple(found) == pytest.approx(astuple(truth), abs=0.15)


def test_a_vote_model_that_cannot_be_wrong_stays_finite():
    trees = ended([[0], [1]])
    fitted = VoteModel.fit([(trees, np.array([[3.0], [-3.0]]), np.zeros(2), np.array([[True], [False]]))])
    assert np.isfinite(astuple(fitted)).all()


# Calibration.


@pytest.mark.parametrize("kappa", [0.5, 2.0, 8.0])
def test_the_strength_of_the_prior_is_found_in_simulated_prompts(kappa: float):
    """3,000 prompts of 12 samples: log κ has a standard error of 0.035 here (by simulation); three of them."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(0.1, 0.9, 3000)
    theta = rng.beta(kappa * mean, kappa * (1 - mean))
    found = fit_strength(mean, (rng.random((3000, 12)) < theta[:, None]).astype(float))
    assert abs(np.log(found / kappa)) < 0.105


def test_prompts_without_a_latent_difficulty_have_a_strong_prior():
    rng = np.random.default_rng(0)
    mean = rng.uniform(0.1, 0.9, 1000)
    assert fit_strength(mean, (rng.random((1000, 12)) < mean[:, None]).astype(float)) > 50


@pytest.fixture(scope="module")
def large() -> Pool:
    return planted(1, prompts=300, rollouts=6)


@pytest.fixture(scope="module")
def fitted(large: Pool) -> Fitted:
    return Fitted.fit(large, GRID, 0)


def test_every_state_that_is_fitted_lies_in_its_rollout_and_stage():
    flat, first = POOL.length.ravel(), POOL.first.ravel()
    rows, whose = _states(flat, first, np.random.default_rng(0))
    tokens = rows - first[whose]
    assert ((tokens >= 0) & (tokens < flat[whose])).all()
    assert (POOL.features[rows, features.TOKENS] == tokens).all()
    pairs = list(zip(whose.tolist(), stage_of(tokens).tolist(), strict=True))
    stages = stage_of(flat - 1) + 1  # a rollout of n tokens has states with 0 to n - 1 of them
    assert len(set(pairs)) == len(pairs) == stages.sum()


def test_the_fused_score_is_calibrated_on_other_prompts(fitted: Fitted):
    """1,800 rollouts in 300 prompts whose θ scatters: a standard error of about 0.015; four of them."""
    other = planted(2, prompts=300, rollouts=6)
    last = (other.first + other.length - 1).ravel()
    own, right = fitted.fused, other.score.ravel()
    found = own.finished.probability(own.inputs(other.joint[last], other.features[last], GRID))
    assert found.mean() == pytest.approx(right.mean(), abs=0.06)
    assert found[right > 0.5].mean() - found[right < 0.5].mean() > 0.3
    start = other.first[:, 0]
    x = own.inputs(other.joint[start], other.features[start], GRID)
    early = expit(own.on_the_way.log_odds(x, np.zeros(len(start))))
    head = score.joint_summary(other.joint[start], GRID)[0]  # the planted mean: nothing else is known at the start
    ideal = np.corrcoef(head, other.score.mean(-1))[0, 1]
    assert np.corrcoef(early, other.score.mean(-1))[0, 1] > 0.9 * ideal > 0
    assert 1.0 < own.strength < 4.0  # 2 was planted; 1.7 to 3.1 in eight simulations


def test_partial_scores_look_at_their_columns_only(large: Pool):
    partial = Calibration.fit(large, GRID, 0, score.HEAD_INPUTS)
    other = np.random.default_rng(0).normal(size=large.features.shape).astype(np.float32)
    other[:, features.TOKENS] = large.features[:, features.TOKENS]
    policy = ZipRCPlus(partial, GRID, 0.01)
    assert (policy.read(large.joint, large.features) == policy.read(large.joint, other)).all()


def test_a_fit_follows_from_pool_and_seed(large: Pool, fitted: Fitted):
    assert Fitted.fit(large, GRID, 0) == fitted


def test_a_calibration_is_read_as_it_was_written(fitted: Fitted, large: Pool, tmp_path: Path):
    write_json(tmp_path / "calibration.json", fitted.to_dict())
    again = read_fitted(tmp_path, GRID)
    assert again == fitted
    read = [ZipRCPlus(f.fused, GRID, 0.01).read(large.joint, large.features) for f in (fitted, again)]
    assert (read[0] == read[1]).all()


def test_a_checkpoint_that_is_not_calibrated_is_told_how_to(tmp_path: Path):
    with pytest.raises(UserError, match=r"not calibrated.*make .*calibration\.json"):
        read_fitted(tmp_path, GRID)


def test_a_calibration_for_another_grid_is_refused(fitted: Fitted, tmp_path: Path):
    write_json(tmp_path / "calibration.json", fitted.to_dict())
    with pytest.raises(UserError, match="another grid"):
        read_fitted(tmp_path, BinGrid(GRID.reward_centres, (0, 4, 8, 16, 64)))


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_rollouts_that_are_all_alike_give_a_cautious_constant(value: float):
    alike = replace(POOL, score=np.full_like(POOL.score, value))
    fitted = Fitted.fit(alike, GRID, 0)
    count = PROMPTS * ROLLOUTS
    x = fitted.fused.inputs(POOL.joint, POOL.features, GRID)
    assert np.allclose(fitted.fused.finished.probability(x), (count * value + 0.5) / (count + 1))
    assert np.isfinite([fitted.fused.strength, *astuple(fitted.fused.vote)]).all()
    assert Fitted.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted

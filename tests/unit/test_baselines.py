"""The competitors of adaptive sampling, against plain loops over prompts and against what their rules promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling import score
from ziprc.sampling.competitors import NEVER, families
from ziprc.sampling.controller import Budget, Controller
from ziprc.sampling.policies import base
from ziprc.sampling.policies.base import MAJORITY, SCORES, UNKNOWN_STYLE, Baseline, Best, Reader, Source, Vote, answered
from ziprc.sampling.policies.deepconf import DeepConfOffline, DeepConfOnline, lower_bound
from ziprc.sampling.policies.fixed import Fixed, FixedStyle, oracle
from ziprc.sampling.policies.pruning import LengthPruning, RandomPruning, ValuePruning, hashed_uniform
from ziprc.sampling.policies.stopping import AdaptiveConsistency, SequentialStop, StyleStop
from ziprc.sampling.replay import Played, Pool, pool_orders, replay, track
from ziprc.sampling.tree import ROOT, Status, Trees

GRID = BinGrid((0.0, 0.5, 1.0), (0, 4, 16, 64))
PROMPTS, ROLLOUTS, STYLES, INTERVAL = 30, 8, 3, 3
ROUNDING = 1e-5  # signals are float32


def synthetic(seed: int, prompts: int = PROMPTS, rollouts: int = ROLLOUTS) -> Pool:
    """Random rollouts, 0 being the right answer; the style shows at the third reading."""
    rng = np.random.default_rng(seed)
    shape = (prompts, rollouts)
    length = rng.integers(1, 25, shape).astype(np.int32)
    total, flat = int(length.sum()), length.ravel()
    log_prob = -rng.exponential(0.2, total).astype(np.float32)
    features = track(flat, log_prob, rng.exponential(0.5, total).astype(np.float32))
    style = np.repeat(rng.integers(0, STYLES, flat.size), flat)
    style = np.where(features[:, 0] < 2, UNKNOWN_STYLE, style).astype(np.float32)
    finished = rng.random(shape) < 0.95
    answer = np.where(finished & (rng.random(shape) < 0.95), rng.integers(0, 3, shape), -1).astype(np.int32)
    return Pool(
        length=length,
        finished=finished,
        answer=answer,
        score=(answer == 0).astype(np.float32),
        prompt_tokens=np.full(prompts, 5, np.int32),
        joint=rng.dirichlet(np.full(GRID.size, 0.3), total).astype(np.float32),
        features=np.concatenate([features, style[:, None]], 1),
    )


def fitted(pool: Pool) -> score.Logistic:
    last = (pool.first + pool.length - 1).ravel()
    return score.Logistic.fit(score.token_inputs(pool.features[last]), pool.score.ravel())


POOL = synthetic(0)
READER = Reader(GRID, fitted(POOL))
ORDERS = pool_orders(PROMPTS, ROLLOUTS, 2, 0)
REGISTRY = families(GRID, READER.logistic, STYLES, POOL.length.ravel())
POLICIES = [policy for family in REGISTRY.values() for policy in family]
VOTES = [MAJORITY, *(Vote(s, power) for s in SCORES for power in (0.5, 3.0))]


def run(policy: Baseline, pool: Pool = POOL, orders: np.ndarray = ORDERS, **limits: int) -> Played:
    budget = Budget(**{"branches": ROLLOUTS, "interval": INTERVAL, **limits})
    return replay(Controller(policy, budget), pool, policy.read(pool.smoothed(1), pool.features), orders)


def episodes(orders: np.ndarray = ORDERS):
    """(episode, prompt, rollouts in order)"""
    assert orders.size, "a test over no episode proves nothing"
    for episode, order in enumerate(orders.reshape(-1, orders.shape[-1])):
        yield episode, episode % orders.shape[1], order


def last_signal(source: Source | None, prompt: int, rollout: int) -> float:
    row = POOL.first[prompt, rollout] + POOL.length[prompt, rollout] - 1
    return reading(source, row)


def reading(source: Source | None, row: int) -> float:
    if source is None:
        return 1.0
    return float(READER.read((source,), POOL.joint[row : row + 1], POOL.features[row : row + 1])[0, 0])


def loop_vote(prompt: int, rollouts: list[int], source: Source | None, power: float) -> Counter:
    """Weight of each answer."""
    weight: Counter = Counter()
    for rollout in rollouts:
        if POOL.answer[prompt, rollout] >= 0 and POOL.finished[prompt, rollout]:
            weight[int(POOL.answer[prompt, rollout])] += last_signal(source, prompt, rollout) ** power
    return weight


def picked(policy: Baseline, played: Played) -> np.ndarray:
    """[E] the answer that the policy gives on the final trees."""
    slot = policy.choose(played.trees).slot
    return np.take_along_axis(played.trees.answer, slot[:, None], 1)[:, 0]


# Selectors and fixed numbers of samples.


@pytest.mark.parametrize("k", [1, 2, 5, ROLLOUTS])
def test_majority_pays_for_exactly_its_k_samples(k: int):
    played = run(Fixed(READER, MAJORITY, k))
    for episode, prompt, order in episodes():
        assert played.tokens[episode] == POOL.length[prompt, order[:k]].sum()
        assert played.latency[episode] >= POOL.length[prompt, order[:k]].max()
        assert played.samples[episode] == k


@pytest.mark.parametrize("selector", VOTES, ids=lambda s: s.label)
@pytest.mark.parametrize("k", [1, 4, ROLLOUTS])
def test_votes_equal_a_loop_over_prompts(selector: Vote, k: int):
    policy = Fixed(READER, selector, k)
    played = run(policy)
    answers = picked(policy, played)
    for episode, prompt, order in episodes():
        weight = loop_vote(prompt, order[:k], selector.by, selector.sharpness)
        if not weight:
            assert answers[episode] == -1 and played.probability[episode] == 0
            continue
        top = max(weight.values())
        assert weight[answers[episode]] >= top * (1 - ROUNDING)
        assert np.isclose(played.probability[episode], top / sum(weight.values()), atol=ROUNDING)


@pytest.mark.parametrize("source", SCORES)
def test_best_of_k_has_the_highest_score_among_the_answered(source: Source):
    policy = Fixed(READER, Best(source), 5)
    played = run(policy)
    slot = policy.choose(played.trees).slot
    for episode, prompt, order in episodes():
        usable = [r for r in order[:5] if POOL.finished[prompt, r] and POOL.answer[prompt, r] >= 0]
        scores = [last_signal(source, prompt, r) for r in usable or order[:5]]
        assert np.isclose(last_signal(source, prompt, order[slot[episode]]), max(scores), atol=ROUNDING)
        assert np.isclose(played.probability[episode], max(scores), atol=ROUNDING)


def test_a_tied_majority_goes_to_the_first_sample():
    trees = hand_made(answer=[[2, 1, 1, 2]])
    assert Fixed(READER, MAJORITY, 4).choose(trees).slot[0] == 0


def test_a_sample_without_an_answer_never_wins_over_one_with():
    trees = hand_made(answer=[[-1, 3]], signal=[[0.9, 0.1]])
    assert Fixed(READER, Best(Source.VALUE), 2).choose(trees).slot[0] == 1


def hand_made(answer: list[list[int]], signal: list[list[float]] | None = None) -> Trees:
    """Finished branches."""
    shape = np.shape(answer)
    trees = Trees.empty(*shape, signals=1 if signal else 0)
    trees.status[:] = Status.FINISHED
    trees.answer[:] = answer
    trees.length[:] = 9
    if signal:
        trees.signals[..., 0] = signal
    return trees


def test_token_inputs_are_those_of_the_score_without_the_joint():
    with_joint = score.inputs(POOL.joint, POOL.features, GRID)
    assert np.array_equal(score.token_inputs(POOL.features), with_joint[:, 2:])


def test_reading_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    sources = tuple(Source)
    whole = READER.read(sources, POOL.joint, POOL.features)
    monkeypatch.setattr(base, "CHUNK", 7)
    assert np.allclose(READER.read(sources, POOL.joint, POOL.features), whole, atol=ROUNDING)


def test_missing_inputs_are_named():
    with pytest.raises(UserError, match="logistic"):
        Reader(GRID).read((Source.LOGISTIC,), POOL.joint, POOL.features)
    with pytest.raises(UserError, match="style"):
        READER.read((Source.STYLE,), POOL.joint, POOL.features[:, :-1])


def test_oracle_takes_the_best_of_the_first_k():
    found = oracle(POOL, ORDERS, 3)
    for episode, prompt, order in episodes():
        assert found[episode] == POOL.score[prompt, order[:3]].max()


# Stopping rules.


def certainty(answers: list[int]) -> float:
    (_, first), (_, second) = [*Counter(answers).most_common(2), (None, 0), (None, 0)][:2]
    return float(stats.beta(first + 1, second + 1).sf(0.5))


def loop_adaptive(prompt: int, order: np.ndarray, policy: AdaptiveConsistency) -> list[int]:
    """The rollouts that are sampled."""
    taken: list[int] = []
    while len(taken) < policy.k_max:
        taken = list(order[: min(len(taken) + policy.batch, policy.k_max)])
        if certainty([a for a in POOL.answer[prompt, taken] if a >= 0]) >= policy.threshold:
            break
    return taken


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_adaptive_consistency_equals_a_loop(threshold: float, batch: int):
    policy = AdaptiveConsistency(READER, threshold, ROLLOUTS, batch)
    played = run(policy)
    answers = picked(policy, played)
    for episode, prompt, order in episodes():
        taken = loop_adaptive(prompt, order, policy)
        weight = loop_vote(prompt, taken, None, 1.0)
        assert played.tokens[episode] == POOL.length[prompt, taken].sum()
        assert weight[answers[episode]] == max(weight.values(), default=0)


def test_adaptive_consistency_stops_sooner_at_lower_thresholds():
    samples = [run(AdaptiveConsistency(READER, t, ROLLOUTS)).samples for t in (0.8, 0.9, 0.95)]
    assert (samples[0] <= samples[1]).all() and (samples[1] <= samples[2]).all()
    assert samples[0].sum() < samples[1].sum() < samples[2].sum()


def test_adaptive_consistency_stops_at_unanimity_by_the_beta_rule():
    agreeing = replace(POOL, answer=np.zeros_like(POOL.answer), finished=np.ones_like(POOL.finished))
    for threshold, votes in ((0.7, 1), (0.8, 2), (0.9, 3), (0.95, 4), (0.99, 6)):
        assert (run(AdaptiveConsistency(READER, threshold, ROLLOUTS), agreeing).samples == votes).all()


def test_adaptive_consistency_that_is_never_sure_is_majority():
    never, fixed = (run(p) for p in (AdaptiveConsistency(READER, 1.0, 6), Fixed(READER, MAJORITY, 6)))
    assert np.array_equal(never.tokens, fixed.tokens)
    assert np.array_equal(never.score, fixed.score)


@pytest.mark.parametrize("source", [Source.LOGISTIC, Source.VALUE, Source.MEAN])
def test_sequential_stop_takes_the_first_sample_above_the_threshold(source: Source):
    threshold = float(np.median([last_signal(source, p, r) for p in range(PROMPTS) for r in range(ROLLOUTS)]))
    policy = SequentialStop(READER, source, threshold, ROLLOUTS)
    played = run(policy)
    slot = policy.choose(played.trees).slot
    for episode, prompt, order in episodes():
        good = [POOL.finished[prompt, r] and POOL.answer[prompt, r] >= 0 for r in order]
        good = [g and last_signal(source, prompt, r) >= threshold for g, r in zip(good, order, strict=True)]
        if any(good):
            assert slot[episode] == good.index(True) == played.samples[episode] - 1
        else:
            assert played.samples[episode] == ROLLOUTS


def test_style_stop_answers_with_the_first_of_its_style():
    policy = StyleStop(READER, 1, ROLLOUTS)
    played = run(policy)
    slot = policy.choose(played.trees).slot
    styles = policy.score(played.trees, Source.STYLE)
    for episode in range(len(styles)):
        good = answered(played.trees)[episode] & (styles[episode] == 1)
        if good.any():
            assert slot[episode] == np.argmax(good) == played.samples[episode] - 1


# Pruning rules.


def loop_deepconf(prompt: int, order: np.ndarray, policy: DeepConfOnline) -> tuple[int, list[int]]:
    """Tokens, and the rollouts that finish, by walking through the intervals."""
    length = POOL.length[prompt]
    at: dict[int, int] = {order[0]: 1}  # rollout -> tokens, of all that were started
    dropped: set[int] = set()

    def confidence(rollout: int) -> float:
        return reading(Source.WINDOW, POOL.first[prompt, rollout] + at[rollout] - 1)

    while True:
        warm = list(order[: policy.warmup])
        live = [r for r in at if at[r] < length[r] and r not in dropped]
        new = policy.warmup - len(at)
        if new <= 0 and not any(r in warm for r in live):
            bar = np.quantile([confidence(r) for r in warm], 1 - policy.keep)
            dropped |= {r for r in live if confidence(r) < bar}
            live = [r for r in live if r not in dropped]
            weight = loop_vote(prompt, [r for r in at if at[r] == length[r]], Source.WINDOW, policy.sharpness)
            if weight and max(weight.values()) / sum(weight.values()) >= policy.consensus:
                break
            new = policy.batch - len(live)
        new = min(new, policy.k - len(at))
        if not live and new <= 0:
            break
        started = list(order[len(at) : len(at) + max(new, 0)])
        at |= dict.fromkeys(started, 0)
        for r in live + started:
            at[r] = min(at[r] + INTERVAL, length[r])
    return sum(at.values()), [r for r in at if at[r] == length[r]]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("consensus", [0.6, 0.8, NEVER])
def test_deepconf_online_equals_a_loop(keep: float, batch: int, consensus: float):
    policy = DeepConfOnline(READER, ROLLOUTS, 3, keep, consensus, batch)
    played = run(policy)
    for episode, prompt, order in episodes():
        tokens, ended = loop_deepconf(prompt, order, policy)
        assert played.tokens[episode] == tokens
        assert set(order[played.trees.finished[episode]]) == set(ended)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_what_is_paused_is_never_resumed(policy: Baseline):
    paused: dict[int, set[int]] = {}

    def watch(rows, trees, decision):
        for row, status, runs in zip(rows, trees.status, decision.run, strict=True):
            gone = paused.setdefault(int(row), set())
            assert not gone & set(np.flatnonzero(runs))
            gone |= set(np.flatnonzero((status == Status.RUNNING) & ~runs))

    replay_watched(policy, watch)


def replay_watched(policy: Baseline, watch) -> Played:
    controller = Controller(policy, Budget(branches=ROLLOUTS, interval=INTERVAL))
    return replay(controller, POOL, policy.read(POOL.smoothed(1), POOL.features), ORDERS, watch)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_every_prompt_is_answered_with_a_finished_branch_and_every_token_is_paid(policy: Baseline):
    played = run(policy)
    slot = policy.choose(played.trees).slot
    assert np.take_along_axis(played.trees.finished, slot[:, None], 1).all()
    assert np.array_equal(played.tokens, played.trees.length.sum(-1))
    assert ((played.probability >= 0) & (played.probability <= 1 + ROUNDING)).all()
    known = answered(played.trees).any(-1)
    assert (picked(policy, played)[known] != -1).all()


def test_deepconf_offline_lets_the_most_confident_vote():
    trees = hand_made(answer=[[0, 0, 1, 1, 1]], signal=[[0.9, 0.8, 0.3, 0.2, 0.1]])
    for keep, answer in ((0.01, 0), (0.4, 0), (0.99, 0), (1.0, 0)):
        slot = DeepConfOffline(READER, 5, keep).choose(trees).slot[0]
        assert trees.answer[0, slot] == answer
    assert DeepConfOffline(READER, 5, 1.0, sharpness=0.01).choose(trees).slot[0] == 2


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_bar_is_numpys_quantile_of_the_slots_that_count(keep: float):
    rng = np.random.default_rng(0)
    values, among = rng.random((20, 6)), rng.random((20, 6)) < 0.6
    for found, row, mask in zip(lower_bound(values, among, keep), values, among, strict=True):
        assert np.isclose(found, np.quantile(row[mask], 1 - keep)) if mask.any() else found == -np.inf


def test_pruning_saves_tokens_and_never_all_branches():
    everything = run(Fixed(READER, MAJORITY, ROLLOUTS)).tokens
    for policy in (
        ValuePruning(READER, ROLLOUTS, 1.1),
        LengthPruning(READER, ROLLOUTS, 1),
        RandomPruning(READER, ROLLOUTS, 1.0),
    ):
        played = run(policy)
        assert (played.tokens <= everything).all() and played.tokens.sum() < everything.sum() / 2
        assert played.trees.finished.any(-1).all()


def test_value_pruning_keeps_the_most_valuable_when_all_are_poor():
    trees = Trees.empty(1, 3, 1)
    trees.status[:] = Status.RUNNING
    trees.length[:] = 5
    trees.signals[..., 0] = [[0.1, 0.3, 0.2]]
    assert ValuePruning(READER, 3, 0.5).decide(trees, 8).run.tolist() == [[False, True, False]]
    trees.status[0, 0] = Status.FINISHED
    assert not ValuePruning(READER, 3, 0.5).decide(trees, 8).run.any()


def test_a_branch_of_which_only_the_prompt_was_read_is_not_pruned():
    trees = Trees.empty(1, 3, 1)
    trees.status[0, 0] = Status.RUNNING
    trees.length[0, 0] = 1
    decided = ValuePruning(READER, 3, 0.5).decide(trees, 8)
    assert decided.run[0, 0] and decided.start[0] == 2


def test_length_pruning_leaves_no_second_branch_far_above_the_cap():
    cap = 10
    played = run(LengthPruning(READER, ROLLOUTS, cap))
    assert ((played.trees.length >= cap + INTERVAL).sum(-1) <= 1).all()
    fixed = run(Fixed(READER, MAJORITY, ROLLOUTS))
    assert (played.trees.finished <= fixed.trees.finished).all()


def test_random_pruning_is_a_function_of_the_seed_and_independent_of_the_batch():
    policy = RandomPruning(READER, ROLLOUTS, 0.2, 3)
    whole = run(policy)
    assert np.array_equal(whole.tokens, run(policy).tokens)
    assert not np.array_equal(whole.tokens, run(RandomPruning(READER, ROLLOUTS, 0.2, 4)).tokens)
    trees = whole.trees
    rows = np.arange(0, len(trees), 3)
    assert np.array_equal(policy.keep(trees)[rows], policy.keep(trees.take(rows)))


def test_random_pruning_drops_at_its_rate():
    parts = (np.arange(300)[:, None], np.arange(20)[None], np.arange(9, 29)[None])
    chance = hashed_uniform(0, parts)
    assert chance.shape == (300, 20)
    assert stats.kstest(chance.ravel(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(chance[:, 0], chance[:, 1])[0, 1]) < 0.2


def test_fixed_style_drops_other_styles_and_replaces_them():
    policy = FixedStyle(READER, 2, 1)
    played = run(policy)
    style = policy.score(played.trees, Source.STYLE)
    kept = played.trees.finished & (style == 1)
    full = played.trees.used.all(-1)
    assert ((kept.sum(-1) >= 2) | full).all()
    slot = policy.choose(played.trees).slot
    chosen = np.take_along_axis(style, slot[:, None], 1)[:, 0]
    assert (chosen == 1)[(kept & answered(played.trees)).any(-1)].all()


def test_fixed_style_stops_a_branch_once_its_style_shows():
    trees = Trees.empty(1, 6, 1)
    trees.status[0, :3] = Status.RUNNING
    trees.length[0, :3] = 5
    trees.signals[0, :3, 0] = [0, 1, UNKNOWN_STYLE]
    decided = FixedStyle(READER, 4, 1).decide(trees, 8)
    assert decided.run[0].tolist() == [False, True, True, False, False, False]
    assert decided.start[0] == 2


# The registry.


def test_the_registry_is_small_and_its_names_are_unique():
    names = [policy.name for policy in POLICIES]
    assert len(set(names)) == len(names) <= 220
    assert [p.k for p in REGISTRY["majority"]] == list(range(1, 25))
    assert all(p.signals == len(p.sources) for p in POLICIES)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(INTERVAL + 1, 120),
    latency=st.integers(INTERVAL + 1, 60),
    branches=st.integers(1, 5),
)
def test_no_policy_leaves_its_budget(seed: int, tokens: int, latency: int, branches: int):
    pool = synthetic(seed, prompts=4, rollouts=5)
    orders = pool_orders(4, 5, 1, seed)
    for policy in POLICIES:
        played = run(policy, pool, orders, tokens=tokens, latency=latency, branches=branches)
        assert (played.tokens <= tokens).all() and (played.latency <= latency).all()
        assert (played.samples <= branches).all()
        assert (played.trees.parent == ROOT).all()

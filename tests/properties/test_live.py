"""Live sampling on engines that follow a script: nothing is lost, nothing is overspent, and replay agrees."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

from tests.doubles import CELLS, FIRST_RESPONSE_TOKEN, STOP_TOKEN, Script, ScriptedSession
from ziprc.engines.base import Request, Session, Step
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.sampling import features
from ziprc.sampling.controller import NONE, Budget, Choice, Controller, Decision, Policy
from ziprc.sampling.fitting import Calibration
from ziprc.sampling.live.records import Answered, Answers, Decided, Event, Question
from ziprc.sampling.live.runner import Runner
from ziprc.sampling.policies.base import Best, Reader, Source, Vote
from ziprc.sampling.policies.deepconf import DeepConfOffline, DeepConfOnline
from ziprc.sampling.policies.fixed import Fixed
from ziprc.sampling.policies.pruning import LengthPruning, RandomPruning, ValuePruning
from ziprc.sampling.policies.stopping import AdaptiveConsistency, SequentialStop
from ziprc.sampling.policies.zip_rc_plus import ZipRCPlus
from ziprc.sampling.replay import Pool, replay, track
from ziprc.sampling.score import Logistic, Stages
from ziprc.sampling.selection import VoteModel
from ziprc.sampling.tree import ROOT, Status, Trees
from ziprc.store.digests import derived_seed
from ziprc.tables.rollouts import FinishReason

GRID = BinGrid((0.0, 1.0), (0, 4, 8, 16, 32))
assert GRID.size == CELLS
BLOCKS, CASES = 10, 100
ROUNDING = 1e-5  # signals are float32, up to 10 in size, from joints that are summed in another order


# --- policies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Erratic:
    """Runs, starts, branches and stops at random, with more than there is; its chance is a hash of the prompt's tree."""

    seed: int = 0
    signals: int = 2
    rates: tuple[float, float, float] = (0.5, 0.4, 0.4)  # of running a slot, starting, branching
    can_branch: bool = True
    name: str = "erratic"

    def read(self, joint: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return np.concatenate([joint, seen], -1)[:, CELLS - 1 :][:, : self.signals]

    def decide(self, trees: Trees, interval: int) -> Decision:
        out = Decision.stop(trees)
        for p in range(len(trees)):
            rng = np.random.default_rng([self.seed, *trees.length[p].tolist(), *trees.status[p].tolist()])
            out.run[p] = rng.random(trees.slots) < self.rates[0]
            out.priority[p] = rng.random(trees.slots)
            out.start[p] = rng.choice([1, 2, 1000]) * (rng.random() < self.rates[1])
            if rng.random() < self.rates[2]:
                out.branch[p] = slot = rng.choice(np.flatnonzero(trees.used[p]))
                out.branch_at[p] = rng.integers(trees.length[p, slot] - trees.finished[p, slot] + 1)
        return out

    def choose(self, trees: Trees) -> Choice:
        return Choice(trees.finished.argmax(-1), np.full(len(trees), 0.5))


def logistic(rng: np.random.Generator, inputs: int) -> Logistic:
    weight = rng.normal(0, 0.2, inputs + inputs * (inputs + 1) // 2)
    return Logistic((0.0,) * inputs, (1.0,) * inputs, tuple(weight.tolist()), 0.0)


def zip_rc_plus(rng: np.random.Generator, price: float, can_branch: bool = False) -> ZipRCPlus:
    stages = Stages((logistic(rng, 9), logistic(rng, 9)))
    calibration = Calibration(stages, logistic(rng, 9), VoteModel(), 2.0)
    return ZipRCPlus(calibration, GRID, price, can_branch=can_branch)


READER = Reader(GRID, logistic(np.random.default_rng(1), 7))
BASELINES: list[Policy] = [
    Fixed(READER, k=1),
    Fixed(READER, Vote(Source.LOGISTIC), 4),
    Fixed(READER, Best(Source.VALUE), 3),
    DeepConfOffline(READER, 4),
    AdaptiveConsistency(READER, k_max=5),
    SequentialStop(READER, threshold=0.6, k_max=5),
    DeepConfOnline(READER, 5, 2, batch=2),
    ValuePruning(READER, 4, threshold=0.4),
    LengthPruning(READER, 3, cap=9),
    RandomPruning(READER, 4, rate=0.2),
]


def policy(rng: np.random.Generator) -> Policy:
    kind = rng.integers(4)
    if kind == 0:
        return BASELINES[rng.integers(len(BASELINES))]
    if kind == 1:
        return zip_rc_plus(rng, float(rng.choice([1e-6, 0.002, 0.01, 0.05])), can_branch=True)
    return Erratic(int(rng.integers(1000)), int(rng.integers(4)), tuple(rng.uniform(0.2, 1, 3).tolist()))


# --- cases ----------------------------------------------------------------------------------------------------------


class Watched(ScriptedSession):
    """Counts the steps in which each prompt was served, and the prompts that ever were in flight together."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.served: Counter[int] = Counter()
        self.most = 0

    def step(self) -> Step | None:
        self.most = max(self.most, len({number(key) for key in self.rows}))
        step = super().step()
        self.served.update({number(key) for key in (step.keys if step else ())})
        return step


def number(key: str) -> int:
    """The question that a request belongs to; -1 where a prompt is only tried."""
    index, colon, _ = key.partition(":")
    return int(index) if colon else -1


def answer_of(prompt: int, token_ids: Sequence[int]) -> int | None:
    """Three answers and none, by the last token but the stop token."""
    assert token_ids[-1] == STOP_TOKEN
    found = token_ids[-2] % 4
    return None if found == 3 else found


@dataclass(frozen=True)
class Case:
    controller: Controller
    questions: list[Question]
    script: Script
    window: int = 1
    max_new_tokens: int = 30
    in_flight: int = 4
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        own = {"window": self.window, "max_new_tokens": self.max_new_tokens, "in_flight": self.in_flight}
        return {**own, "cells": CELLS}


def questions(rng: np.random.Generator, count: int) -> list[Question]:
    prompts = [tuple(rng.integers(10, FIRST_RESPONSE_TOKEN, rng.integers(1, 9)).tolist()) for _ in range(count)]
    return [Question(f"q{i}", prompt, int(rng.integers(1 << 40))) for i, prompt in enumerate(prompts)]


def budget(rng: np.random.Generator) -> Budget:
    interval = int(rng.integers(1, 9))
    tokens, latency = (interval + 1 + int(rng.integers(0, 80)) for _ in range(2))
    hard = rng.random(2) < 0.5
    return Budget(
        branches=int(rng.integers(1, 7)),
        tokens=tokens if hard[0] else 1 << 30,
        latency=latency if hard[1] else 1 << 30,
        interval=interval,
    )


def case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    script = Script(
        stop=rng.uniform(0.02, 0.3),
        seats=int(rng.choice([1, 2, 5, 1000])),
        pace=rng.uniform(0.3, 1.0),
        seeded=bool(rng.random() < 0.7),
    )
    return Case(
        Controller(policy(rng), limits := budget(rng)),
        questions(rng, int(rng.integers(1, 6))),
        script,
        window=int(rng.integers(1, 5)),
        max_new_tokens=limits.interval + int(rng.integers(0, 25)),
        in_flight=int(rng.integers(1, 5)),
        seed=seed,
    )


def played(case: Case, session: ScriptedSession | None = None, **options: Any) -> list[Answered]:
    """In the order of the questions."""
    session = session or Watched(case.script, case.seed)
    found = list(Runner(session, case.controller, case.questions, answer_of, **case.settings, **options).run())
    return sorted(found, key=lambda one: one.index)


# --- what always holds ----------------------------------------------------------------------------------------------


def check_texts(case: Case, answered: Answered, session: ScriptedSession) -> None:
    """Every token that the engine emitted for a prompt is in its tree, once, and every request continued what was there."""
    question, generated = answered.question, 0
    for slot, branch in enumerate(answered.branches):
        inherited = answered.branches[branch.parent].token_ids[: branch.fork] if branch.parent != ROOT else ()
        assert len(inherited) == branch.fork
        text, segment = list(inherited), 0
        while (key := f"{answered.index}:{question.key}/{slot}/{segment}") in session.requests:
            request = session.requests[key]
            assert request.prompt_token_ids == (*question.prompt_token_ids, *text)
            assert request.seed == derived_seed(question.seed, slot, segment)
            assert request.max_new_tokens == case.max_new_tokens - len(text)
            text += session.emitted[key]
            generated += len(session.emitted[key])
            segment += 1
        assert segment >= 1 and branch.token_ids == tuple(text)
        assert (branch.finish_reason is FinishReason.STOP) == (text[-1:] == [STOP_TOKEN])
        assert (branch.finish_reason is FinishReason.LENGTH) == (
            len(text) == case.max_new_tokens and text[-1] != STOP_TOKEN
        )
    emitted = sum(len(tokens) for key, tokens in session.emitted.items() if number(key) == answered.index)
    assert answered.tokens == generated == emitted == sum(branch.generated for branch in answered.branches)
    assert answered.prefill == sum(n for key, n in session.computed.items() if number(key) == answered.index)


def check_budget(case: Case, answered: Answered, session: Watched) -> None:
    limits = case.controller.budget
    assert 1 <= len(answered.branches) <= limits.branches
    assert answered.tokens <= limits.tokens
    assert answered.latency == session.served[answered.index] <= limits.latency
    before = None
    for decided in answered.decisions:
        trees = decided.trees
        waiting = trees.used[0] & (trees.length[0] == 0)
        assert (trees.signals[0, waiting] == trees.root[0]).all(), "a branch without a token is in the prompt's state"
        if before is not None:
            grown = (trees.generated - before.trees.generated)[0]
            kept = before.decision.run[0] | ~before.trees.used[0]
            assert (grown[kept] <= limits.interval).all() and (grown[~kept] == 0).all()
        before = decided
    first, last = answered.decisions[0], answered.decisions[-1]
    assert (first.step, first.tokens) == (1, 1) and first.trees.length[0, 0] == 1
    assert (last.step, last.tokens) == (answered.latency, answered.tokens) and not last.decision.going.any()


def check_answer(answered: Answered) -> None:
    assert answered.error is None and answered.lost == 0
    branch = answered.branches[answered.slot]
    if any(one.finish_reason for one in answered.branches):
        assert branch.finish_reason is not None
    else:
        assert answered.probability == 0
    ends = answered.decisions[-1].trees
    for slot, one in enumerate(answered.branches):
        said = answer_of(0, one.token_ids) if one.finish_reason is FinishReason.STOP else None
        assert ends.answer[0, slot] == (-1 if said is None else said)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_whatever_engine_and_policy_do_nothing_is_lost_or_overspent(block: int) -> None:
    resumed = branched = 0
    for seed in range(block * CASES, (block + 1) * CASES):
        one = case(seed)
        session = Watched(one.script, seed)

        def watch(event: Event, session: Watched = session) -> None:
            nonlocal resumed, branched
            resumed, branched = resumed + event.applied.resumed.sum(), branched + event.applied.branched.sum()
            new = event.applied.started.sum() + event.applied.branched.sum()
            flying = sum(number(key) == event.index for key in session.rows)
            assert flying == event.decided.decision.run.sum() + new, "running branches are requests in flight"
            assert len(event.token_ids) == event.decided.trees.used.sum() + new

        answers = played(one, session, on_event=watch)
        assert [answered.index for answered in answers] == list(range(len(one.questions))), "each is answered once"
        assert session.most <= one.in_flight and not session.rows and not session.closed
        for answered in answers:
            check_texts(one, answered, session)
            check_budget(one, answered, session)
            check_answer(answered)
    assert resumed > CASES / 2 and branched > CASES / 2


def same(ours: Trees | Decision, theirs: Trees | Decision) -> None:
    for each in fields(ours):
        left, right = getattr(ours, each.name), getattr(theirs, each.name)
        if left.dtype.kind == "f":
            np.testing.assert_allclose(left, right, rtol=ROUNDING, atol=ROUNDING, err_msg=each.name)
        else:
            np.testing.assert_array_equal(left, right, err_msg=each.name)


def test_a_decision_can_be_taken_again_from_what_was_recorded() -> None:
    taken = 0
    for seed in range(100):
        one = case(seed)
        for answered in played(one):
            for decided in answered.decisions:
                same(decided.decision, one.controller.decide(decided.trees.take(np.array([0]))))
                taken += 1
    assert taken > 500


def test_a_run_can_be_repeated_and_others_in_flight_do_not_matter() -> None:
    one = case(3)
    one = replace(one, script=Script(stop=0.1), questions=questions(np.random.default_rng(3), 6))
    alone = played(replace(one, in_flight=1))
    for left, right in zip(alone, played(one), strict=True):
        assert (left.branches, left.slot, left.tokens) == (right.branches, right.slot, right.tokens)


# --- replay ---------------------------------------------------------------------------------------------------------


def whole_responses(session: Session, asked: Sequence[Question], slots: int, cap: int) -> Iterator[dict[str, Any]]:
    """The response of every question's every slot, as it is when nobody interferes."""
    for n, question in enumerate(asked):
        for k in range(slots):
            seed = derived_seed(question.seed, k, 0)
            session.add(Request(f"{n}:{k}", question.prompt_token_ids, seed, cap))
    rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    while (step := session.step()) is not None:
        columns = (step.token_ids.tolist(), step.finish, step.joint, step.log_prob, step.entropy)
        for key, *row in zip(step.keys, *columns, strict=True):
            rows[key].append(tuple(row))
    for n in range(len(asked)):
        for k in range(slots):
            tokens, finish, joint, log_prob, entropy = zip(*rows[f"{n}:{k}"], strict=True)
            yield {
                "tokens": tokens, "finished": finish[-1] is FinishReason.STOP, "joint": np.stack(joint),
                "log_prob": np.array(log_prob), "entropy": np.array(entropy),
            }  # fmt: skip


def pool_of(asked: Sequence[Question], responses: Sequence[dict[str, Any]], answers: Answers) -> Pool:
    """Recorded rollouts [N, K] from one dictionary each."""
    shape = (len(asked), len(responses) // len(asked))
    length = np.array([len(one["tokens"]) for one in responses], np.int32)
    answer = [answers(0, one["tokens"]) if one["finished"] else None for one in responses]
    numbers = np.array([-1 if a is None else a for a in answer], np.int32).reshape(shape)
    log_prob, entropy, joint = (np.concatenate([one[k] for one in responses]) for k in ("log_prob", "entropy", "joint"))
    return Pool(
        length=length.reshape(shape),
        finished=np.array([one["finished"] for one in responses]).reshape(shape),
        answer=numbers,
        score=(numbers == 0).astype(np.float32),
        prompt_tokens=np.array([len(q.prompt_token_ids) for q in asked], np.int32),
        joint=joint,
        features=track(length, log_prob, entropy),
    )


@pytest.mark.parametrize("log_prob", [None, -0.5])
@pytest.mark.parametrize("name", ["majority", "zip-rc-plus", "baselines", "tight"])
def test_without_branching_live_is_replay(name: str, log_prob: float | None) -> None:
    """A resumed branch guesses one log-probability, so it is left out unless all are equal to their mean."""
    rng = np.random.default_rng(len(name))
    script = Script(stop=0.08, seeded=False, log_prob=log_prob)
    asked, slots, cap = questions(rng, 25), 5, 40
    pool = pool_of(asked, list(whole_responses(ScriptedSession(script), asked, slots, cap)), answer_of)
    limits = Budget(branches=slots, interval=3, **({"tokens": 60, "latency": 50} if name == "tight" else {}))
    policies: Sequence[Policy] = {
        "majority": [Fixed(Reader(GRID), k=4)],
        "zip-rc-plus": [zip_rc_plus(rng, price) for price in (0.001, 0.01)],
        "baselines": BASELINES,
        "tight": [zip_rc_plus(rng, 1e-6), Fixed(Reader(GRID), k=5)],
    }[name]
    compared = 0
    for one in policies:
        for window in (1, 3):
            controller = Controller(one, limits)
            live = played(Case(controller, asked, script, window, cap, in_flight=7))
            compared += sum(equal_to_replay(controller, pool, window, live, resumes=log_prob is not None))
    assert compared >= (0.1 if log_prob is None else 0.5) * 2 * len(policies) * len(asked)


def equal_to_replay(
    controller: Controller, pool: Pool, window: int, live: Sequence[Answered], resumes: bool
) -> Iterator[bool]:
    """Which prompts were compared: all, or those of which no branch was resumed."""
    seen: dict[int, list[Decided]] = defaultdict(list)

    def observe(episodes: np.ndarray, trees: Trees, decision: Decision) -> None:
        copy = trees.take(np.arange(len(trees)))
        for i, episode in enumerate(episodes.tolist()):
            rows = slice(i, i + 1)
            mine = Decision(**{f.name: getattr(decision, f.name)[rows] for f in fields(decision)})
            seen[episode].append(Decided(copy.take(np.array([i])), mine))

    shape = pool.length.shape
    order = np.tile(np.arange(shape[1]), (1, shape[0], 1))
    signals = controller.policy.read(pool.smoothed(window), pool.features)
    then = replay(controller, pool, signals, order, observe)
    for n, now in enumerate(live):
        paused = [d.trees.status[0] == Status.PAUSED for d in seen[n]]
        again = [
            p & d.decision.run[0] & ((not resumes) | (d.trees.length[0] == 1))
            for p, d in zip(paused, seen[n], strict=True)
        ]
        if np.any(again):  # after one token there is no mean yet
            yield False
            continue
        assert len(now.decisions) == len(seen[n])
        for ours, theirs in zip(now.decisions, seen[n], strict=True):
            same(ours.trees, theirs.trees)
            same(ours.decision, theirs.decision)
        assert (now.tokens, now.latency, len(now.branches)) == (then.tokens[n], then.latency[n], then.samples[n])
        assert now.probability == pytest.approx(then.probability[n], abs=1e-6)
        assert now.slot == controller.choose(then.trees.take(np.array([n]))).slot[0]
        yield True


# --- states that are taken up again ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BranchOnce(Erratic):
    """One sample of `at + 4` tokens, then a branch from its first `at`, then both to the end."""

    at: int = 3
    signals: int = CELLS + 8

    def read(self, joint: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return np.concatenate([joint, seen], -1)

    def decide(self, trees: Trees, interval: int) -> Decision:
        out = Decision.stop(trees)
        out.run = trees.running
        now = (trees.length[:, 0] >= self.at + 4) & ~trees.used[:, 1]
        out.branch, out.branch_at = np.where(now, 0, NONE), np.full(len(trees), self.at)
        return out


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_branch_reads_what_it_would_have_read_without_its_parent(window: int, at: int) -> None:
    """In a script whose tokens hang on the text alone, the branch repeats its parent: all its readings must be equal."""
    script, asked = Script(stop=0.0, seeded=False), questions(np.random.default_rng(0), 3)
    if at == 0:  # the first token hangs on the seed
        asked = [replace(q, prompt_token_ids=(*q.prompt_token_ids, FIRST_RESPONSE_TOKEN)) for q in asked]
    controller = Controller(BranchOnce(at=at), Budget(branches=2, interval=1))
    everybody = played(Case(controller, asked, script, window, 20))
    assert len(everybody) == len(asked)
    for answered in everybody:
        parent, child = answered.branches
        assert (child.parent, child.fork, child.token_ids) == (0, at, parent.token_ids)
        of_parent = {int(d.trees.length[0, 0]): d.trees.signals[0, 0] for d in answered.decisions}
        compared = 0
        for decided in answered.decisions:
            spot = int(decided.trees.spot[0, 0])
            assert spot == decided.trees.signals[0, 0, CELLS + features.SLIP] < max(1, decided.trees.length[0, 0])
            if spot:
                np.testing.assert_allclose(decided.trees.spot_signals[0, 0], of_parent[spot + 1], atol=1e-6)
            if decided.trees.used[0, 1]:
                np.testing.assert_allclose(
                    decided.trees.signals[0, 1], of_parent[int(decided.trees.length[0, 1])], atol=1e-6
                )
                compared += 1
        assert compared > 10


# --- failures -------------------------------------------------------------------------------------------------------

GUILTY = 2


class Faulty(RuntimeError):
    keys: tuple[str, ...] = ()


def fail_on(prompt: int, named: bool = False) -> Any:
    """Raises when a branch of the prompt has five tokens."""

    def fail(session: ScriptedSession) -> None:
        for key, row in session.rows.items():
            if number(key) == prompt and row.emitted >= 5:
                error = Faulty("out of luck")
                error.keys = (key,) if named else ()
                raise error

    return fail


@pytest.fixture
def calm() -> Case:
    """Six prompts under a plain policy."""
    controller = Controller(Fixed(Reader(GRID), k=3), Budget(branches=3, interval=4))
    return Case(controller, questions(np.random.default_rng(5), 6), Script(stop=0.05), in_flight=3)


def untouched(answers: Sequence[Answered], case: Case, but: set[int]) -> None:
    """All except these were answered as if nothing had happened."""
    for now, then in zip(answers, played(case), strict=True):
        if now.index not in but:
            assert now.error is None
            assert (now.branches, now.slot, now.tokens) == (then.branches, then.slot, then.tokens)


def test_an_engine_that_names_the_request_fails_that_prompt_only(calm: Case) -> None:
    session = ScriptedSession(calm.script, fail=fail_on(GUILTY, named=True))
    answers = played(calm, session)
    untouched(answers, calm, {GUILTY})
    assert answers[GUILTY].error == ("Prompt q2: the engine failed while it was in flight: Faulty: out of luck")
    assert answers[GUILTY].slot == NONE and answers[GUILTY].tokens >= 5 and not session.rows


def test_an_engine_that_breaks_fails_only_the_prompt_that_breaks_it(calm: Case) -> None:
    opened: list[ScriptedSession] = []

    def fresh() -> ScriptedSession:
        opened.append(ScriptedSession(calm.script, fail=fail_on(GUILTY)))
        return opened[-1]

    answers = played(calm, fresh(), new_session=fresh)
    untouched(answers, calm, {GUILTY})
    assert "Prompt q2" in str(answers[GUILTY].error) and "out of luck" in str(answers[GUILTY].error)
    assert {one.index for one in answers if one.lost} >= {GUILTY}
    assert all(session.closed for session in opened) and 2 <= len(opened) <= 3
    emitted = sum(len(tokens) for session in opened for tokens in session.emitted.values())
    assert emitted == sum(one.tokens + one.lost for one in answers)


def test_a_passing_fault_costs_nobody_the_answer(calm: Case) -> None:
    first = ScriptedSession(calm.script, fail=fail_on(GUILTY))
    answers = played(calm, first, new_session=lambda: ScriptedSession(calm.script))
    untouched(answers, calm, set())


def test_without_another_session_everybody_is_told(calm: Case) -> None:
    answers = played(calm, ScriptedSession(calm.script, fail=fail_on(0)))
    assert all(f"Prompt {one.question.key}: " in str(one.error) and one.slot == NONE for one in answers)
    assert sum("never started" in str(one.error) for one in answers) == 3


def test_an_engine_that_stays_broken_ends_the_run_with_both_errors(calm: Case) -> None:
    def gone() -> ScriptedSession:
        raise OSError("no device")

    answers = played(calm, ScriptedSession(calm.script, fail=fail_on(0)), new_session=gone)
    assert all("out of luck" in str(one.error) and "no device" in str(one.error) for one in answers)


def test_an_engine_that_forgets_requests_does_not_hang_the_run(calm: Case) -> None:
    def forget(session: ScriptedSession) -> None:
        if any(row.emitted > 3 for row in session.rows.values()):
            session.rows.clear()

    answers = played(calm, ScriptedSession(calm.script, fail=forget))
    assert all("nothing in flight" in str(one.error) for one in answers)


def test_an_answer_that_cannot_be_read_fails_its_prompt_only(calm: Case) -> None:
    def brittle(prompt: int, token_ids: Sequence[int]) -> int | None:
        if prompt == GUILTY:
            raise ValueError("not a number")
        return answer_of(prompt, token_ids)

    session = ScriptedSession(calm.script)
    found = sorted(
        Runner(session, calm.controller, calm.questions, brittle, **calm.settings).run(), key=lambda one: one.index
    )
    untouched(found, calm, {GUILTY})
    assert found[GUILTY].error == "Prompt q2: its answer could not be read: ValueError: not a number"
    assert not session.rows


def test_a_broken_invariant_of_ours_ends_the_run_and_is_no_failure_of_a_prompt(calm: Case) -> None:
    def broken(module: str) -> Callable[[ScriptedSession], None]:
        def fail(session: ScriptedSession) -> None:
            exec("raise AssertionError('does not hold')", {"__name__": module})

        return fail

    with pytest.raises(AssertionError, match="does not hold"):
        played(calm, ScriptedSession(calm.script, fail=broken("ziprc.engines.vllm")))
    foreign = played(calm, ScriptedSession(calm.script, fail=broken("vllm.v1.engine.core")))
    assert foreign and all("does not hold" in answered.error for answered in foreign)


# --- what is refused, and what is told ------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_refused_before_the_engine_starts(calm: Case) -> None:
    long = Question("endless", (10,) * 90, 0)
    session = ScriptedSession(replace(calm.script, max_model_len=100))
    with pytest.raises(UserError, match="endless has 90 prompt tokens and may add 30"):
        played(replace(calm, questions=[*calm.questions, long]), session)
    with pytest.raises(UserError, match="void has 0 prompt tokens"):
        played(replace(calm, questions=[*calm.questions, Question("void", (), 0)]), session)
    assert not any(session.emitted.values())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"in_flight": 0}, "in_flight must be at least 1"),
        ({"max_new_tokens": 3}, "max_new_tokens is 3, less than one decision interval of 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(calm: Case, setting: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        played(replace(calm, **setting))


def test_whoever_stops_listening_leaves_nothing_in_flight(calm: Case) -> None:
    session = ScriptedSession(calm.script)
    answers = Runner(session, calm.controller, calm.questions, answer_of, **calm.settings).run()
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not session.rows


def test_nothing_is_asked_nothing_is_answered(calm: Case) -> None:
    assert played(replace(calm, questions=[])) == []


def test_the_clock_is_divided_without_remainder(calm: Case) -> None:
    ticks = iter(range(1 << 20))
    session = ScriptedSession(calm.script)
    runner = Runner(
        session, calm.controller, calm.questions, answer_of, **calm.settings, seconds=lambda: float(next(ticks))
    )
    answers = list(runner.run())
    spent = runner.timing
    assert spent.steps > 0 and spent.decisions > 0
    parts = spent.deciding_s, spent.requesting_s, spent.tracking_s, spent.stepping_s
    assert min(parts) > 0 and sum(parts) < spent.total_s
    assert all(one.seconds > 0 for one in answers)

"""Accuracy against tokens, frontier.json on two small pools, and the tables of live decisions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.doubles import Script, ScriptedSession
from tests.properties.test_live import GRID as LIVE_GRID
from tests.properties.test_live import BranchOnce, Erratic, answer_of, fail_on, questions, zip_rc_plus
from tests.unit.test_sampling import GRID, planted
from ziprc.config.zip_rc import Frontier
from ziprc.evaluation.bootstrap import Resampling
from ziprc.evaluation.samplers import record as module
from ziprc.evaluation.samplers.decisions import decision_table, live_record, ungraded_answers, with_grades
from ziprc.evaluation.samplers.frontier import Comparison, Family, Mixture, Outcome, Player, choose_and_play, hull
from ziprc.evaluation.samplers.pools import RecordedPool
from ziprc.evaluation.samplers.record import arena, sampling_record, sweep_of
from ziprc.rewards.base import Verdict, ungraded
from ziprc.rewards.base import graded as grade
from ziprc.sampling.controller import NONE, Budget, Controller, Policy
from ziprc.sampling.families import PLUS, PUBLISHED, Setting, ablations, competitors, live_setting, ours, single
from ziprc.sampling.fitting import Fitted
from ziprc.sampling.live.records import Answered
from ziprc.sampling.live.runner import Runner
from ziprc.sampling.policies.base import Reader
from ziprc.sampling.policies.fixed import Fixed
from ziprc.sampling.policies.pruning import ValuePruning
from ziprc.sampling.policies.zip_rc_plus import ZipRCPlus
from ziprc.sampling.replay import pool_orders
from ziprc.sampling.tree import ROOT, Status, Trees
from ziprc.tables.grades import GradeStatus

ROUNDED = 2e-6  # differences of numbers with six decimals


# The hull.


@settings(max_examples=50, deadline=None)
@given(points=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12))
def test_no_setting_lies_above_the_mixtures_of_those_that_are_kept(points: list[tuple[int, int]]):
    tokens, accuracy = np.array(points, float).T
    kept = hull(tokens, accuracy)
    x, y = tokens[kept], accuracy[kept]
    assert (np.diff(x) > 0).all() and (np.diff(y) > 0).all(), "dearer is better"
    slopes = np.diff(y) / np.diff(x)
    assert (np.diff(slopes) < 0).all(), "and each is needed"
    assert x[0] == tokens.min() and y[-1] == accuracy.max()
    assert (accuracy <= np.interp(tokens, x, y) + 1e-9).all()


def test_of_equal_settings_one_is_kept():
    assert hull(np.array([2.0, 2.0, 1.0]), np.array([5.0, 5.0, 1.0])) == [2, 0]


# Families at equal cost.


def outcome(tokens: float | Sequence[float], accuracy: float | Sequence[float], name: str = "x") -> Outcome:
    cost, right = np.broadcast_arrays(np.atleast_1d(tokens).astype(float), np.atleast_1d(accuracy).astype(float))
    whose = np.arange(len(cost))
    return Outcome(name, right, cost, cost / 2, np.ones(len(cost)), whose, right, right)


def family(*outcomes: Outcome) -> Family:
    return Family("f", [], outcomes, tried=len(outcomes))


def comparison(budgets: dict[str, float], prompts: int = 2, plain: Sequence[float] = (1.0,)) -> Comparison:
    return Comparison(Resampling(np.arange(prompts), 10, 0), budgets, np.array(plain), 0.25, 0.95)


costs = st.lists(st.floats(1, 1000), min_size=1, max_size=6, unique=True)


@settings(max_examples=50, deadline=None)
@given(tokens=costs, budget=st.floats(1, 1500))
def test_a_family_costs_its_budget_unless_it_cannot(tokens: list[float], budget: float):
    found = family(*[outcome(t, 0.5) for t in tokens]).at(budget)
    if budget < min(tokens) * (1 - 1e-9):
        assert found is None
    elif found is not None:
        assert found.column("tokens").mean() == pytest.approx(min(budget, max(tokens)))
        assert -1e-6 <= found.share <= 1
        between = [t for t in tokens if found.low.tokens[0] < t < found.high.tokens[0]]
        assert not between, "the mixture is of neighbours"


def test_a_mixture_is_the_expectation_of_playing_either():
    mixture = Mixture(outcome([10, 30], [0, 1], "low"), outcome([40, 60], [1, 1], "high"), 0.25)
    assert mixture.column("tokens").tolist() == [17.5, 37.5] and mixture.column("accuracy").tolist() == [0.25, 1]
    assert mixture.likelier.name == "low" and replace(mixture, share=0.75).likelier.name == "high"


def test_comparisons_are_paired_over_prompts():
    right = np.random.default_rng(0).random(200)
    mine, theirs = family(outcome(1.0, right)), replace(family(outcome(1.0, right - 0.01)), name="theirs")
    gaps = comparison({"1": 1.0}, 200).difference(mine, [mine, theirs])["1"]
    assert gaps["f"] == {"value": 0, "low": 0, "high": 0}
    assert gaps["theirs"] == {"value": 0.01, "low": 0.01, "high": 0.01}, "what varies between prompts is in both"


def test_a_family_that_cannot_afford_a_budget_is_not_compared():
    cheap, dear = family(outcome([5, 5], [0, 1])), replace(family(outcome([50, 50], [1, 1])), name="dear")
    found = comparison({"1": 10.0, "10": 100.0}).difference(cheap, [dear])
    assert found["1"] == {} and found["10"]["dear"]["value"] == -0.5


def test_the_normalised_cost_is_in_samples_of_the_same_prompt():
    found = comparison({"1": 40.0}, plain=(10.0, 30.0)).record(family(outcome([20, 60], 1.0)))
    assert found["points"]["1"]["cost"] == 0.25 * 2 + 0.75 * 1  # serial steps are half of the tokens


def test_outcomes_are_means_over_the_episodes_of_each_prompt():
    pool, orders = planted(0), pool_orders(20, 5, 3, 0)
    player = Player(pool, orders, branches=5)
    found = player.play(Setting(Fixed(Reader(GRID), k=2)))
    rows = np.arange(20)[None, :, None]
    assert np.allclose(found.tokens, pool.length[rows, orders[:, :, :2]].sum(-1).mean(0))
    assert (found.samples == 2).all() and len(found.score) == 60
    assert np.allclose(found.accuracy, found.score.reshape(3, 20).mean(0))


# Choosing on validation, playing on test.


def recorded(seed: int, prompts: int = 30, rollouts: int = 6) -> RecordedPool:
    pool = planted(seed, prompts, rollouts, styles=2)
    difficulty = np.array([("easy", "hard")[n % 3 == 0] for n in range(prompts)])
    return RecordedPool(pool, GRID, [f"{seed}-{n}" for n in range(prompts)], difficulty, ["a", "b"])


@dataclass
class Watched(Player):
    """Remembers what it played."""

    names: list[str] = field(default_factory=list)

    def play(self, setting: Setting) -> Outcome:
        self.names.append(setting.name)
        return super().play(setting)


@pytest.fixture(scope="module")
def pools() -> tuple[RecordedPool, RecordedPool]:
    return recorded(1), recorded(2)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return Fitted.fit(planted(3, 150), GRID, 0)


def test_test_prompts_are_played_for_the_settings_that_validation_keeps_only(pools: Any):
    validation, test = (Watched(p.pool, pool_orders(30, 6, 1, 0), 6) for p in pools)
    settings = [Setting(Fixed(Reader(GRID), k=k)) for k in range(1, 7)]
    found = choose_and_play("majority", settings, validation, test)
    outcomes = [Player(validation.pool, validation.orders, 6).play(s) for s in settings]
    kept = hull(np.array([o.tokens.mean() for o in outcomes]), np.array([o.accuracy.mean() for o in outcomes]))
    assert validation.names == [s.name for s in settings]
    assert test.names == [s.name for s in found.settings] == [settings[i].name for i in kept]
    assert len(kept) < len(settings) == found.tried and "majority@1" in test.names


def own(**changes: Any) -> Frontier:
    small: dict[str, Any] = {
        "budgets": (1.5, 2, 4), "orders": 2, "branches": 6, "prices": 3, "intervals": (4,), "alphas": (0.1,),
        "betas": (0.01, 0.1), "published_samples": 3, "window": 4, "bootstrap": 20,
    }  # fmt: skip
    return Frontier(**(small | changes))


def test_policies_that_read_alike_share_a_reading_and_play_as_if_they_did_not(pools: Any, fitted: Fitted):
    validation, test = pools
    sweep = sweep_of(own(prices=2, betas=(0.1,)))
    found = ours(fitted, sweep) | ablations(fitted, sweep, validation.pool, 0)
    found |= competitors(fitted, 2, validation.pool.length.ravel())
    shared = Player(test.pool, pool_orders(30, 6, 1, 0), 4)
    for tries in found.values():
        for setting in (tries[0], tries[-1]):
            alone = Player(shared.pool, shared.orders, 4).play(setting)
            together = shared.play(setting)
            assert (alone.tokens == together.tokens).all() and (alone.probability == together.probability).all()


# frontier.json.


@pytest.fixture(scope="module")
def record(pools: Any, fitted: Fitted) -> dict[str, Any]:
    return sampling_record(own(), fitted, *pools, seed=0)


def test_the_record_is_json_and_holds_what_its_description_names(record: dict[str, Any]):
    json.dumps(record, allow_nan=False)
    described = {line.split()[0] for line in str(module.__doc__).splitlines()[2:] if line[:1].isalpha()}
    assert described <= set(record) and set(record) - described <= {"one_sample"}
    assert record["prompts"] == {"validation": 30, "test": 30, "rollouts": 6, "orders": 2}
    assert list(record["budgets"]) == ["1.5", "2", "4"] and list(record["oracle"]) == ["1", "2", "4"]
    assert {PLUS, PUBLISHED, "majority", "deepconf-online", "fixed-style"} <= set(record["families"])


def test_the_record_follows_from_pools_and_seed(record: dict[str, Any], pools: Any, fitted: Fitted):
    assert json.dumps(sampling_record(own(), fitted, *pools, seed=0)) == json.dumps(record)


def test_every_difference_is_that_of_the_points(record: dict[str, Any]):
    families, compared = record["families"], 0
    for budget, rivals in record["difference"].items():
        for name, gap in rivals.items():
            values = [families[n]["points"][budget]["accuracy"]["value"] for n in (PLUS, name)]
            assert gap["value"] == pytest.approx(values[0] - values[1], abs=ROUNDED)
            assert gap["low"] <= gap["value"] <= gap["high"]
            compared += 1
    assert compared > 30
    for name, one in record["ablations"].items():
        whole = families[name.partition(":")[0]]["points"]
        for budget, gap in one["difference"].items():
            values = [p[budget]["accuracy"]["value"] for p in (one["points"], whole)]
            assert gap["value"] == pytest.approx(values[0] - values[1], abs=ROUNDED)


def test_no_point_costs_more_than_its_budget(record: dict[str, Any]):
    for one in (*record["families"].values(), *record["ablations"].values()):
        dearest = max(tokens for _, tokens, _ in one["kept"])
        assert one["points"]
        for budget, point in one["points"].items():
            expected = min(record["budgets"][budget], dearest)
            assert point["tokens"] == pytest.approx(expected, rel=1e-6)
            assert 0 <= point["accuracy"]["value"] <= 1 and point["cost"] > 0 and point["samples"] >= 1


def test_everybody_may_fall_back_on_the_single_sample(record: dict[str, Any]):
    cheapest = min(record["families"]["majority"]["kept"], key=lambda kept: kept[1])
    assert cheapest[0] == "majority@1" and cheapest[1] == pytest.approx(record["one_sample"], abs=ROUNDED)
    for one in record["families"].values():
        assert min(tokens for _, tokens, _ in one["kept"]) <= record["one_sample"] + ROUNDED


def test_difficulties_together_are_the_whole(record: dict[str, Any]):
    cells = record["cells"]
    assert {name: cell["prompts"] for name, cell in cells.items()} == {"easy": 20, "hard": 10}
    for budget in ("2", "4"):
        for name in (PLUS, "majority"):
            for column in ("tokens", "samples"):
                mean = sum(cell["prompts"] * cell[budget][name][column] for cell in cells.values()) / 30
                assert mean == pytest.approx(record["families"][name]["points"][budget][column], abs=ROUNDED)


def test_what_the_joint_foretells_pays_at_equal_tokens(record: dict[str, Any]):
    """The planted joint tells right from wrong, so a vote without it must lose."""
    assert record["difference"]["2"]["majority"]["value"] > 0.05
    assert record["oracle"]["4"] > record["families"]["majority"]["points"]["4"]["accuracy"]["value"]


def test_live_runs_play_what_was_chosen(record: dict[str, Any], fitted: Fitted):
    for name in (PLUS, PUBLISHED):
        chosen = record["chosen"][name]
        assert [c["tokens"] for c in chosen] == sorted(c["tokens"] for c in chosen)
        for one in chosen:
            setting = live_setting(name, one["tokens"] / record["one_sample"], record, fitted)
            assert setting.name == one["name"]
        cheapest = live_setting(name, 0.01, record, fitted)
        assert cheapest.name == chosen[0]["name"]
    assert live_setting("majority", 4.0, record, fitted).name == "majority@4"
    wide, forking = (live_setting(f"{PLUS}-{word}", 4.0, record, fitted).policy for word in ("wide", "branching"))
    assert (wide.width, wide.can_branch, forking.can_branch) == (4, False, True)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_base_that_is_always_wrong_or_always_right_has_a_record_too(pools: Any, value: float):
    alike = [replace(p, pool=replace(p.pool, score=np.full_like(p.pool.score, value))) for p in pools]
    calibrated = Fitted.fit(alike[0].pool, GRID, 0)
    small = own(budgets=(2,), orders=1, prices=2, betas=(0.1,))
    found = sampling_record(small, calibrated, *alike, seed=0)
    json.dumps(found, allow_nan=False)
    assert all(gap["value"] == 0 for gap in found["difference"]["2"].values())
    assert live_setting(PLUS, 2.0, found, calibrated).policy == ours(calibrated, sweep_of(small))[PLUS][0].policy


def test_live_runs_of_a_calibrated_published_policy_are_calibrated(pools: Any, fitted: Fitted):
    found = choose_published(own(calibrated=True), pools, fitted)
    assert live_setting(PUBLISHED, 1e9, found, fitted).policy.calibration == fitted.joint


def choose_published(config: Frontier, pools: Any, fitted: Fitted) -> dict[str, Any]:
    """What frontier.json says about the published policy."""
    ring = arena(config, fitted, *pools, 0)
    settings = ours(fitted, sweep_of(config))[PUBLISHED]
    played = choose_and_play(PUBLISHED, [single(fitted), *settings], ring.validation, ring.test)
    return {"chosen": {PUBLISHED: module._chosen(ring, played, settings)}, "one_sample": ring.one_sample}


def headline(pools: Any, fitted: Fitted, difference: dict[str, Any]) -> dict[str, Any]:
    ring = arena(own(), fitted, *pools, 0)
    alone = choose_and_play("majority", [single(fitted)], ring.validation, ring.test)
    rows = module._headline(ring, {PLUS: alone, "majority": alone}, difference, {})
    return {row["name"]: row for row in rows}


ABOVE = "budgets at which it is above all of them (paired interval)"


def test_targets_say_whether_they_are_met(pools: Any, fitted: Fitted):
    sure, tie = {"value": 0.1, "low": 0.06, "high": 0.2}, {"value": 0.0, "low": -0.1, "high": 0.1}
    worse = {"value": -0.1, "low": -0.2, "high": 0.01}
    rows = headline(pools, fitted, {"1.5": {"majority": sure}, "2": {"majority": sure, "x": tie}, "4": {"x": worse}})
    assert rows[ABOVE]["result"] == 1 and rows[ABOVE]["met"] is False
    level = rows["budgets at which zip-rc-plus is on or above every other"]
    assert (level["result"], level["target"], level["met"]) == (2, 3, False)
    assert rows["gain over majority@2"] | {"name": ""} == {
        "name": "", "target": 0.05, "direction": "at least", "result": 0.1, "met": True,
    }  # fmt: skip
    assert rows["largest ECE of the probability of the answer"]["met"] is None


def test_above_all_means_above_each(pools: Any, fitted: Fitted):
    close, wide = {"value": 0.05, "low": 0.01, "high": 0.1}, {"value": 0.06, "low": -0.01, "high": 0.13}
    assert headline(pools, fitted, {"2": {"close": close, "wide": wide}})[ABOVE]["result"] == 0


# Decisions of live runs.

ASKED, LIVE_BRANCHES, CAP = 12, 4, 30


def live(policy: Policy, interval: int = 3, slots: int = LIVE_BRANCHES, fail: Any = None) -> list[Answered]:
    script, asked = Script(stop=0.06), questions(np.random.default_rng(1), ASKED)
    controller = Controller(policy, Budget(branches=slots, interval=interval))
    settings: dict[str, Any] = {"window": 2, "max_new_tokens": CAP, "cells": LIVE_GRID.size, "in_flight": 5}
    found = Runner(ScriptedSession(script, fail=fail), controller, asked, answer_of, **settings).run()
    return sorted(found, key=lambda one: one.index)


def graded(answers: Sequence[Answered], policy: Policy, interval: int, budget: str = "2") -> pa.Table:
    """Decisions, and grades of every finished branch that has an answer: 0 is right."""
    said = {
        (a.index, slot): int(a.decisions[-1].trees.answer[0, slot])
        for a in answers
        if a.decisions
        for slot in np.flatnonzero(a.decisions[-1].trees.finished[0]).tolist()
    }
    texts = {key: str(number) for key, number in said.items() if number >= 0}
    table = decision_table(answers, texts, Setting(policy, interval), budget)
    return with_grades(table, {pair: Verdict("exact", grade(pair[1] == "0")) for pair in ungraded_answers(table)})


def table_of(policy: Policy, answers: Sequence[Answered], interval: int = 3) -> pa.Table:
    return graded(answers, policy, interval)


POLICIES: dict[str, Policy] = {
    "plus": zip_rc_plus(np.random.default_rng(0), 0.003),
    "branching": zip_rc_plus(np.random.default_rng(3), 1e-4, can_branch=True),
    "majority": Fixed(Reader(LIVE_GRID), k=3),
    "pruning": ValuePruning(Reader(LIVE_GRID), k=4, threshold=0.45),
}


@pytest.fixture(scope="module", params=POLICIES)
def run(request: pytest.FixtureRequest) -> tuple[Policy, list[Answered], pa.Table]:
    policy = POLICIES[request.param]
    answers = live(policy)
    return policy, answers, table_of(policy, answers)


def test_every_prompt_has_one_selected_row_and_it_is_in_its_last_decision(run: Any):
    _, answers, table = run
    rows = table.to_pylist()
    selected = [row for row in rows if row["selected"]]
    assert [(row["prompt_id"], row["branch_id"]) for row in selected] == [(a.question.key, a.slot) for a in answers]
    for row, answered in zip(selected, answers, strict=True):
        assert row["action"] == "stop" and row["decision"] == len(answered.decisions) - 1
        assert row["tokens_spent"] == answered.tokens and row["step"] == answered.latency
        assert row["probability"] == pytest.approx(answered.probability) and row["prefill"] == answered.prefill
        said = int(answered.decisions[-1].trees.answer[0, answered.slot])
        assert row["answer"] == (None if said < 0 else str(said))
        assert row["score"] == (None if said < 0 else float(said == 0))


def test_a_row_is_what_a_branch_was_and_what_was_decided_about_it(run: Any):
    _, answers, table = run
    rows = {(r["prompt_id"], r["decision"], r["branch_id"]): r for r in table.to_pylist()}
    assert len(rows) == table.num_rows == sum(d.trees.used.sum() for a in answers for d in a.decisions)
    for answered in answers:
        for number, (now, then) in enumerate(zip(answered.decisions, answered.decisions[1:], strict=False)):
            for slot in np.flatnonzero(now.trees.used[0]).tolist():
                row = rows[answered.question.key, number, slot]
                status, later = (Status(int(t.trees.status[0, slot])) for t in (now, then))
                assert row["status"] == status.name.lower() and row["length"] == now.trees.length[0, slot]
                allowed = {
                    "done": status == later == Status.FINISHED,
                    "pause": (status, later) == (Status.RUNNING, Status.PAUSED),
                    "wait": status == later == Status.PAUSED,
                    "resume": status == Status.PAUSED != later,
                    "continue": status == Status.RUNNING and later != Status.PAUSED,
                    "start": row["parent"] == ROOT,
                    "branch": row["parent"] != ROOT,
                }
                assert allowed[row["action"]], row


def test_every_action_is_taken_somewhere():
    taken: Counter[str] = Counter()
    policies = [*POLICIES.values(), Erratic(rates=(0.6, 0.5, 0.5)), BranchOnce(at=3)]
    for policy in policies:
        known = policy if hasattr(policy, "expectations") else Telling(policy)
        answers = live(known, slots=3)
        taken.update(table_of(known, answers)["action"].to_pylist())
    assert set(taken) == {"start", "branch", "continue", "pause", "resume", "wait", "done", "stop"}


class Telling:
    """A policy of another test, which expects nothing."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def expectations(self, trees: Trees) -> tuple[np.ndarray, np.ndarray]:
        unknown = np.full(trees.status.shape, np.nan)
        return unknown, unknown


def rebuilt(rows: list[dict[str, Any]], root: list[float], answers: dict[int, str | None]) -> Trees:
    """The tree of one prompt before one decision, from its rows."""
    trees = Trees.empty(1, LIVE_BRANCHES, len(root))
    trees.root[0] = root
    for row in rows:
        slot = row["branch_id"]
        trees.status[0, slot] = Status[row["status"].upper()]
        for name in ("parent", "fork", "length", "signals"):
            getattr(trees, name)[0, slot] = row[name]
        if row["status"] == "finished" and answers[slot] is not None:
            trees.answer[0, slot] = int(str(answers[slot]))
        trees.latency[0] = row["step"]
    return trees


@pytest.mark.parametrize("price", [0.003, 0.01, 1e-5])
def test_decisions_can_be_taken_again_from_the_table_alone(price: float):
    policy = zip_rc_plus(np.random.default_rng(0), price)
    assert isinstance(policy, ZipRCPlus)
    table, controller = table_of(policy, live(policy)), Controller(policy, Budget(branches=LIVE_BRANCHES, interval=3))
    groups: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["prompt_id"], {}).setdefault(row["decision"], []).append(row)
    seen: Counter[str] = Counter()
    for decisions in groups.values():
        last = decisions[len(decisions) - 1]
        answers = {row["branch_id"]: row["answer"] for row in last}
        for number, rows in sorted(decisions.items()):
            trees = rebuilt(rows, decisions[0][0]["signals"], answers)
            decision = controller.decide(trees)
            worth = rows[0]["utility"]  # None where nothing can be done
            assert decision.utility[0] == pytest.approx(-np.inf if worth is None else worth, rel=1e-5)
            new = len(decisions.get(number + 1, rows)) - len(rows)
            assert decision.start[0] == new and decision.branch[0] == NONE
            for row in rows:
                runs = decision.run[0, row["branch_id"]]
                assert runs == {"continue": True, "resume": True, "start": runs}.get(row["action"], False)
                seen[row["action"]] += 1
        choice = controller.choose(rebuilt(last, decisions[0][0]["signals"], answers))
        assert last[int(choice.slot[0])]["selected"]
        assert last[0]["probability"] == pytest.approx(choice.probability[0], abs=1e-6)
    assert seen["stop"] and seen["continue"]


def test_the_record_of_a_live_run_counts_what_is_in_its_table(run: Any):
    policy, answers, table = run
    timing = {"2": {"together": {"total_s": 1.5}, "one_by_one": None, "alone": 0}}
    found = live_record(table, timing, 50, 0.95)["2"]
    json.dumps(found, allow_nan=False)
    assert found["prompts"] == ASKED and found["setting"] == Setting(policy, 3).name
    assert found["tokens"] == pytest.approx(np.mean([a.tokens for a in answers]))
    assert found["latency"] == pytest.approx(np.mean([a.latency for a in answers]))
    assert found["prefill"] == pytest.approx(np.mean([a.prefill for a in answers]))
    assert found["samples"] == pytest.approx(np.mean([len(a.branches) for a in answers]))
    right = [int(a.decisions[-1].trees.answer[0, a.slot]) == 0 for a in answers]
    assert found["accuracy"]["value"] == pytest.approx(np.mean(right), abs=ROUNDED)
    assert found["together"] == {"total_s": 1.5} and "one_by_one" not in found and found["alone"] == 0
    actions = Counter(table["action"].to_pylist())
    assert found["actions"]["pause"] == actions["pause"] / ASKED


def test_every_branch_was_started_or_branched_once():
    policy = Fixed(Reader(LIVE_GRID), k=3)
    answers = live(policy, interval=CAP)
    found = live_record(table_of(policy, answers, CAP), {}, 10, 0.95)["2"]
    assert found["actions"]["start"] + found["actions"]["branch"] == found["samples"] == 3


def test_budgets_are_told_apart():
    policy = POLICIES["majority"]
    answers = live(policy)
    first, second = graded(answers, policy, 3, "2"), graded(answers[:5], policy, 3, "4")
    found = live_record(pa.concat_tables([first, second]), {}, 10, 0.95)
    assert {budget: one["prompts"] for budget, one in found.items()} == {"2": ASKED, "4": 5}


def test_a_prompt_that_failed_is_wrong_and_not_missing_and_its_tokens_are_paid():
    policy = POLICIES["majority"]
    answers = live(policy, fail=fail_on(2, named=True))
    assert [a.index for a in answers if a.error] == [2] and answers[2].tokens >= 5
    table = table_of(policy, answers)
    found = live_record(table, {}, 10, 0.95)["2"]
    right = [a.error is None and int(a.decisions[-1].trees.answer[0, a.slot]) == 0 for a in answers]
    assert found["prompts"] == ASKED and found["accuracy"]["value"] == pytest.approx(np.mean(right), abs=ROUNDED)
    for cost, spent in {"tokens": "tokens", "prefill": "prefill", "latency": "latency"}.items():
        assert found[cost] == pytest.approx(np.mean([getattr(a, spent) for a in answers])), cost
    mine = table.filter(pc.equal(table["prompt_id"], answers[2].question.key)).to_pylist()
    assert [row["action"] for row in mine].count("failed") == 1 and "stop" not in {row["action"] for row in mine}
    assert mine[-1]["error"] == answers[2].error and mine[-1]["tokens_spent"] == answers[2].tokens


def test_a_prompt_that_fails_before_its_first_decision_is_in_the_record():
    """Two asked, one of which fails at its first token: half is right, when the other is."""
    ok = next(a for a in live(POLICIES["majority"]) if int(a.decisions[-1].trees.answer[0, a.slot]) == 0)
    lost = replace(ok, index=1, question=replace(ok.question, key="other"), branches=(), slot=NONE, probability=0.0)
    failed = replace(lost, tokens=1, prefill=9, latency=1, decisions=[], error="Prompt other: no luck", lost=40)
    table = table_of(POLICIES["majority"], [replace(ok, index=0), failed])
    found = live_record(table, {}, 10, 0.95)["2"]
    assert (found["prompts"], found["failed"], found["accuracy"]["value"]) == (2, 1, 0.5)
    assert found["tokens"] == (ok.tokens + 1 + 40) / 2 and found["prefill"] == (ok.prefill + 9) / 2
    assert table.to_pylist()[-1]["lost"] == 40 and table.to_pylist()[-1]["error"] == "Prompt other: no luck"


def test_what_no_grader_could_tell_is_left_out_and_counted_and_never_wrong():
    policy = POLICIES["majority"]
    answers = live(policy)
    plain = table_of(policy, answers)
    pairs = sorted(ungraded_answers(plain))
    blind = pairs[0][0]  # one of this prompt's answers times out
    verdicts = {pair: Verdict("exact", grade(pair[1] == "0")) for pair in pairs}
    table = with_grades(plain, verdicts | {pairs[0]: Verdict("judge", ungraded(GradeStatus.TIMEOUT))})
    rows = [row for row in table.to_pylist() if (row["prompt_id"], row["answer"]) == pairs[0]]
    assert rows and {(row["score"], row["grade_status"]) for row in rows} == {(None, "timeout")}
    found = live_record(table, {}, 10, 0.95)["2"]
    others = [a for a in answers if a.question.key != blind]
    right = [int(a.decisions[-1].trees.answer[0, a.slot]) == 0 for a in others]
    assert (found["prompts"], found["ungraded"], found["failed"]) == (ASKED - 1, 1, 0)
    assert found["accuracy"]["value"] == pytest.approx(np.mean(right), abs=ROUNDED)
    assert found["tokens"] == pytest.approx(np.mean([a.tokens for a in others]))

"""Evaluation: each statistic on small cases with known answers, and the five stages on a tiny real experiment."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from markupsafe import escape

from tests.doubles import GRID, World, tiny_checkpoint, tiny_experiment
from ziprc.config.load import Config
from ziprc.config.shared import Evaluate
from ziprc.config.zip_rc import Baselines, Samples
from ziprc.errors import UserError
from ziprc.evaluation.accuracy import auroc, length_metrics, majority_scores
from ziprc.evaluation.bootstrap import Estimate, Resampling, target_record
from ziprc.evaluation.calibration import calibration_metrics, length_curve, reliability_curve, sampling_floor
from ziprc.evaluation.head.metrics import length_records, no_loss, policy_record
from ziprc.evaluation.head.probes import logistic_prediction, probe_prediction
from ziprc.evaluation.outcomes import Outcomes, align, join_outcomes, moment_positions
from ziprc.joint import readout
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.head import read_joint_head
from ziprc.joint.readout import TokenPair
from ziprc.joint.tokenizer import text_ids
from ziprc.pages import inspect as inspection
from ziprc.pages import zip_rc
from ziprc.pages.report import costs, facts, made_from, making, read_provenance, render
from ziprc.pages.summary import summary
from ziprc.pages.zip_rc import findings
from ziprc.reading import recorded
from ziprc.reading.logits import Reading, kl_drift, token_scores
from ziprc.reading.recorded import read_all, read_states
from ziprc.reading.states import JointReader, states_table, token_pairs, token_ranges
from ziprc.stages import baselines, evaluate, introspection, prompts, report, values
from ziprc.stages.context import perform
from ziprc.store.digests import digest_file
from ziprc.store.files import read_json, write_json
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import write_manifest
from ziprc.systems.zip_rc import POOLS
from ziprc.tables.baselines import BASELINES
from ziprc.tables.grades import GRADES
from ziprc.tables.introspection import INTROSPECTION
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.samples import SAMPLES
from ziprc.tables.values import VALUES

CONFIG = {
    "evaluate": {"bootstrap": 50, "last_k": 4},
    "baselines": {"probe_epochs": 3, "probe_hidden": 8},
    "rollouts": {"many_prompts": 6},
    "values": {"last_k": 4},
    "report": {"rollouts_shown": 3},
    "samples": {"policies": []},
    "train_joint": {
        "length_edges": list(GRID.length_edges),
        "ziprc": {"label": "value", "reward_centres": list(GRID.reward_centres), "kl": 10},
        "lite": {"label": "value", "reward_centres": list(GRID.reward_centres), "trainable": "slice"},
        "rivals": {"graded": {"label": "score", "reward_centres": list(GRID.reward_centres)}},
    },
}
POINT = {
    "accuracy": {"value": 0.7, "low": 0.6, "high": 0.8},
    "tokens": 80.0,
    "cost": 1.5,
    "latency": 40.0,
    "samples": 2.0,
}
FRONTIER = {"budgets": {"2": 80.0}, "families": {"zip-rc-plus": {"points": {"2": POINT}}}}

# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_first_replicate_is_the_sample_and_every_replicate_draws_as_many_prompts():
    boot = Resampling([0, 0, 1, 2], 30, seed=1)
    assert (boot.counts[0] == 1).all()
    assert (boot.counts.sum(1) == 3).all()


def test_copies_of_a_prompt_do_not_narrow_its_interval():
    rng = np.random.default_rng(0)
    score = (rng.random(60) < 0.5).astype(float)
    once = Resampling(np.arange(60), 400, 0).ratio(score).interval()
    tenfold = Resampling(np.repeat(np.arange(60), 10), 400, 0).ratio(np.repeat(score, 10)).interval()
    assert once == tenfold


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        rate = rng.beta(2, 2, 50)
        group = np.repeat(np.arange(50), 6)
        found = Resampling(group, 200, trial).ratio((rng.random(300) < rate[group]).astype(float)).interval(0.9)
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.82 <= hits / 200 <= 0.96  # 0.9 ± 3.5 standard errors, a little less for 50 prompts


def test_a_difference_of_a_predictor_from_itself_is_exactly_zero():
    boot = Resampling(np.repeat(np.arange(20), 4), 50, 0)
    rng = np.random.default_rng(0)
    found = auroc(boot, rng.random(80), rng.random(80) < 0.5)
    assert (found - found).interval() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_what_does_not_exist_is_null_and_never_nan():
    boot = Resampling([0, 1, 2], 20, 0)
    nothing = auroc(boot, [0.1, 0.2, 0.3], [True, True, True]).interval()
    assert nothing == {"value": None, "low": None, "high": None}
    assert "NaN" not in json.dumps(nothing)


def test_an_interval_needs_half_of_its_replicates():
    mostly_undefined = Estimate(np.array([0.5, 0.5, np.nan, np.nan, np.nan]))
    assert mostly_undefined.interval() == {"value": 0.5, "low": None, "high": None}


# --- accuracy and calibration -----------------------------------------------------------------------------------------


def test_a_perfect_prediction_has_auroc_one_and_a_constant_one_half():
    boot = Resampling(np.arange(6), 10, 0)
    good = np.array([0, 0, 0, 1, 1, 1], bool)
    assert auroc(boot, good.astype(float), good).value == 1.0
    assert auroc(boot, np.zeros(6), good).value == 0.5


def test_exact_probabilities_have_ece_zero():
    boot = Resampling(np.arange(10), 10, 0)
    score = np.array([1, 0, 0, 0, 0, 1, 1, 1, 1, 0], float)
    prediction = np.repeat([0.2, 0.8], 5)
    found = calibration_metrics(boot, prediction, score, 10)
    assert found["ece"].value == pytest.approx(0, abs=1e-12)
    assert found["brier"].value == pytest.approx(0.16)


def test_a_reliability_curve_counts_every_rollout_once():
    boot = Resampling(np.arange(50), 10, 0)
    prediction = np.linspace(0, 1, 50)
    curve = reliability_curve(boot, prediction, prediction, 10, 0.95)
    assert sum(record["count"] for record in curve) == 50
    assert all(record["observed"]["value"] == pytest.approx(record["predicted"], abs=1e-5) for record in curve)


def certain(grid: BinGrid, *bins: int) -> JointDistribution:
    """One row for each of the length bins, with the lowest reward."""
    return JointDistribution(grid, np.eye(grid.size)[list(bins)])


def test_length_metrics_on_a_case_done_by_hand():
    predicted = certain(GRID, 0, 1, 1, 2)  # medians 4, 12, 12, 24; 80 % intervals 0-7, 8-15, 8-15, 17-30
    found = length_metrics(Resampling(np.arange(4), 10, 0), predicted, np.array([3, 9, 10, 35]), 10.0, 1)
    assert found["bin_accuracy"].value == 0.75  # 35 lies in bin 3
    assert found["majority_bin_share"].value == 0.5
    assert found["median_mae"].value == (1 + 3 + 2 + 11) / 4
    assert found["constant_mae"].value == (7 + 1 + 0 + 25) / 4
    assert found["mae_gain"].value == 1 - 17 / 33
    assert found["coverage_80"].value == 0.75


def test_a_length_of_one_token_is_inside_a_bin_of_one_token():
    predicted = certain(BinGrid((0, 1), (0, 1, 2)), 1, 1)  # median 1.5, interval 1.1 to 1.9
    found = length_metrics(Resampling([0, 1], 10, 0), predicted, np.array([1, 1]), 3.0, 0)
    assert found["coverage_80"].value == 1 and found["median_mae"].value == 0


def test_lengths_are_compared_with_the_median_and_the_commonest_bin_of_training():
    trained, remaining = np.full((3, 5), [[20], [40], [24]]), np.full((2, 5), [[16], [9]])
    joint = JointDistribution(GRID, np.eye(GRID.size)[np.zeros((2, 5), int)])
    found = length_records(Resampling([0, 1], 10, 0), joint, remaining, trained, 0.95)
    assert len(found) == 5
    for record in found.values():
        assert record["constant"] == 24 and record["majority_bin_share"]["value"] == 0.5


def test_length_curves_have_equal_groups_in_order():
    curve = length_curve(np.arange(100.0)[::-1], np.arange(100)[::-1])
    assert [record["count"] for record in curve] == [10] * 10
    assert curve[0]["predicted"] == 4.5 and curve[0]["real"][1] == 4.5


def test_the_sampling_floor_falls_with_the_number_of_samples_and_is_zero_for_a_certain_prediction():
    even, certain = np.full((1, 8), 1 / 8), np.eye(8)[:1]
    few, many = (sampling_floor(even, np.array([n]), 0)[0] for n in (8, 512))
    assert few > 0.25 > many > 0
    assert sampling_floor(certain, np.array([5]), 0)[0] == 0


def test_a_target_is_judged_in_its_direction():
    record = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert target_record("x", 0.4, record)["met"] is target_record("x", 0.4, 0.5)["met"] is True
    assert target_record("x", 0.4, record, at_least=False)["met"] is False
    assert target_record("x", 0.4, record | {"value": None})["met"] is target_record("x", 0.4, None)["met"] is None


def test_a_loss_is_missed_only_when_the_whole_interval_is_below_and_undecided_when_it_is_wide():
    assert no_loss({"low": -0.05, "high": -0.01}) is False
    assert no_loss({"low": -0.08, "high": 0.02}) is no_loss({"low": None, "high": None}) is None
    assert no_loss({"low": -0.01, "high": 0.01}) is True


def test_majority_counts_answers_and_shares_ties():
    group = np.array([0, 0, 0, 1, 1, 2, 2])
    answers = ["4", "4", "5", "1", "2", None, None]
    assert majority_scores(group, answers, np.array([1, 1, 0, 1, 0, 0, 0.0])).tolist() == [1.0, 0.5, 0.0]


# --- outcomes and states ----------------------------------------------------------------------------------------------


def graded(statuses: list[str], finish: list[str]) -> tuple[pa.Table, pa.Table]:
    n = len(statuses)
    rollouts = ROLLOUTS.make([
            {"rollout_id": f"r{i}", "prompt_id": f"p{i // 2}", "sample_index": i % 2, "seed": i,
             "prompt_token_ids": [1], "response_token_ids": [1] * (i + 1),
             "response_text": "x", "finish_reason": finish[i], "thinking": True,
             "policy": "base"} for i in range(n)
        ])  # fmt: skip
    grades = GRADES.make([
            {"rollout_id": f"r{i}", "grader": "exact", "score": 1.0 if s == "graded" else None, "status": s,
             "extracted_answer": None, "rationale": None} for i, s in reversed(list(enumerate(statuses)))
        ])  # fmt: skip
    return rollouts, grades


def test_unfinished_scores_zero_and_unparseable_is_left_out_and_counted():
    outcomes = join_outcomes(*graded(["graded", "unfinished", "unparseable"], ["stop", "length", "stop"]), "here")
    assert outcomes.score.tolist() == [1.0, 0.0]
    assert outcomes.rows.tolist() == [0, 1]
    assert outcomes.finished.tolist() == [True, False]
    assert outcomes.ungraded == 1


def test_a_split_without_any_score_is_refused():
    with pytest.raises(UserError, match="not one rollout has a score"):
        join_outcomes(*graded(["error", "timeout"], ["stop", "stop"]), "grades/test.parquet")


def test_a_missing_grade_is_refused_by_name():
    rollouts, grades = graded(["graded", "graded"], ["stop", "stop"])
    with pytest.raises(UserError, match=r"grades: rollout r1"):
        align(grades.slice(1), rollouts["rollout_id"].combine_chunks(), "grades")


def test_a_rollout_with_grades_of_two_graders_is_refused_and_not_one_of_them_taken():
    rollouts, grades = graded(["graded"] * 3, ["stop"] * 3)
    second = GRADES.make([grades.to_pylist()[0] | {"grader": "judge", "score": 0.0}])
    with pytest.raises(UserError, match=r"here: .*1 rollouts have more than one row by exact, judge, for example r2"):
        join_outcomes(rollouts, pa.concat_tables([grades, second]), "here")


def test_moments_of_short_responses_stay_inside():
    assert moment_positions(np.array([1, 2, 8])).tolist() == [[0] * 5, [0, 0, 1, 1, 1], [0, 2, 4, 6, 7]]


def random_states(lengths: list[int]) -> tuple[pa.Array, list[Reading]]:
    rng = np.random.default_rng(0)
    readings = [
        Reading(
            rng.dirichlet(np.ones(GRID.size), m).astype(np.float32),
            np.log(rng.random(m, np.float32)),
            rng.random(m, np.float32),
        )
        for m in lengths
    ]
    return pa.array([f"r{i}" for i in range(len(lengths))]), readings


def shuffled_file(folder: Path, table: pa.Table) -> Path:
    """The rows of a states table in another order, written behind the back of the stage."""
    pq.write_table(table.take(pa.array(np.random.default_rng(1).permutation(table.num_rows))), folder / "ziprc.parquet")
    return folder / "ziprc.parquet"


def test_states_are_found_whatever_the_order_of_rows(tmp_path: Path):
    lengths = np.array([3, 1, 6])
    ids, readings = random_states(lengths.tolist())
    joints = [reading.joint for reading in readings]
    path, wanted = shuffled_file(tmp_path, states_table(ids, readings, GRID)), pa.array(["r2", "r0"])
    states = read_states(path, wanted, lengths[[2, 0]], np.array([[0, 5], [2, 2]]), GRID.size)
    assert np.allclose(states.at[0], joints[2][[0, 5]], atol=1e-3)
    assert np.allclose(states.at[1], joints[0][[2, 2]], atol=1e-3)
    centres = np.array(GRID.reward_centres)
    expected = joints[2].reshape(6, GRID.R, GRID.L).sum(-1) @ centres
    assert np.allclose(states.last_mean(2)[0], expected[-2:].mean(), atol=1e-6)
    assert np.allclose(states.last_mean(100)[0], expected.mean(), atol=1e-6)


def test_everything_about_a_rollout_comes_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths = np.array([3, 1, 6])
    ids, readings = random_states(lengths.tolist())
    path = shuffled_file(tmp_path, states_table(ids, readings, GRID))
    monkeypatch.setattr(recorded, "READ_STATES", 4)  # three pieces
    found = read_all(path, pa.array(["r2", "r0"]), lengths[[2, 0]], GRID.size)
    assert found.start.tolist() == [0, 6] and found.length.tolist() == [6, 3]
    for name in ("joint", "log_prob", "entropy"):
        wanted = np.concatenate([getattr(readings[i], name) for i in (2, 0)])
        assert np.array_equal(getattr(found, name), wanted.astype(getattr(found, name).dtype))
    assert found.joint.dtype == np.float16 and found.log_prob.dtype == found.entropy.dtype == np.float32


def test_a_states_table_of_other_rollouts_is_refused(tmp_path: Path):
    ids, readings = random_states([3, 2])
    path = tmp_path / "ziprc.parquet"
    INTROSPECTION.write(path, states_table(ids, readings, GRID))
    some = np.zeros((2, 1), int)
    for read in (lambda n, c: read_states(path, ids, n, some, c), lambda n, c: read_all(path, ids, n, c)):
        with pytest.raises(UserError, match=r"does not hold every state of rollout r1 \(4 tokens\)"):
            read(np.array([3, 4]), GRID.size)
        with pytest.raises(UserError, match="every row must have 7 cells"):
            read(np.array([3, 2]), 7)


def test_ranges_cover_all_rows_once_in_order():
    rollouts, _ = graded(["graded"] * 9, ["stop"] * 9)
    ranges = token_ranges(rollouts, tokens=10)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(9))
    assert len(ranges) > 2 and ranges[-1] == (8, 9)


# --- full-vocabulary quantities --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny experiment with every stage of this file run on it."""
    layout = Layout(tmp_path_factory.mktemp("results"), "tiny")
    tiny_experiment(layout)
    tiny_checkpoint(layout.checkpoint("graded"), seed=3)
    world = World(Config.model_validate(CONFIG), layout)
    for name in ("train", "test-many"):
        values.run(world.context("values", name))
    for name in ("ziprc", "lite", "graded", *POOLS):
        introspection.run(world.context("introspection", name))
    baselines.run(world.context("baselines", "test"))
    evaluate.run(world.context("evaluate", "zip-rc"))
    write_json(layout.home / "frontier.json", FRONTIER)
    write_manifest(layout.home / "frontier.json", {}, {})
    report.run(world.context("report", "report"))
    return world


def test_token_scores_equal_the_naive_full_forward(experiment: World):
    model = load_model(experiment.layout.checkpoint("base"))
    pairs = [TokenPair([5, 6, 7], [8, 9, 10, 11]), TokenPair([5], [12, 13])]
    (batch,) = token_scores(model, 261, pairs, 1000, chunk=3)
    assert sorted(batch[0]) == [0, 1]
    for i, _, log_prob, entropy in zip(*batch, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*pairs[i].prompt, *pairs[i].response]])).logits[0, :, :261]
        log_probs = torch.log_softmax(logits[len(pairs[i].prompt) - 1 : -1], -1)
        chosen = log_probs[torch.arange(len(pairs[i].response)), torch.tensor(pairs[i].response)]
        assert np.allclose(log_prob, chosen.numpy(), atol=1e-5)
        assert np.allclose(entropy, -(log_probs.exp() * log_probs).sum(-1).numpy(), atol=1e-5)


def test_one_pass_of_the_body_gives_joint_and_scores(experiment: World, monkeypatch: pytest.MonkeyPatch):
    reader = JointReader.open(experiment.layout.checkpoint("ziprc"))
    pairs = [TokenPair([5, 6, 7], [8, 9, 10, 11]), TokenPair([5], [12, 13])]
    joints = reader.joints(pairs, 1000)
    (batch,) = token_scores(
        reader.model, max(text_ids(experiment.layout.checkpoint("ziprc"))) + 1, pairs, 1000, chunk=3
    )
    scores = {i: (log_prob, entropy) for i, _, log_prob, entropy in zip(*batch, strict=True)}
    passes = []
    body = readout.body_states
    monkeypatch.setattr(readout, "body_states", lambda *a: passes.append(1) or body(*a))
    found = reader.readings(pairs, 1000, chunk=2)
    assert len(passes) == 1
    for i, one in enumerate(found):
        assert np.array_equal(one.joint, joints[i])
        assert np.allclose([one.log_prob, one.entropy], scores[i], atol=1e-5)


def test_drift_is_zero_at_equal_weights_and_equals_the_naive_kl_otherwise(experiment: World):
    old, new = (load_model(experiment.layout.checkpoint(name)) for name in ("base", "ziprc"))
    rows = read_joint_head(experiment.layout.checkpoint("ziprc")).layout
    pairs = [TokenPair([5, 6], [8, 9, 10]), TokenPair([1], [2])]
    assert (kl_drift(old, old, rows, pairs, 100, 2) == 0).all()
    keep = [i for i in range(rows.vocab_size) if not rows.joint_start <= i < rows.joint_stop]
    with torch.inference_mode():
        p, q = (torch.log_softmax(m(torch.tensor([[5, 6, 8, 9]])).logits[0, 1:, keep].double(), -1) for m in (old, new))
    naive = float((p.exp() * (p - q)).sum())
    assert naive > 0.01
    assert kl_drift(old, new, rows, pairs, 100, 2)[0] == pytest.approx(naive, abs=1e-5)


def test_drift_does_not_see_the_slice(experiment: World):
    old, new = (load_model(experiment.layout.checkpoint("base")) for _ in range(2))
    rows = read_joint_head(experiment.layout.checkpoint("ziprc")).layout
    with torch.no_grad():
        new.get_output_embeddings().weight[rows.joint_slice] += 5.0
    assert (kl_drift(old, new, rows, [TokenPair([5, 6], [8, 9, 10])], 100, 2) == 0).all()


# --- predictors -------------------------------------------------------------------------------------------------------


def test_the_logistic_finds_a_probability_and_takes_fractional_scores():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 1))
    p = 1 / (1 + np.exp(-2 * x[:, 0]))
    hard = logistic_prediction(x, (rng.random(4000) < p).astype(float), x, degree=1)
    soft = logistic_prediction(x, p, x, degree=1)
    assert np.abs(hard - p).max() < 0.06 and np.abs(soft - p).max() < 0.02


def test_the_logistic_is_the_constant_when_training_has_one_class():
    assert logistic_prediction(np.ones((5, 2)), np.ones(5), np.zeros((3, 2)), 2).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_probe_learns_repeats_itself_and_leaves_global_randomness_alone(hidden: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 6)).astype(np.float16)
    y = (x[:, 0] + x[:, 1] > 0).astype(float)
    own = Baselines(probe_hidden=hidden, probe_epochs=20)
    before = torch.random.get_rng_state()
    first = probe_prediction(x, y, np.arange(2000) // 4, x, own, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(first, probe_prediction(x, y, np.arange(2000) // 4, x, own, seed=3))
    assert ((first > 0.5) == y).mean() > 0.9


def test_pass_at_1_is_paired_on_common_prompts():
    record = policy_record(
        outcomes_of({"a": [1, 0], "b": [0, 0], "c": [1, 1]}),
        outcomes_of({"b": [0], "a": [1]}),
        Evaluate(bootstrap=50),
        0,
    )
    assert record["prompts"] == 2
    assert record["base"]["value"] == 0.25 and record["ziprc"]["value"] == 0.5
    assert record["difference"]["value"] == 0.25


def outcomes_of(scores: dict[str, list[float]]) -> Outcomes:
    """Finished rollouts of one token, by prompt."""
    score = np.concatenate([np.array(s, float) for s in scores.values()])
    group, rows = np.repeat(np.arange(len(scores)), [len(s) for s in scores.values()]), np.arange(len(score))
    ids, ones = pa.array([str(i) for i in rows]), np.ones(len(score), int)
    return Outcomes(ids, pa.array(list(scores)), group, rows, ones, ones.astype(bool), score, 0)


def test_pass_at_1_weighs_every_prompt_alike_whatever_the_samples_of_either_side():
    few = outcomes_of({"a": [1, 0], "b": [0, 0], "c": [1, 1]})
    many = outcomes_of({"b": [1, 0, 0, 0, 0, 0], "a": [1, 1, 1, 1, 0, 0]})  # a pool of the first two prompts only
    record = policy_record(few, many, Evaluate(bootstrap=50), 0)
    assert record["prompts"] == 2 and record["base"]["value"] == 0.25
    assert record["ziprc"]["value"] == pytest.approx((1 / 6 + 4 / 6) / 2, abs=1e-4)
    assert record["difference"]["value"] == pytest.approx(5 / 12 - 0.25, abs=1e-4)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_each_training_rollout_is_scored_by_the_critic_of_its_fold(experiment: World):
    from ziprc.stages.values import score_rollouts
    from ziprc.training.data import prompt_fold

    layout = experiment.layout
    table = VALUES.read(layout.table("values", "train")).to_pylist()
    rollouts = ROLLOUTS.read(layout.table("rollouts", "train"))
    folds = [prompt_fold(p, 2) for p in rollouts["prompt_id"].to_pylist()]
    assert [row["fold"] for row in table] == folds and set(folds) == {0, 1}
    assert [row["critic"] for row in table] == [f"noisy-fold{f}" for f in folds]
    by_critic = [
        score_rollouts(JointReader.open(layout.checkpoint(f"noisy-fold{f}")), rollouts, 4, 4096) for f in (0, 1)
    ]
    assert np.allclose([row["value"] for row in table], [by_critic[f][i] for i, f in enumerate(folds)], atol=1e-6)


def test_other_splits_are_scored_by_the_mean_of_the_critics(experiment: World):
    table = VALUES.read(experiment.layout.table("values", "test-many"))
    assert set(table["critic"].to_pylist()) == {"mean"} and set(table["fold"].to_pylist()) == {-1}


def test_one_fold_means_one_critic_for_all(tmp_path: Path):
    layout = Layout(tmp_path, "tiny")
    tiny_experiment(layout, folds=1)
    config = Config.model_validate(CONFIG | {"values": {"folds": 1, "last_k": 4}})
    values.run(World(config, layout).context("values", "train"))
    table = VALUES.read(layout.table("values", "train"))
    assert set(table["critic"].to_pylist()) == {"noisy"}


def test_introspection_holds_every_labelled_state_in_order(experiment: World):
    table = INTROSPECTION.read(experiment.layout.table("introspection", "ziprc"))
    rollouts = ROLLOUTS.read(experiment.layout.table("rollouts", "test"))
    wanted = [(r["rollout_id"], j) for r in rollouts.to_pylist() for j in range(len(r["response_token_ids"]))]
    assert list(zip(table["rollout_id"].to_pylist(), table["position"].to_pylist(), strict=True)) == wanted
    assert {len(joint) for joint in table["joint"].to_pylist()} == {GRID.size}


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_read_by_the_head_that_sampled_it(experiment: World, pool: str):
    layout = experiment.layout
    rollouts = ROLLOUTS.read(layout.table("rollouts", pool))
    pairs = token_pairs(rollouts)
    lengths = np.array([len(pair.response) for pair in pairs])
    found = read_all(layout.table("introspection", pool), rollouts["rollout_id"].combine_chunks(), lengths, GRID.size)
    own = JointReader.open(layout.checkpoint("ziprc")).readings(pairs, 4096, 64)
    for name in ("joint", "log_prob", "entropy"):
        wanted = np.concatenate([getattr(one, name) for one in own])
        assert np.allclose(getattr(found, name), wanted, atol=1e-3)  # float16 cells
    parents = read_json(manifest_of(layout.table("introspection", pool)))["parents"]
    assert parents["rollouts"] == digest_file(manifest_of(layout.table("rollouts", pool)))
    assert parents["checkpoint"] == digest_file(manifest_of(layout.checkpoint("ziprc")))


def test_introspection_is_the_same_file_again_and_hardly_depends_on_the_batch(experiment: World):
    path = experiment.layout.table("introspection", "ziprc")
    before, table = digest_file(path), INTROSPECTION.read(path)
    small = experiment.config.model_copy(
        update={"runtime": experiment.config.runtime.model_copy(update={"forward_tokens": 64})}
    )
    introspection.run(replace(experiment, config=small).context("introspection", "ziprc"))
    other = INTROSPECTION.read(path)
    assert np.allclose(table["expected_reward"], other["expected_reward"], atol=1e-5)
    introspection.run(experiment.context("introspection", "ziprc"))
    assert digest_file(path) == before


def test_baselines_predict_every_rollout_at_every_moment(experiment: World):
    table = BASELINES.read(experiment.layout.table("baselines", "test"))
    assert table.num_rows == 96 * 4 * 5
    starts = {
        (r["predictor"], r["expected_reward"])
        for r in table.to_pylist()
        if r["moment"] == "start" and r["predictor"] != "probe"
    }
    assert len({value for _, value in starts}) == 1  # before the first token nothing but the constant is known


def test_metrics_hold_every_record_and_no_nan(experiment: World):
    text = (experiment.layout.home / "metrics/zip-rc.json").read_text()
    metrics = json.loads(text)
    assert "NaN" not in text and "Infinity" not in text
    assert set(metrics["prediction"]) == {"ziprc", "lite", "graded", "constant", "length", "logprob", "probe"}
    assert set(metrics["prediction"]["ziprc"]) == {"start", "25%", "50%", "75%", "end"}
    assert metrics["prediction"]["constant"]["end"]["auroc"]["value"] == 0.5
    assert metrics["drift"]["kl"]["value"] > 0
    assert metrics["base"]["cells"][0]["pass_at_1"]["value"] > metrics["base"]["cells"][1]["pass_at_1"]["value"]
    assert len(metrics["headline"]) == 7
    parents = read_json(manifest_of(experiment.layout.home / "metrics/zip-rc.json"))["parents"]
    assert {"base", "ziprc", "introspection/ziprc", "baselines/test", "values/train"} <= set(parents)


def test_metrics_are_the_same_file_again(experiment: World):
    path = experiment.layout.home / "metrics/zip-rc.json"
    before = path.read_bytes()
    evaluate.run(experiment.context("evaluate", "zip-rc"))
    assert path.read_bytes() == before


def test_a_checkpoint_with_another_grid_than_its_table_is_refused(experiment: World, tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_states(tmp_path / "none.parquet", pa.array(["r"]), np.array([1]), np.zeros((1, 1), int), 3)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_fetches_nothing(experiment: World):
    page = (experiment.layout.home / "report.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert "@import" not in page


def test_the_report_says_at_its_top_when_by_which_code_and_from_which_model_it_was_made(tmp_path: Path):
    def record(stage: str, started: str, commit: str | None, diff: str | None = None) -> dict[str, Any]:
        return {"stage": stage, "started": f"{started}T10:00:00+00:00", "code": {"commit": commit, "diff": diff}}

    layout = Layout(tmp_path, "tiny")
    config = {"seed": 3, "base": {"model": "org/model", "revision": None}}
    assert facts(config, layout, []) == ["no provenance", "base model org/model", "seed 3"]
    made = [record("base", "2026-02-01", "a" * 40), record("values", "2026-02-03", "b" * 40, "x.diff")]
    write_json(
        layout.checkpoint("base") / "ziprc.json",
        {"base": {"model": "org/model", "revision": "main", "commit": "d" * 40}},
    )
    assert facts(config, layout, made) == [
        "2026-02-01 to 2026-02-03", f"commit {'b' * 12} with uncommitted changes, {'a' * 12}",
        f"base model org/model at {'d' * 40}", "seed 3",
    ]  # fmt: skip


def test_a_stage_names_targets_only_where_the_experiment_is_judged(experiment: World):
    config = experiment.config
    judged = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"targets": True})})
    path = experiment.layout.home / "metrics/zip-rc.json"
    before = path.read_bytes()
    assert "7 headline numbers on 12 held-out" in evaluate.run(experiment.context("evaluate", "zip-rc"))
    assert "of 7 targets met on 12 held-out" in evaluate.run(
        replace(experiment, config=judged).context("evaluate", "zip-rc")
    )
    assert path.read_bytes() == before
    evaluate.run(experiment.context("evaluate", "zip-rc"))


def test_the_report_shows_adaptive_sampling_first(experiment: World):
    page = (experiment.layout.home / "report.html").read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[:3] == ["Adaptive sampling", "What the head knows", "What did not work, or cannot be told"]
    assert "frontier" in read_json(manifest_of(experiment.layout.home / "report.html"))["parents"]


def test_the_report_shows_live_runs_where_there_are_some(experiment: World):
    row = {
        "prompt_id": "p", "policy": "zip-rc", "budget": "2", "decision": 0, "step": 31, "branch_id": 0, "parent": -1,
        "fork": 0, "length": 31, "status": "finished", "action": "stop", "expected_reward": 0.5, "expected_remaining": 0.0,
        "tokens_spent": 47, "utility": 0.1, "answer_number": 0,
        "signals": [0.5], "selected": True, "answer": "7", "score": 1.0,
        "probability": 0.75, "prefill": 9,
    }  # fmt: skip
    path = experiment.layout.table("samples", "zip-rc")
    SAMPLES.write(path, SAMPLES.make([row]))
    write_manifest(path, {}, {})
    write_json(path.with_suffix(".timing.json"), {"2": {"together": {"total_s": 4.0, "deciding_s": 0.5}}})
    config = experiment.config.model_copy(update={"samples": Samples(policies=("zip-rc",))})
    report.run(replace(experiment, config=config).context("report", "report"))
    found = (
        (experiment.layout.home / "report.html").read_text().partition("Live on the engine")[2].partition("</table>")[0]
    )
    cells = re.sub("<[^>]*>+", " ", found.partition("<tbody>")[2])
    assert cells.split()[:5] == ["zip-rc", "2", "100.0", "100.0", "…"]
    assert "47.0" in cells and "4.0 s" in cells and "12.5" in cells
    assert "samples/zip-rc" in read_json(manifest_of(experiment.layout.home / "report.html"))["parents"]
    shutil.rmtree(path.parent)


def test_ids_in_the_report_are_unique(experiment: World):
    page = (experiment.layout.home / "report.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_model_text_is_escaped_everywhere(experiment: World, monkeypatch: pytest.MonkeyPatch):
    loaded = inspection.load_rollouts(experiment.layout, "ziprc", 1)
    evil = [
        replace(r, question="<img src=x onerror=alert(1)>", tokens=["</script><b>", "&\u2028", "\x1b[2J"])
        for r in loaded
    ]
    evil = [replace(r, joint=type(r.joint)(r.joint.grid, r.joint.probabilities[:3])) for r in evil]
    monkeypatch.setattr(inspection, "load_rollouts", lambda *a: evil)
    monkeypatch.setattr(zip_rc, "load_rollouts", lambda *a: evil)
    report.run(experiment.context("report", "report"))
    page = (experiment.layout.home / "report.html").read_text()
    assert "<img" not in page and "</script>" not in page and "&lt;/script&gt;&lt;b&gt;" in page
    inspected = inspection.inspect_html(experiment.layout.home).read_text()
    assert "<img" not in inspected and inspected.count("</script>") == 2
    data = inspected.partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data)["rollouts"][0]["tokens"] == ["</script><b>", "&\u2028", "\x1b[2J"]
    assert "\x1b" not in inspection.inspect_text(experiment.layout.home)


def test_what_others_named_never_becomes_a_tag_in_any_section(experiment: World):
    evil, plain = "<img src=x onerror='a(1)'>\"{{ 7*7 }}", "plain"
    assert tags_of(full_report(experiment, evil)) == tags_of(full_report(experiment, plain))
    assert escape(evil) in full_report(experiment, evil)


def full_report(experiment: World, name: str) -> str:
    """The whole page, with `name` wherever a name comes from a configuration, a data set or a model."""
    metrics = read_json(experiment.layout.home / "metrics/zip-rc.json")
    for part in ("prediction", "difference", "length", "joint"):
        metrics[part] |= {name: next(iter(metrics[part].values()))}
    for part in ("rollouts", "prompts", "tokens_generated", "tokens_trained"):
        metrics["counts"][part][name] = 1
    metrics["headline"][0]["name"] = name
    style = {"style": name, "share": 1.0, "pass_at_1": POINT["accuracy"]}
    metrics["base"]["cells"][0] |= {"cell": name, "best_style": name, "styles": [style]}
    settings = experiment.config.model_dump(mode="json") | {"seed": name, name: name}
    settings["base"] |= {"model": name, "revision": name}
    frontier = {
        "budgets": {"2": 80.0},
        "families": {"zip-rc-plus": {"points": {"2": POINT}}, name: {"points": {"2": POINT}}},
    }
    rollouts = [
        replace(r, question=name, difficulty=name, tokens=[name])
        for r in inspection.load_rollouts(experiment.layout, "ziprc", 1)
    ]
    rollouts = [replace(r, joint=type(r.joint)(r.joint.grid, r.joint.probabilities[:1])) for r in rollouts]
    provenance = [
        {"stage": name, "name": name, "seconds": 1.0, "peak_memory_mib": {"process": 1.0, "largest_child": 2.0},
         "started": "2026-01-02T03:04:05+00:00", "code": {"commit": name, "diff": None}}
    ]  # fmt: skip
    sections = zip_rc.laid_out(metrics, frontier, {}, rollouts, 0, judged=True)
    sections += making(settings, experiment.layout, provenance)
    return render(name, [name], facts(settings, Layout(Path("nowhere"), "none"), provenance), sections)


def tags_of(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Every tag of a page in order, with the names of its attributes."""
    found: list[tuple[str, tuple[str, ...]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, tuple(name for name, _ in attrs)))

    Tags().feed(page)
    return found


def test_the_terminal_gets_colours_only_when_it_is_one(experiment: World, monkeypatch: pytest.MonkeyPatch):
    assert "\x1b[" not in inspection.inspect_text(experiment.layout.home)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[30;48;5;" in inspection.inspect_text(experiment.layout.home, count=1)


def test_inspected_rollouts_spread_over_cells_and_outcomes(experiment: World):
    loaded = inspection.load_rollouts(experiment.layout, "ziprc", 4)
    assert {(r.difficulty, r.score) for r in loaded} == {
        (d, s) for d in ("2 steps, small", "3 steps, big") for s in (0, 1)
    }
    assert len({r.question for r in loaded}) == 4


def test_length_labels_are_whole_tokens():
    assert inspection.length_labels(BinGrid((0, 1), (0, 1, 2, 8, 16))) == ["0", "1", "2–7", "8+"]


def test_what_was_made_from_what_comes_from_the_manifests(experiment: World):
    made = dict(made_from(experiment.layout))
    assert made["values/train"] == ["checkpoints/noisy-fold0", "checkpoints/noisy-fold1", "rollouts/train"]
    place = {name: i for i, name in enumerate(made)}
    assert all(place[parent] < place[name] for name, parents in made.items() for parent in parents)
    page = (experiment.layout.home / "report.html").read_text()
    assert f'<tr><td>values/train</td><td class="wrap">{", ".join(made["values/train"])}</td></tr>' in page


def test_findings_name_missed_targets_and_better_baselines(experiment: World):
    metrics = read_json(experiment.layout.home / "metrics/zip-rc.json")
    found = " ".join(findings(metrics, judged=True))
    assert "wanted at least" in found  # heads with random weights reach no target
    assert "log-probabilities" in found
    free = " ".join(findings(metrics, judged=False))
    assert "wanted" not in free and "log-probabilities" in free


def test_costs_are_read_from_the_provenance(tmp_path: Path):
    layout = Layout(tmp_path, "tiny")
    assert read_provenance(layout) == []
    context = World(Config.model_validate({"prompts": {"train": 3}}), layout).context("prompts", "train")
    perform(prompts.run, context)
    (cost,) = costs(read_provenance(layout))
    assert cost["job"] == "prompts train" and cost["seconds"] < 60 and cost["peak_mib"] > 10


def test_the_summary_has_a_row_per_target_and_a_column_per_run(tmp_path: Path) -> None:
    record = {"name": "AUROC", "target": 0.8, "direction": "at least", "met": True}
    for name, value in (("a", 0.9), ("b", 0.85)):
        result = {"value": value, "low": value - 0.01, "high": None if name == "b" else value + 0.01}
        result["low"] = None if name == "b" else result["low"]
        write_json(tmp_path / name / "metrics/zip-rc.json", {"headline": [{**record, "result": result}]})
        write_manifest(tmp_path / name / "metrics/zip-rc.json", {"evaluate": {"targets": True}}, {})
    last = summary([tmp_path / "a", tmp_path / "b"]).splitlines()[-1]
    assert last == "| AUROC | ≥ 0.8 | 0.900 [0.890, 0.910] | 0.850 | yes, yes |"

"""On-policy training as stages of an experiment: two arms on a tiny model, their record, their page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.doubles import World, tiny_checkpoint, tiny_tables
from ziprc.config.load import Config
from ziprc.config.online import Arm
from ziprc.errors import UserError
from ziprc.evaluation.answered import answered
from ziprc.evaluation.rl.record import at_equal_tokens, headline
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import read_manifest
from ziprc.pages.countdown_rl import seconds, whole
from ziprc.plan.stage import Ref
from ziprc.stages import evaluate, report, train_online
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.store.manifest import require_intact
from ziprc.systems import goals_of
from ziprc.systems.online import check_arms
from ziprc.tables.progress import PROGRESS
from ziprc.training.account import Answer, described
from ziprc.training.micro import Sizes

SETTINGS: dict[str, Any] = {
    "systems": ["countdown-rl"],
    "prompts": {"train": 12, "validation": 4, "test": 6},
    "rollouts": {"engine": "hf", "max_model_len": 160, "max_new_tokens": 24, "test_samples": 4, "sampling": {"min_p": 0}},
    "train_online": {
        "engine": "hf", "judged_every": 2, "judged_prompts": 3, "judged_samples": 2,
        "defaults": {"rollouts": 3, "prompts": 2, "samples": 4, "learning_rate": 1e-3},
        "arms": {
            "fixed": {}, "adaptive": {"window": {"rule": "phased", "smallest": 4, "schedule": {"0": 24, "1": 8}}},
            "short": {"window": {"start": 16}},
        },
    },
    "evaluate": {"bootstrap": 60, "targets": True},
}  # fmt: skip
ARMS = ("online-fixed", "online-adaptive", "online-short")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(Config.model_validate(SETTINGS), Layout(tmp_path_factory.mktemp("online"), "tiny"))
    tiny_checkpoint(world.layout.checkpoint("base"), joint=False)
    for split, prompts in (("train", 12), ("validation", 4), ("test", 6)):
        tiny_tables(world.layout, split, prompts=prompts, samples=4)
    for name in ARMS:
        train_online.run(world.context("train_online", name))
        tiny_tables(world.layout, f"test-{name}", prompts=6, samples=4, seed=len(name))
    evaluate.run(world.context("evaluate", "countdown-rl"))
    return world


@pytest.fixture
def record(experiment: World) -> dict[str, Any]:
    return read_json(experiment.layout.home / "metrics" / "countdown-rl.json")


def test_a_checkpoint_is_a_normal_model_with_its_table_of_progress(experiment: World) -> None:
    folder = experiment.layout.checkpoint("online-adaptive")
    require_intact(folder)
    assert load_model(folder).get_output_embeddings().bias is None
    manifest = read_manifest(folder)
    assert manifest["objective"] == "grpo" and manifest["window"] == 8 and "progress.parquet" in manifest["files"]
    rows = PROGRESS.read(folder / "progress.parquet").to_pylist()
    assert [row["window"] for row in rows] == [None, 24, 8, 8] and rows[2]["length_max"] <= 8
    assert [row["held_out"] is not None for row in rows] == [True, False, True, True]
    assert all(len(row["held_out_scores"]) == 3 for row in rows if row["held_out_scores"])
    times = read_json(experiment.layout.seconds("online-adaptive"))["rollouts"]
    assert [row["rollout"] for row in times] == [0, 1, 2, 3] and all(row["seconds"] > 0 for row in times)
    assert not list(experiment.layout.home.glob("checkpoints/.*training"))


def test_arms_see_the_same_prompts_and_draw_with_the_same_seeds(experiment: World) -> None:
    first = [
        PROGRESS.read(experiment.layout.checkpoint(name) / "progress.parquet").to_pylist()[1]
        for name in ("online-fixed", "online-adaptive")
    ]
    assert first[0]["tokens_response"] == first[1]["tokens_response"] and first[0]["by_reason"] == first[1]["by_reason"]


def test_the_same_run_gives_the_same_bytes(experiment: World, tmp_path: Path) -> None:
    again = World(experiment.config, Layout(tmp_path, "tiny"))
    tiny_checkpoint(again.layout.checkpoint("base"), joint=False)
    for split, prompts in (("train", 12), ("validation", 4)):
        tiny_tables(again.layout, split, prompts=prompts, samples=4)
    train_online.run(again.context("train_online", "online-adaptive"))
    one, other = (world.layout.checkpoint("online-adaptive") for world in (experiment, again))
    assert read_manifest(one)["files"] == read_manifest(other)["files"]


def test_the_record_counts_every_token_and_pairs_every_difference(experiment: World, record: dict[str, Any]) -> None:
    for name in ARMS:
        rows = PROGRESS.read(experiment.layout.checkpoint(name) / "progress.parquet").to_pylist()
        trained = record["policies"][name]["training"]
        assert trained["tokens"] == sum(row["tokens_response"] for row in rows if row["rollout"])
        assert trained["seen"] == pytest.approx(sum(row["prompts"] for row in rows if row["rollout"]) / 12, abs=1e-6)
        assert [point["rollout"] for point in trained["curve"]] == [0, 2, 3]
    reads = experiment.context("evaluate", "countdown-rl").reads
    prompts = [f"test-{i}" for i in range(6)]
    base, fixed = (answered(reads, name, prompts, 60, 0) for name in ("test", "test-online-fixed"))
    gap = record["policies"]["online-fixed"]["difference"]["base"]["accuracy"]["value"]
    assert gap == pytest.approx(fixed.found["accuracy"].value - base.found["accuracy"].value, abs=1e-6)
    assert "online-fixed" not in record["policies"]["online-fixed"]["difference"]


def test_accuracy_in_a_window_counts_as_wrong_what_it_cuts(experiment: World, record: dict[str, Any]) -> None:
    reads = experiment.context("evaluate", "countdown-rl").reads
    one = answered(reads, "test-online-adaptive", [f"test-{i}" for i in range(6)], 60, 0)
    longest = int(one.outcomes.length.max())
    assert one.within(longest).value == one.found["accuracy"].value
    short = float(np.mean(one.outcomes.score * (one.outcomes.length <= 8)))
    assert record["policies"]["online-adaptive"]["within"]["value"] == pytest.approx(short, abs=1e-6)


def test_moves_of_the_window_are_told_with_their_reason(record: dict[str, Any]) -> None:
    assert record["policies"]["online-adaptive"]["training"]["moves"] == [
        {"rollout": 1, "window": 24, "next": 8, "decision": "phased"}
    ]


def row(rollout: int, tokens: int, *scores: float) -> dict[str, Any]:
    judged = {"held_out": float(np.mean(scores)), "held_out_scores": list(scores)} if scores else {"held_out": None}
    return {"rollout": rollout, "tokens_total": tokens, **judged}


def test_at_equal_tokens_an_arm_is_taken_before_it_has_spent_more_than_the_thriftiest() -> None:
    tables = {
        "online-fixed": [row(0, 0, 0, 0), row(1, 50), row(2, 90, 0.5, 0.5), row(3, 200, 1, 1)],
        "online-adaptive": [row(0, 0, 0, 0), row(1, 50), row(2, 80, 0.5, 0.5), row(3, 100, 1, 0.5)],
    }
    found = at_equal_tokens(tables, 50, 0, 0.95)
    assert (found["online-fixed"]["rollout"], found["online-adaptive"]["rollout"]) == (2, 3)
    assert found["online-adaptive"]["difference"]["value"] == 0.25 and found["online-fixed"]["difference"] is None


def test_gates_are_of_the_arms_that_they_compare(record: dict[str, Any]) -> None:
    names = [gate["name"] for gate in record["headline"]]
    assert len(names) == 5 and "tokens of the arm adaptive, as a share of fixed's" in names
    share = record["headline"][2]["result"]
    tokens = {name: record["policies"][name]["training"]["tokens"] for name in ARMS}
    assert share == pytest.approx(tokens["online-adaptive"] / tokens["online-fixed"])
    without = {**record, "policies": {k: v for k, v in record["policies"].items() if k != "online-adaptive"}}
    assert headline(without) == []


def test_the_report_shows_what_it_was_worth_and_what_did_not_work(experiment: World) -> None:
    report.run(experiment.context("report", "report"))
    page = (experiment.layout.home / "report.html").read_text()
    for text in (
        "What on-policy training was worth", "How the windows moved", "The same prompts before and after",
        "at equal tokens", "adaptive: 1 moves", "seconds of training", "in its window",
    ):  # fmt: skip
        assert text in page, text
    assert "beats" in page or "cannot be told from" in page
    assert page.count("<svg") >= 5
    times = seconds(experiment.layout.seconds("online-fixed"))
    judged = [row["seconds_judge"] for row in times]
    assert whole({"seconds": times}) == pytest.approx(sum(r["seconds"] - r["seconds_judge"] for r in times[1:]))
    assert sum(judged) > 0 and whole(None) is None and whole({"seconds": []}) is None


def test_a_page_without_times_says_nothing_of_them(experiment: World, tmp_path: Path) -> None:
    for path in (experiment.layout.home / "seconds").glob("*.json"):
        path.rename(tmp_path / path.name)
    try:
        report.run(experiment.context("report", "report"))
        page = (experiment.layout.home / "report.html").read_text()
        assert "seconds of training" not in page and "tokens sampled for training" in page
    finally:
        for path in tmp_path.glob("*.json"):
            path.rename(experiment.layout.seconds(path.stem))


def test_the_plan_is_the_arms_and_what_they_are_compared_with(experiment: World) -> None:
    graph = experiment.context("report", "report").graph
    built = {str(ref) for ref in graph.closure(goals_of(experiment.config))}
    assert {f"train_online {name}" for name in ARMS} <= built and "rollouts test" in built
    assert "rollouts train" not in built and "train_joint ziprc" not in built
    params = graph.params(Ref("train_online", "online-fixed"))
    assert "train_online.arms.fixed" in params and not any("adaptive" in key for key in params)


def test_validation_prompts_are_read_where_the_policy_is_judged_on_them_alone(experiment: World) -> None:
    own = experiment.config.train_online
    for every, roles in ((2, {"base", "prompts/train", "prompts/validation"}), (0, {"base", "prompts/train"})):
        config = experiment.config.model_copy(update={"train_online": own.model_copy(update={"judged_every": every})})
        context = World(config, experiment.layout).context("train_online", "online-fixed")
        assert set(context.reads) == roles


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_online": {"arms": {"a": {"prompts": 40}}}}, "asks 40 different prompts, but prompts.train is 12"),
        (
            {"train_online": {"arms": {"a": {"updates": 3, "prompts": 4}}}},
            "4 × 8 responses cannot be shared among 3 updates",
        ),
        (
            {"train_online": {"arms": {"a": {"window": {"start": 99}}}}},
            "train_online.arms.a.window: start is 99 tokens, but a response has at most 24",
        ),
        ({"train_online": {"engine": "colocate", "judged_every": 2}}, "judged by our engines alone"),
        ({"train_online": {"engine": "vllm"}, "runtime": {"gpus": 4}}, "runs in one process"),
        ({"grades": {"rule": "none"}}, "nobody is left to grade"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(change: dict[str, Any], words: str) -> None:
    config = {**SETTINGS, "train_online": {"engine": "hf"}, **change}
    with pytest.raises(UserError, match=words):
        check_arms(Config.model_validate(config))


def test_a_prompt_that_leaves_no_room_is_refused(experiment: World, tmp_path: Path) -> None:
    tight = experiment.config.model_copy(
        update={"rollouts": experiment.config.rollouts.model_copy(update={"max_model_len": 40})}
    )
    with pytest.raises(UserError, match=r"prompts do not fit: prompt .*rollouts\.max_new_tokens"):
        train_online.run(World(tight, experiment.layout).context("train_online", "online-fixed"))


def test_json_columns_of_the_table_hold_counts(experiment: World) -> None:
    rows = PROGRESS.read(experiment.layout.checkpoint("online-fixed") / "progress.parquet").to_pylist()[1:]
    for one in rows:
        assert sum(count for count, _ in json.loads(one["by_difficulty"]).values()) == one["responses"] == 8
        assert sum(json.loads(one["by_reason"]).values()) == 8


def test_a_rollout_is_cut_into_micro_batches_that_fit() -> None:
    arm = Arm(prompts=6, samples=4, updates=2, passes=3)
    assert Sizes.of(arm, 5, 1) == Sizes(4, 3, 6, 6)
    assert Sizes.of(arm, 64, 2) == Sizes(6, 1, 2, 6)


def test_accuracy_is_the_graders_and_a_cut_answer_is_wrong() -> None:
    answers = [
        Answer("a", "x", 3, 10, True, 1.0, "right"), Answer("a", "x", 3, 4, True, 0.0, "wrong numbers"),
        Answer("b", "y", 3, 16, False, 0.0, "cut"), Answer("b", "y", 3, 9, True, None, "timeout"),
    ]  # fmt: skip
    row = described(answers)
    assert (row["success"], row["success_finished"], row["truncated"], row["ungraded"]) == (0.25, 1 / 3, 0.25, 1)
    assert row["score"] == pytest.approx(1 / 3) and row["right_length_mean"] == 10 and row["prompts"] == 2
    assert json.loads(row["by_difficulty"]) == {"x": [2, 1], "y": [2, 0]}

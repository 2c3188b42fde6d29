"""Rubrics, assessments and questions to graders as stages, on responses that the world's teacher writes; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import World, tiny_checkpoint, tiny_tokenizer
from ziprc.chat import prompt_token_ids
from ziprc.config.load import Config
from ziprc.engines.base import Response
from ziprc.engines.recording import Wanted, rollout_table
from ziprc.errors import UserError
from ziprc.evaluation.grader import graded
from ziprc.pages import rubric as page
from ziprc.pages.html import fill
from ziprc.rewards.rubric import TEMPLATE_DIGEST
from ziprc.stages import assessments, evaluate, grades, gradings, prompts, rubrics, train_online
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.store.manifest import read_sealed, write_manifest, write_sealed
from ziprc.systems.online import check_arms
from ziprc.systems.rubric import check_assessments, check_rubrics
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason
from ziprc.tables.rubrics import RUBRICS
from ziprc.tasks.worked import TASK

MIX = {"mix": {"3 steps": 0.5, "4 steps": 0.5}, "slips": {"3 steps": 0.4, "4 steps": 0.0}}
SETTINGS: dict[str, Any] = {
    "systems": ["rubric"],
    "prompts": {"task": "worked", "settings": MIX, "train": 30, "validation": 4, "test": 40},
    "rollouts": {"engine": "hf", "max_model_len": 400, "max_new_tokens": 60, "thinking_samples": 4, "test_samples": 4},
    "gradings": {"responses": 3},
    "train_grader": {"graders": {"main": {}}},
    "evaluate": {"bootstrap": 60},
}  # fmt: skip


def respond(world: World, split: str, samples: int = 4) -> None:
    """The table of rollouts that the world's teacher would have written."""
    import random

    tokenizer, rows = tiny_tokenizer(), PROMPTS.read(world.layout.table("prompts", split)).to_pylist()
    settings, rng, wanted, found = TASK.settings.model_validate(MIX), random.Random(split), [], []
    for row in rows:
        problem = next(iter([TASK.draw(random.Random(0), row["difficulty"], settings)]))
        extra = json.loads(row["extra"])
        problem = type(problem)(extra["start"], tuple((op, n) for op, n in extra["chain"]))
        for k in range(samples):
            text = TASK.teach(rng, problem, row["difficulty"], settings).response
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            asked = tuple(prompt_token_ids(tokenizer, row["messages"], True))
            wanted.append(Wanted(row["prompt_id"], True, k, k, asked))
            found.append(Response("", tuple(ids), FinishReason.STOP))
    path = world.layout.table("rollouts", split)
    ROLLOUTS.write(path, rollout_table(wanted, found, "base", tokenizer))
    write_manifest(path, {}, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    own = World(Config.model_validate(SETTINGS), Layout(tmp_path_factory.mktemp("rubric"), "tiny"))
    tiny_checkpoint(own.layout.checkpoint("base"), joint=False)
    for split in ("train", "validation", "test"):
        prompts.run(own.context("prompts", split))
    for split in ("train", "test"):
        respond(own, split)
        for stage in (grades, rubrics, assessments, gradings):
            stage.run(own.context(stage.__name__.rpartition(".")[2], split))
    return own


def rows(world: World, stage: str, name: str, schema: Any) -> list[dict[str, Any]]:
    return schema.read(world.layout.table(stage, name)).to_pylist()


def test_every_response_is_assessed_and_not_every_answer(world: World) -> None:
    said = rows(world, "assessments", "test", GRADES)
    right = {row["rollout_id"]: row["score"] for row in rows(world, "grades", "test", GRADES)}
    assert len(said) == 160
    unsound = [row for row in said if right[row["rollout_id"]] == 1 and row["score"] < 1]
    assert len(unsound) > 20 and {row["extracted_answer"] for row in unsound} >= {"skip", "bluff"}
    assert all(right[row["rollout_id"]] == 1 for row in said if row["score"] == 1)


def test_questions_hold_the_teachers_words_and_are_asked_once(world: World) -> None:
    asked = rows(world, "gradings", "train", PROMPTS)
    said = {row["rollout_id"]: row for row in rows(world, "assessments", "train", GRADES)}
    per_prompt: dict[str, int] = {}
    for row in asked:
        extra, content = json.loads(row["extra"]), row["messages"][0]["content"]
        assert extra["assessment"] == said[row["prompt_id"]]["rationale"]
        assert float(row["answer"]) == pytest.approx(said[row["prompt_id"]]["score"], abs=1e-6)
        assert extra["assessment"].splitlines()[-1].endswith("points") and "Criteria:" in content
        per_prompt[extra["prompt_id"]] = per_prompt.get(extra["prompt_id"], 0) + 1
    assert max(per_prompt.values()) <= 3 and len({row["messages"][0]["content"] for row in asked}) == len(asked)


def graders_words(world: World, words: Callable[[dict[str, Any]], str]) -> None:
    """What a grader has written to every test question."""
    tokenizer, wanted, found = tiny_tokenizer(), [], []
    for row in rows(world, "gradings", "test", PROMPTS):
        ids = [*tokenizer(words(row), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        wanted.append(Wanted(row["prompt_id"], False, 0, 0, (1, 2)))
        found.append(Response("", tuple(ids), FinishReason.STOP))
    path = world.layout.table("rollouts", "gradings-grader-main")
    ROLLOUTS.write(path, rollout_table(wanted, found, "grader-main", tokenizer))
    write_manifest(path, {}, {})


def test_a_grader_that_says_what_the_teacher_said_is_perfect_and_the_page_can_be_made(world: World) -> None:
    graders_words(world, lambda row: json.loads(row["extra"])["assessment"])
    evaluate.run(world.context("evaluate", "rubric"))
    record = read_json(world.layout.home / "metrics" / "rubric.json")
    grader, base = record["graders"]["grader-main"], record["policies"]["base"]
    assert (grader["mae"]["value"], grader["f1"]["value"], grader["parsed"]["value"]) == (0, 1, 1)
    assert grader["reward"]["value"] == 1 > grader["constant_reward"] and grader["spearman"] == 1
    assert base["accuracy"]["value"] == pytest.approx(base["verified"]["value"] + base["gap"]["value"])
    assert base["unsound"]["value"] == pytest.approx(base["gap"]["value"] / base["accuracy"]["value"], abs=1e-5)
    assert set(base["cells"]) == {"3 steps", "4 steps"} and set(base["pass_at"]) == {"1", "2", "4"}
    assert base["pass_at"]["1"]["standard"]["value"] == pytest.approx(base["accuracy"]["value"])
    values = [base["pass_at"][k]["verified"]["value"] for k in ("1", "2", "4")]
    assert values == sorted(values) and values[0] == pytest.approx(base["verified"]["value"])
    made = page.sections(world.config, world.layout, world.context("report", "report").reads)
    assert all(fill(section.template, **section.data) for section in made) and len(made) == 5


def test_words_that_are_no_total_are_counted_and_come_near_nothing(world: World) -> None:
    graders_words(world, lambda row: "well done" if row["answer"] == "1" else "Total Score: 5/10")
    found = graded(
        PROMPTS.read(world.layout.table("gradings", "test")),
        ROLLOUTS.read(world.layout.table("rollouts", "gradings-grader-main")), 50, 0, 0.95,
    )  # fmt: skip
    assert 0 < found["parsed"]["value"] < 1 and found["f1_at_half"]["value"] == 0
    assert found["f1"]["value"] == pytest.approx(1)  # everything unsound gets 5, and full marks cannot be read


# --- other sources of rubrics -------------------------------------------------------------------------------------------------


def prompt(criteria: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Show that x is two."}
    return {"prompt_id": "p1", "messages": [message], "answer": "2", "extra": json.dumps({"criteria": criteria})}


ITEMS = [{"points": 8, "requirement": "isolates the unknown"}, {"points": 2, "requirement": "x = 2"}]


@pytest.mark.parametrize(
    ("criteria", "problem"),
    [
        ("Two points for each step.", None), (ITEMS, None), (json.dumps(ITEMS), None),
        (None, "no criteria"), ("  ", "no criteria"), (ITEMS[:1], "sum to 8"), ("[1, 2]", "item 1"), ("[[[[", "no list"),
        ([*ITEMS, {"points": -1, "requirement": "x"}], "item 3"),
        ([{"points": 10, "requirement": "Show that x is two."}], "holds"),
    ],
)  # fmt: skip
def test_a_data_sets_criteria_are_text_or_checked_items(criteria: Any, problem: str | None) -> None:
    row = rubrics.by_column(prompt(criteria))
    assert row["valid"] == (problem is None) and (problem is None or problem in row["problem"])
    assert RUBRICS.make([row]).num_rows == 1


def test_a_models_rubric_is_found_in_its_words() -> None:
    row = rubrics.read(prompt(None), f"Here it is:\n```json\n{json.dumps(ITEMS)}\n```\n")
    assert row["valid"] and row["text"].splitlines()[0] == "1 isolates the unknown (8)"
    row = rubrics.read(prompt(None), json.dumps([ITEMS[0] | {"failure": "guesses x"}, ITEMS[1]]))
    assert row["valid"] and row["text"].splitlines()[0] == "1 isolates the unknown; none for: guesses x (8)"


def test_invalid_rubrics_are_refused_by_prompt_unless_allowed() -> None:
    found = [rubrics.by_column(prompt(None)), rubrics.by_column(prompt(ITEMS))]
    with pytest.raises(UserError, match=r"1 of 2 rubrics.*p1: the data set has no criteria.*nothing was written"):
        rubrics.check_valid(found, 0.4, "prompts.parquet")
    rubrics.check_valid(found, 0.5, "prompts.parquet")


def test_a_model_that_writes_no_rubrics_and_a_teacher_without_totals_fail_before_anything_is_written(
    world: World, tmp_path: Path
) -> None:
    model = str(tiny_checkpoint(tmp_path / "model", joint=False))
    shape = Path(model) / "config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"max_position_embeddings": 4096}))
    writer = {"model": model, "max_new_tokens": 8, "max_model_len": 2048}
    settings = SETTINGS | {
        "rubrics": {"source": "model", "writer": writer, "tries": 1},
        "assessments": {"teacher": writer},
    }
    other = World(Config.model_validate(settings), Layout(tmp_path, "tiny"))
    for stage, schema in (("prompts", PROMPTS), ("rubrics", RUBRICS), ("rollouts", ROLLOUTS)):
        path = other.layout.table(stage, "test")
        schema.write(path, schema.read(world.layout.table(stage, "test")).slice(0, 3))
        write_manifest(path, {}, {})
    (other.layout.table("rubrics", "test")).rename(tmp_path / "kept.parquet")
    with pytest.raises(UserError, match="3 of 3 rubrics"):
        rubrics.run(other.context("rubrics", "test"))
    assert not other.layout.table("rubrics", "test").exists()
    (tmp_path / "kept.parquet").rename(other.layout.table("rubrics", "test"))
    with pytest.raises(UserError, match="could not be read"):
        assessments.run(other.context("assessments", "test"))
    assert not other.layout.table("assessments", "test").exists()


# --- what is refused before anything is computed --------------------------------------------------------------------------------


def config(**train_online: Any) -> Config:
    return Config.model_validate(SETTINGS | {"train_online": {"engine": "hf", **train_online}})


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"rubric": {"by": "grader-mian"}}, r"no grader 'grader-mian' \(did you mean 'grader-main'\?\)"),
        ({"start": "grader-main"}, "asks prompts and starts from grader-main"),
        ({"asks": "gradings"}, "asks gradings and starts from base"),
    ],
)
def test_arms_that_nobody_could_grade_are_refused(arm: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace("?", r"\?") if "\\" not in words else words):
        check_arms(config(arms={"a": arm}))


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"rubric": {"weight": 1.5}}, "less than or equal to 1"),
        ({"rubric": {"setup": "gatd"}}, "setup"),
        ({"rubric": {}, "rewards": {"score": {}}}, "belong together"),
        ({"rewards": {"rubric": {}}}, "belong together"),
        ({"rubric": {}, "asks": "gradings"}, "not graded by a rubric"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arm: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(arms={"a": arm})


def test_a_task_without_a_program_needs_somebody_else() -> None:
    arithmetic = Config.model_validate(SETTINGS | {"prompts": {"task": "arithmetic"}})
    with pytest.raises(UserError, match="none that writes rubrics"):
        check_rubrics(arithmetic)
    with pytest.raises(UserError, match="no program that looks at work"):
        check_assessments(arithmetic)
    arm = {"train_online": {"engine": "hf", "arms": {"a": {"rubric": {}}}}, "prompts": {"task": "arithmetic"}}
    with pytest.raises(UserError, match="no program that looks at work"):
        check_arms(Config.model_validate(SETTINGS | arm))


def test_a_grader_that_was_taught_another_form_is_refused_before_its_server_starts(world: World) -> None:
    own = World(config(arms={"a": {"rubric": {"by": "grader-main"}, "rollouts": 1}}), world.layout)
    folder = tiny_checkpoint(world.layout.checkpoint("grader-main"), joint=False)
    with pytest.raises(UserError, match=r"taught questions of another form \(none\)"):
        train_online.run(own.context("train_online", "online-a"))
    known = read_sealed(folder / "ziprc.json")
    write_sealed(folder / "ziprc.json", {**known, "grader": {"template": TEMPLATE_DIGEST}})
    with pytest.raises(UserError, match="golden question"):  # a random model is no grader
        train_online.run(own.context("train_online", "online-a"))


def test_a_teachers_score_outside_its_range_is_named_by_row(world: World) -> None:
    own = World(config(arms={"a": {"asks": "gradings", "start": "grader-main", "rollouts": 1}}), world.layout)
    tiny_checkpoint(world.layout.checkpoint("grader-main"), joint=False)
    path = world.layout.table("gradings", "train")
    kept, spoiled = PROMPTS.read(path), PROMPTS.read(path).to_pylist()
    spoiled[2]["answer"] = "7"
    PROMPTS.write(path, PROMPTS.make(spoiled))
    try:
        with pytest.raises(
            UserError, match=rf"1 questions lack a teacher's score in \[0, 1\]: {spoiled[2]['prompt_id']}"
        ):
            train_online.run(own.context("train_online", "online-a"))
    finally:
        PROMPTS.write(path, kept)

"""What follows from the declarations: names, parents, params, files, for every experiment of config.yaml."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.doubles import PLANNED
from ziprc.config.base import SYSTEMS as NAMES
from ziprc.config.base import Runtime
from ziprc.config.load import Config, experiments, load
from ziprc.errors import UserError
from ziprc.plan.graph import Graph
from ziprc.plan.stage import CLASSES, TABLE, Ref, Stage, one
from ziprc.store.layout import Layout
from ziprc.systems import STAGES, SYSTEMS, goals_of, graph_of
from ziprc.systems.shared import SECTIONS
from ziprc.workflow.launch import root_of

ROOT = root_of(Path(__file__))
FILE = ROOT / "config.yaml"


def graph(*overrides: str, experiment: str = "smoke") -> Graph:
    return graph_of(load(FILE, experiment, overrides), Layout(Path("results"), experiment))


def changed(*overrides: str) -> set[str]:
    """Artifacts whose params an override changes."""
    before, after = graph(), graph(*overrides)
    return {f"{ref.stage}/{ref.name}" for ref in after.known() if before.params(ref) != after.params(ref)}


@pytest.mark.parametrize("experiment", PLANNED)
@pytest.mark.parametrize("overrides", [(), ("values.folds=1",), ("values.folds=3",), ("train_joint.lite=null",)])
def test_every_artifact_is_made_of_artifacts_that_there_are(experiment: str, overrides: tuple[str, ...]) -> None:
    plan = graph(*overrides, experiment=experiment)
    closure = plan.closure(goals_of(plan.config))
    assert len(closure) > (20 if "zip-rc" in plan.config.systems else 8)
    for number, ref in enumerate(closure):
        assert all(parent in closure[:number] for parent in plan.parents(ref).values()), "parents come first"
        assert plan.params(ref) is not None and plan.code(ref)
    targets = [plan.target(ref) for ref in plan.known()]
    assert len(set(targets)) == len(targets)


def test_a_declaration_has_a_module_a_class_and_settings_that_exist() -> None:
    for stage in STAGES:
        assert importlib.util.find_spec(f"ziprc.stages.{stage.name}"), stage.name
        assert graph().machine(stage.name) in CLASSES
    for system in SYSTEMS:
        assert set(system.sections) | set(SECTIONS) <= set(Config.model_fields)


def test_what_a_stage_chooses_by_name_exists() -> None:
    chosen = {
        module
        for experiment in experiments(FILE)
        for plan in [graph(experiment=experiment)]
        for ref in plan.known()
        for module in plan.stage(ref.stage).uses(plan.config, plan.variant(ref))
    }
    assert {"ziprc.tasks.hub", "ziprc.engines.vllm", "ziprc.rewards.math"} <= chosen
    for module in chosen:
        assert importlib.util.find_spec(module), module


OTHER = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2, str: lambda x: f"not {x}"}


@pytest.mark.parametrize("key", sorted(Runtime.model_fields))
@pytest.mark.parametrize("experiment", ["smoke", "qwen3-1.7b"])
def test_no_runtime_key_is_a_param_of_anything(experiment: str, key: str) -> None:
    before = graph(experiment=experiment)
    value = getattr(before.config.runtime, key)
    other = OTHER.get(type(value), lambda _: ("other",))(value)
    assert other != value
    runtime = before.config.runtime.model_copy(update={key: other})
    after = Graph(STAGES, before.config.model_copy(update={"runtime": runtime}), before.layout)
    assert [ref for ref in before.known() if before.params(ref) != after.params(ref)] == []


def test_what_is_declared_and_what_may_be_asked_for_are_the_same_systems() -> None:
    assert tuple(system.name for system in SYSTEMS) == NAMES


def test_a_key_changes_the_artifacts_that_it_is_about_and_no_other() -> None:
    pools = {"rollouts/validation-ziprc", "rollouts/test-ziprc"}
    tests = {f"rollouts/test{name}" for name in ("", "-lite", "-noisy-fold0", "-noisy-fold1")}
    shown = {"report/report"}
    assert changed("rollouts.pool_samples=3") == pools | shown
    assert changed("rollouts.pool_prompts=3") == pools | shown
    assert changed("rollouts.test_samples=3") == tests | shown
    live = {
        f"samples/{name}" for name in ("zip-rc", "zip-rc-plus", "zip-rc-plus-branching", "zip-rc-plus-wide", "majority")
    }
    assert changed("rollouts.test_thinking=false") == pools | tests | live | {"rollouts/test-many"} | shown
    assert changed("prompts.validation=3") == {"prompts/validation"} | shown
    assert changed("train_joint.ziprc.kl=25") == {"train_joint/ziprc"} | shown
    assert changed("samples.majority_budgets=[3]") == {"samples/majority"} | shown
    assert changed("samples.in_flight=3") == live | shown
    assert changed("runtime.shard_prompts=3") == set()
    graded = {ref for ref in changed("grades.rule=math") if ref.startswith(("grades/", "samples/"))}
    assert changed("grades.rule=math") == graded | shown and graded > live
    assert changed("grades.timeout_s=9") == shown, "the exact rule has no time limit"


def test_a_name_says_which_prompts_policy_and_head() -> None:
    plan = graph()
    names = ["train", "test", "test-many", "test-ziprc", "test-noisy-fold1", "validation-ziprc", "test-lite"]
    found = [plan.variant(Ref("rollouts", name)) for name in names]
    assert [of.prompts for of in found] == ["train", *["test"] * 4, "validation", "test"]
    policies = ["base", "base", "base", "ziprc", "noisy-fold1", "ziprc", "lite"]
    assert [of.policy.name for of in found] == policies
    read = [plan.variant(Ref("introspection", name)) for name in ("ziprc", "lite", "validation-ziprc", "test-ziprc")]
    assert [(of.rollouts, of.head) for of in read] == [
        ("test", "ziprc"), ("test", "lite"), ("validation-ziprc", "ziprc"), ("test-ziprc", "ziprc"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ref", "near"),
    [
        (Ref("values", "trian"), "train"),
        (Ref("rollouts", "trainx"), "train"),
        (Ref("train_joint", "noisy-fold7"), "noisy-fold"),
        (Ref("train_joint", "noisy-whatever"), "noisy-fold"),
        (Ref("valeus", "train"), "values"),
    ],
)
def test_a_name_that_there_is_not_is_refused_with_the_nearest(ref: Ref, near: str) -> None:
    with pytest.raises(UserError, match=near):
        graph().target(ref) if ref.stage == "valeus" else graph().parents(ref)


def test_a_file_knows_what_made_it() -> None:
    plan = graph()
    assert plan.made_by(Path("results/smoke/values/train.manifest.json")) == Ref("values", "train")
    assert plan.made_by(Path("results/smoke/checkpoints/ziprc/ziprc.json")) == Ref("train_joint", "ziprc")
    assert plan.made_by(Path("results/smoke/checkpoints/ziprc/calibration.json")) == Ref("calibration", "ziprc")
    assert plan.made_by(Path("results/smoke/metrics/zip-rc.json")) == Ref("evaluate", "zip-rc")
    assert plan.made_by(Path("results/smoke/values/trian.parquet")) is None


def test_deleted_files_are_missing_only_where_something_is_there(tmp_path: Path) -> None:
    plan = graph_of(load(FILE, "smoke"), Layout(tmp_path, "smoke"))
    goals = [Ref("prompts", "train"), Ref("prompts", "test")]
    assert plan.missing(goals) == []
    there = plan.target(Ref("prompts", "train"))
    there.parent.mkdir(parents=True)
    there.touch()
    assert len(plan.missing(goals)) == 3 and there not in plan.missing(goals)


def test_a_check_of_a_stage_is_made_before_anything_runs() -> None:
    plan = graph("grades.rule=none")
    with pytest.raises(UserError, match="nobody is left to grade"):
        plan.check(goals_of(plan.config))
    graph("grades.rule=none").check([Ref("prompts", "train")])


def test_a_made_up_stage_takes_one_declaration() -> None:
    """It is planned, has paths, params and a code digest, without a word anywhere else."""
    prompts = next(stage for stage in STAGES if stage.name == "prompts")
    made_up = Stage(
        "grades", "made up, {name}", TABLE, one("x"), reads=lambda c, v: {"p": Ref("prompts", "test")},
        params=lambda c, v: ["grades.timeout_s"],
    )  # fmt: skip
    plan = Graph([prompts, made_up], load(FILE, "smoke"), Layout(Path("results"), "smoke"))
    ref = Ref("grades", "x")
    assert plan.closure([ref]) == [Ref("prompts", "test"), ref]
    assert plan.params(ref) == {"grades.timeout_s": 5.0}
    assert str(plan.target(ref)) == "results/smoke/grades/x.parquet"

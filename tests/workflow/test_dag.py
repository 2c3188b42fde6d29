"""The plan of every experiment in config.yaml, its commands, and the law that one word names a stage everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflow.conftest import ROOT, Workplace, environment
from ziprc.cli import parser
from ziprc.config import load as settings
from ziprc.store.layout import Layout
from ziprc.systems import STAGES, goals_of, graph_of
from ziprc.workflow.launch import stage_command
from ziprc.workflow.snakefile import stage_table

CONFIG = ROOT / "config.yaml"


@pytest.fixture(params=settings.experiments(CONFIG))
def experiment(request: pytest.FixtureRequest) -> str:
    return request.param


def dry_run(folder: Path, experiment: str, *more: str) -> str:
    place = Workplace(folder, CONFIG, experiment)
    answer = place.run("build", "--dry-run", *more)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout + answer.stderr


def test_a_dry_run_plans_every_artifact(experiment: str, tmp_path: Path) -> None:
    plan = dry_run(tmp_path, experiment)
    graph = graph_of(settings.load(CONFIG, experiment), Layout(Path("results"), experiment))
    files = graph.files(graph.closure(goals_of(graph.config)))
    assert len(files) > 50 and all(str(path) in plan for path in files)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    dry_run(tmp_path, "smoke")
    assert not (tmp_path / "results").exists()


def test_every_stage_of_every_experiment_starts_through_accelerate(experiment: str) -> None:
    graph = graph_of(settings.load(CONFIG, experiment), Layout(Path("results"), experiment))
    for rule in graph.stages:
        options = parser().parse_args(
            ["run", rule, "--name", "x", "--experiment", experiment, "--config-file", str(CONFIG), "--threads", "2"]
        )
        command, environment = stage_command(options, graph)
        assert command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
        assert Path(command[4]).exists()
        assert command[command.index("-m", 3) + 1] == f"ziprc.stages.{rule}"
        assert environment["OMP_NUM_THREADS"] == "2"


def test_the_slurm_profile_plans_the_same(tmp_path: Path) -> None:
    plans = [dry_run(tmp_path, "qwen3-1.7b", "--profile", profile) for profile in ("default", "slurm")]
    jobs = [sorted(re.findall(r"^Job \d+: (.*)$", plan, re.M)) for plan in plans]
    assert jobs[0] == jobs[1] and jobs[0]


def test_one_artifact_plans_only_its_chain(tmp_path: Path) -> None:
    plan = dry_run(tmp_path, "smoke", "results/smoke/grades/train.parquet")
    planned = {match for match in re.findall(r"^Job \d+: (\w+):", plan, re.M)}
    assert planned == {"prompts", "base", "rollouts", "grades"}


def test_a_pool_is_sampled_by_the_head_and_read_back(tmp_path: Path) -> None:
    plan = dry_run(tmp_path, "smoke", "results/smoke/introspection/validation-ziprc.parquet")
    jobs = re.findall(r"^Job \d+: (.*)$", plan, re.M)
    assert "prompts: what is asked, split validation of smoke" in jobs
    assert "rollouts: responses for validation-ziprc of smoke" in jobs
    assert "train_joint: the joint head ziprc of smoke" in jobs
    assert not any(re.search(r"\btest\b", job) for job in jobs)


def test_one_word_names_rule_stage_and_section(tmp_path: Path) -> None:
    names = {stage.name for stage in STAGES}
    modules = {path.stem for path in (ROOT / "ziprc" / "stages").glob("*.py")} - {"__init__", "context"}
    assert names == modules == set(settings.Config.model_fields) - {"seed", "systems", "runtime"}
    listed = subprocess.run(
        [sys.executable, "-m", "snakemake", "--list-rules", "--snakefile", str(ROOT / "Snakefile")],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert names | {"all"} == set(listed.stdout.split())


def test_the_head_of_the_snakefile_is_the_plan() -> None:
    assert stage_table() in (ROOT / "Snakefile").read_text()


def test_an_unknown_experiment_names_the_nearest(tmp_path: Path) -> None:
    answer = Workplace(tmp_path, CONFIG, "smok").run("build")
    assert answer.returncode == 2 and "did you mean 'smoke'" in answer.stderr


def test_a_misspelt_override_is_refused_before_anything_runs(tmp_path: Path) -> None:
    answer = Workplace(tmp_path, CONFIG, "smoke").run("build", "--set", "train_joint.ziprc.kll=3")
    assert answer.returncode == 2 and "did you mean 'kl'" in answer.stderr
    assert not (tmp_path / "results").exists()


def test_the_imports_point_down_only() -> None:
    answer = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout


def test_snakefile_and_help_start_without_torch() -> None:
    code = (
        "import sys, ziprc.cli, ziprc.workflow.snakefile as s; s.Rules({}, '.').goals; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT).returncode == 0

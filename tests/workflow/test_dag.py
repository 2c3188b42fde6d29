"""The plan of every experiment in config.yaml, its commands, and the law that one word names a stage everywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.doubles import PLANNED
from tests.workflow.conftest import MICRO, ROOT, Workplace, environment
from ziprc.cli import parser
from ziprc.config import load as settings
from ziprc.store.files import output_lock
from ziprc.store.layout import Layout
from ziprc.systems import STAGES, goals_of, graph_of
from ziprc.workflow.call import INTERRUPTED
from ziprc.workflow.launch import stage_command
from ziprc.workflow.snakefile import stage_table

CONFIG = ROOT / "config.yaml"


@pytest.fixture(params=PLANNED)
def experiment(request: pytest.FixtureRequest) -> str:
    return request.param


def dry_run(folder: Path, experiment: str, *more: str) -> str:
    place = Workplace(folder, CONFIG, experiment)
    answer = place.run("build", "--dry-run", *more)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a dry run says of a suite of them all: Snakemake is started and reads the rules once instead of for each."""
    folder = tmp_path_factory.mktemp("plan")
    own = folder / "own.yaml"
    own.write_text(yaml.safe_dump({**settings.load_yaml(CONFIG), "suites": {"planned": PLANNED}}, sort_keys=False))
    command = [sys.executable, "-m", "ziprc", "build", "--suite", "planned", "--dry-run", "--config-file", str(own)]
    answer = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return answer.stdout + answer.stderr


def test_a_dry_run_plans_every_artifact(experiment: str, plan: str) -> None:
    graph = graph_of(settings.load(CONFIG, experiment), Layout(Path("results"), experiment))
    files = graph.files(graph.closure(goals_of(graph.config)))
    assert len(files) > (50 if "zip-rc" in graph.config.systems else 15) and all(str(path) in plan for path in files)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    dry_run(tmp_path, "smoke")
    assert not (tmp_path / "results").exists()


def test_every_stage_of_every_experiment_starts_alone_or_through_accelerate(experiment: str) -> None:
    """tests/unit/test_launch.py holds the environment of one process to that of accelerate's launcher."""
    graph = graph_of(settings.load(CONFIG, experiment), Layout(Path("results"), experiment))
    for rule in graph.stages:
        options = parser().parse_args(
            ["run", rule, "--name", "x", "--experiment", experiment, "--config-file", str(CONFIG), "--threads", "2"]
        )
        command, environment = stage_command(options, graph)
        stage = command.index(f"ziprc.stages.{rule}")
        assert command[stage - 1] == "-m" and command[stage + 1] == "--config-file"
        several = graph.machine(rule) == "big-gpu" and graph.config.runtime.accelerate not in ("cpu", "single")
        assert (command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]) == several
        assert stage == 2 or Path(command[4]).exists()
        assert environment["OMP_NUM_THREADS"] == "2" and ("ACCELERATE_USE_CPU" in environment) != several


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


def test_two_experiments_are_planned_in_one_run(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(MICRO.read_text() + "suites: {both: [micro, copy]}\n")
    command = [sys.executable, "-m", "ziprc", "build", "--suite", "both", "--dry-run", "--config-file", str(own)]
    plan = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    jobs = re.findall(r"^Job \d+: report: the page, (\w+)$", plan.stdout + plan.stderr, re.M)
    assert sorted(jobs) == ["copy", "micro"], plan.stderr


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose path has a space and a brace in it."""
    copy = tmp_path_factory.mktemp("with space") / "zip {rc}"
    for name in ("ziprc", "profiles"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "config.yaml"):
        shutil.copy(ROOT / name, copy)
    return copy


def inside(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = environment() | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "ziprc", *arguments]
    return subprocess.run(command, cwd=checkout, env=own, capture_output=True, text=True, timeout=120)


def test_a_path_and_a_setting_with_spaces_reach_the_stage(spaced: Path) -> None:
    target, mix = "results/smoke/prompts/test.parquet", 'prompts.settings.mix={"1 step, small":5, "2 steps, small": 1}'
    done = inside(spaced, "build", target, "--set", mix, "seed=3")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    config = json.loads((spaced / "results/smoke/provenance/prompts-test.json").read_text())["config"]
    assert config["seed"] == 3 and config["prompts"]["settings"]["mix"]["1 step, small"] == 5
    same = inside(spaced, "why", target, "--set", f"{mix} seed=3", "runtime.mem_mb=1234")
    assert "Nothing would rerun" in same.stdout, same.stdout + same.stderr


def test_a_failed_build_ends_with_stage_sentence_and_log(spaced: Path) -> None:
    target = "results/smoke/prompts/validation.parquet"
    with output_lock(spaced / target):
        done = inside(spaced, "build", target)
    assert done.returncode == 1
    *_, stage, sentence, log = done.stderr.splitlines()
    assert stage == "smoke: prompts-validation failed."
    assert sentence.startswith(
        f"error in stage prompts (smoke/validation): {target} is being written by another process"
    )
    assert log == "Its log: results/smoke/logs/prompts-validation.log"


def test_ctrl_c_ends_a_build_with_one_sentence(spaced: Path) -> None:
    command = [sys.executable, "-m", "ziprc", "build", "results/smoke/prompts/train.parquet"]
    own = environment() | {"PYTHONPATH": str(spaced)}
    build = subprocess.Popen(
        command, cwd=spaced, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    limit = time.monotonic() + 100
    while not (spaced / "results/smoke/logs/prompts-train.log").exists():
        assert time.monotonic() < limit and build.poll() is None
        time.sleep(0.05)
    os.killpg(build.pid, signal.SIGINT)  # as a terminal does
    said = build.communicate(timeout=100)[0]
    assert build.returncode == INTERRUPTED, said
    assert said.splitlines()[-1] == "smoke: stopped by Ctrl-C. Nothing is half-written; the same command goes on."
    assert "Traceback" not in said


def test_what_snakemake_says_is_shown_when_it_cannot_draw(spaced: Path) -> None:
    drawn = inside(spaced, "dag", "--experiment", "smoke")
    page = spaced / "results/smoke/dag.md"
    assert drawn.stdout == "dag: wrote results/smoke/dag.md\n" and "train_joint" in page.read_text()
    page.unlink()
    with open(spaced / "Snakefile", "a") as snakefile:
        snakefile.write('\nraise ValueError("this Snakefile is broken")\n')
    for command in ("dag", "why", "provenance"):
        done = inside(spaced, command, "--experiment", "smoke")
        assert done.returncode == 2 and "this Snakefile is broken" in done.stderr
    assert not page.exists()


def test_an_unknown_experiment_names_the_nearest(tmp_path: Path) -> None:
    answer = Workplace(tmp_path, CONFIG, "smok").run("build")
    assert answer.returncode == 2 and "did you mean 'smoke'" in answer.stderr


def test_a_target_that_nobody_makes_starts_nothing(tmp_path: Path) -> None:
    answer = Workplace(tmp_path, CONFIG, "smoke").run("build", "results/smoke/values/trian.parquet")
    assert answer.returncode == 2 and "Did you mean results/smoke/values/train.parquet?" in answer.stderr
    assert not (tmp_path / "results").exists() and not (tmp_path / ".snakemake").exists()


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


def test_stages_that_only_look_at_recorded_states_start_without_torch() -> None:
    modules = [f"ziprc.stages.{name}" for name in ("frontier", "calibration", "report")] + ["ziprc.pages.zip_rc"]
    code = f"import sys, {', '.join(modules)}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT).returncode == 0

"""What a user names is looked up before anything starts, and what is not there has a neighbour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doubles import PLANNED
from ziprc.cli import parser
from ziprc.config.load import load
from ziprc.errors import UserError
from ziprc.workflow.launch import root_of
from ziprc.workflow.targets import Wanted, look_up

CONFIG = root_of(Path(__file__)) / "config.yaml"


def wanted(*arguments: str, config: Path = CONFIG) -> Wanted:
    return look_up(parser().parse_args(["build", *arguments, "--config-file", str(config)]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["results/smoke/values/trian.parquet"],
            r"Nothing here makes .*Did you mean results/smoke/values/train\.parquet\?",
        ),
        (["results/smoke/rollouts/trainx.parquet"], r"Did you mean results/smoke/rollouts/train\.parquet\?"),
        (["results/smoke/checkpoints/noisy-fold7/ziprc.json"], r"Did you mean results/smoke/checkpoints/noisy-fold\d/"),
        (["results/smok/report.html"], "no experiment 'smok' .*did you mean 'smoke'"),
        (["results/smoke"], "is a folder. Name a file in it: .* or everything with `make all EXPERIMENT=smoke`"),
        (["results/smoke/checkpoints/ziprc/"], r"is a folder. Name a file in it: \S+/checkpoints/ziprc/ziprc\.json"),
        (["report.html"], r"by its path, such as results/toy/report\.html; found 'report\.html'"),
        (["all"], r"by its path, such as results/toy/report\.html; found 'all'"),
        (["results/toy/report.html", "--experiment", "smoke"], "does not belong to the experiment smoke"),
        (["--experiment", "smok"], "did you mean 'smoke'"),
        (["--suite", "smok"], "no suite 'smok' .*did you mean 'smoke'"),
        (["--suite", "smoke", "--system", "zip-rd"], "zip-rd.*did you mean 'zip-rc'"),
    ],
)
def test_what_nobody_makes_is_refused_with_what_was_meant(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wanted(*arguments)


@pytest.mark.parametrize("experiment", PLANNED)
def test_every_file_of_an_experiment_and_its_variants_can_be_asked_for(experiment: str) -> None:
    home = f"results/{experiment}"
    files = ["report.html", "grades/test.parquet", "grades/test.manifest.json", "checkpoints/base/ziprc.json"]
    own = {
        "zip-rc": ["values/train.parquet", "rollouts/test-ziprc.parquet", "grades/validation-ziprc.parquet"],
        "icl-v": ["metrics/icl-v.json"],
        "countdown-rl": ["metrics/countdown-rl.json", "checkpoints/online-adaptive/ziprc.json"],
        "reasoning-vocabulary": ["metrics/reasoning-vocabulary.json", "checkpoints/online-plain/ziprc.json"],
        "rubric": ["metrics/rubric.json", "assessments/test.parquet"],
    }
    files += [file for system in load(CONFIG, experiment).systems for file in own[system]]
    targets = [f"{home}/{file}" for file in files]
    assert wanted(*targets).targets == tuple(targets)


def test_the_experiment_follows_from_the_target() -> None:
    assert list(wanted("results/smoke/report.html", "./results/toy/report.html").configs) == ["smoke", "toy"]
    assert list(wanted().configs) == ["toy"]


def test_a_suite_is_its_experiments_and_a_system_those_of_them_that_build_it(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("experiments: {a: {}, b: {seed: 1}}\nsuites: {both: [a, b]}\n")
    assert list(wanted("--suite", "both", config=own).configs) == ["a", "b"]
    assert list(wanted("--suite", "both", "--system", "all", config=own).configs) == ["a", "b"]
    assert list(wanted("--suite", "both", "--system", "zip-rc", "--set", "seed=7", config=own).configs) == ["a", "b"]
    assert {config.seed for config in wanted("--suite", "both", "--set", "seed=7", config=own).configs.values()} == {7}

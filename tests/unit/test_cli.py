"""The command line: its examples can be typed, its mistakes are answered at once, and make says what it was told."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ziprc import cli
from ziprc.workflow.call import DEFAULT_EXPERIMENT

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = ROOT / "Makefile"


def subcommands() -> dict[str, argparse.ArgumentParser]:
    choices = next(a.choices for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(choices)


def examples() -> list[str]:
    """Of `ziprc --help`, and of the help of every command."""
    top = [re.split(r" {2,}", line)[0] for line in cli.__doc__.splitlines() if line.startswith("ziprc ")]
    return top + [sub.epilog.removeprefix("example: ") for sub in subcommands().values()]


@pytest.mark.parametrize("example", examples())
def test_every_example_of_the_help_can_be_typed(example: str) -> None:
    program, *arguments = shlex.split(example)
    options = cli.parser().parse_args(arguments)
    assert program == "ziprc" and callable(options.action)


def test_every_command_has_an_example_and_every_option_a_help() -> None:
    assert len(examples()) > 20
    for name, sub in subcommands().items():
        assert f"ziprc {name}" in sub.epilog
        assert [action.dest for action in sub._actions if not action.help] == []


ANSWERS = {
    "inspect results/nope": "There is no folder results/nope (known: made)",
    "inspect results/made": "results/made/introspection/ziprc.parquet does not exist",
    "verify results/mad": "did you mean 'made'",
    "summary results/nope": "There is no folder results/nope",
    "sample x --checkpoint results/made --budget 0": "--budget counts samples and must be at least 1, found 0",
    "sample x --checkpoint results/made --budget nan": "must be at least 1, found nan",
    "sample x --checkpoint results/made --policy zip-rc-pluss": "did you mean 'zip-rc-plus'",
    "sample x --checkpoint results/nope": "There is no checkpoint results/nope",
    "why metrics.json": "A target is a file by its path",
    "build --set seed=three": "seed: Input should be a valid integer",
    "dag --experiment nope": "There is no experiment 'nope'",
    "provenance --experiment smok": "did you mean 'smoke'",
}


def test_plain_mistakes_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "results" / "made").mkdir(parents=True)
    shutil.copy(ROOT / "config.yaml", tmp_path)
    script = f"""
import shlex, sys
from ziprc.cli import main
for line in {list(ANSWERS)!r}:
    try:
        main(shlex.split(line))
    except SystemExit as end:
        print(end.code, end="|", file=sys.stderr)
sys.exit("torch" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, "torch was imported"
    said = done.stderr.split("2|")
    assert len(said) == len(ANSWERS) + 1
    for answer, expected in zip(said, ANSWERS.values(), strict=False):
        assert expected in answer
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["made"], "no folder for what is not there"


def test_a_folder_of_experiments_is_verified_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ziprc.store.manifest import write_manifest

    for name in ("a", "b"):
        (tmp_path / name / "provenance").mkdir(parents=True)
        (tmp_path / name / "x.json").write_text("{}")
        write_manifest(tmp_path / name / "x.json", {}, {})
    (tmp_path / "b" / "x.json").write_text("spoilt")
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(tmp_path)])
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert f"verify: {tmp_path / 'a'}: 1 artifacts" in said and "b/x.json is not what" in said


# --- make -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, in which `ziprc` prints the arguments that it is given, and cuda is installed."""
    shutil.copy(MAKEFILE, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "containers" / "requirements", tmp_path / "containers" / "requirements")
    tool = tmp_path / ".venv" / "bin" / "ziprc"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    tool.chmod(0o755)
    (tmp_path / ".venv" / ".installed-cuda").touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> list[str]:
    plain = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "SET", "EXPERIMENT", "CONFIG"))
    }
    done = subprocess.run(["make", *arguments], cwd=folder, env=plain, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()


def test_what_is_installed_stays_unless_another_is_asked_for(checkout: Path) -> None:
    assert not any("pip" in line for line in make(checkout, "-n", "all"))
    assert any("requirements/cpu.txt" in line for line in make(checkout, "-n", "all", "ACCELERATOR=cpu"))
    (checkout / ".venv" / ".installed-cuda").unlink()
    assert any("requirements/cpu.txt" in line for line in make(checkout, "-n", "all"))


def test_doctor_installs_nothing_and_runs_without_an_environment(checkout: Path) -> None:
    (checkout / ".venv" / ".installed-cuda").unlink()
    (line,) = make(checkout, "-n", "doctor")
    assert line == "python3 -m ziprc.workflow.doctor --accelerator cpu"


def test_an_accelerator_that_there_is_not_is_refused(checkout: Path) -> None:
    assert any(
        "ACCELERATOR is cpu or cuda, found 'gpu'" in line for line in make(checkout, "doctor", "ACCELERATOR=gpu")
    )


@pytest.mark.parametrize("settings", ['prompts.settings.mix={"1 step, small":1}', "a=1 b=[0, 8] c='$HOME {x,y}'"])
def test_settings_reach_the_command_as_they_are_written(checkout: Path, settings: str) -> None:
    said = make(checkout, "all", f"SET={settings.replace('$', '$$')}", "CONFIG=own folder/own.yaml")
    assert said[said.index("--set") + 1] == settings
    assert said[said.index("--config-file") + 1] == "own folder/own.yaml"


def test_every_target_has_the_same_experiment_and_its_own_file(checkout: Path) -> None:
    for target in ("all", "why", "unlock", "dag", "provenance", "fetch"):
        said = make(checkout, target, "CONFIG=own.yaml")
        assert said[:5] == [
            target.replace("all", "build"),
            "--experiment",
            DEFAULT_EXPERIMENT,
            "--config-file",
            "own.yaml",
        ]
    named = make(checkout, "results/smoke/values/train.parquet", "CONFIG=own.yaml")
    assert named[:4] == ["build", "results/smoke/values/train.parquet", "--config-file", "own.yaml"]
    assert make(checkout, "smoke", "SYSTEM=all")[:5] == ["build", "--suite", "smoke", "--system", "all"]


@pytest.mark.parametrize("target", ["all", "why", "unlock", "dag", "provenance", "fetch", "smoke", "verify", "inspect"])
def test_what_make_says_is_a_command(checkout: Path, target: str) -> None:
    said = make(checkout, target, "SET=a=1 b=2")
    assert cli.parser().parse_args(said).action


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "ziprc.cli", "why", "--experiment", "smoke"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize("command", ["run values --name train --experiment smoke", "build --experiment smoke"])
def test_settings_given_one_by_one_all_count(command: str) -> None:
    arguments = [*command.split(), "--set", "seed=3", "--set", "values.folds=1", "base.tokens=2000"]
    assert cli.parser().parse_args(arguments).set == ["seed=3", "values.folds=1", "base.tokens=2000"]

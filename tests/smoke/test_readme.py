"""The README's claims about itself: its commands are targets, its keys exist, CI runs what it says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from ziprc.config import load as settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def documented_keys() -> list[str]:
    """Every `section.key` in the second column of the table of flags, braces expanded."""
    table = README[README.index("## From the original flags to keys") :]
    found: set[str] = set()
    for line in re.findall(r"^\|.*\|$", table, re.M):
        for quoted in re.findall(
            r"`((?:{})\.[^`]+)`".format("|".join(settings.Config.model_fields)), line.split("|")[2]
        ):
            parts = [part.strip("{}").split(",") for part in re.findall(r"\{[^}]*\}|[^.{}]+", quoted.replace(" ", ""))]
            found |= {".".join(choice) for choice in itertools.product(*parts)}
    return sorted(found)


def exists(key: str) -> bool:
    model: Any = settings.Config
    for part in key.split("."):
        if model is dict:
            return True  # the task's own settings
        part = "ziprc" if part == "<head>" else part
        if part not in getattr(model, "model_fields", {}):
            return False
        annotation = model.model_fields[part].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")]
        model = inner[0] if inner else dict if "dict" in str(annotation) else None
    return True


def test_the_table_of_flags_is_long_and_its_keys_exist() -> None:
    keys = documented_keys()
    assert len(keys) > 35
    assert [key for key in keys if not exists(key)] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^    |`|; )make ([a-z-]+)\b(?!/)", README, re.M))))
def test_every_make_command_of_the_readme_is_a_target(target: str) -> None:
    assert re.search(rf"^{target}:.*## ", MAKEFILE, re.M)


def test_the_two_commands_come_first() -> None:
    screen = "\n".join(README.splitlines()[:30])
    assert "make smoke " in screen and "make test " in screen


def test_ci_runs_the_tests_then_the_smoke_run_and_checks_what_it_made() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("make test\n") < script.index("make smoke\n") < script.index("report.html")
    assert "metrics/zip-rc.json" in script and "set -euo pipefail" in script


def test_every_experiment_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"EXPERIMENT=([a-z0-9.-]+)", README))
    assert named <= set(settings.experiments(ROOT / "config.yaml"))

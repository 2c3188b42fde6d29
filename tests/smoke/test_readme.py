"""The README's claims about itself: it is short, its commands and links exist, CI runs what it says."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tests.smoke.pages import PAGES, README, ROOT, USER_PAGES, anchors, blocks, commands, configurations, links, split
from ziprc.cli import parser
from ziprc.config import load as settings
from ziprc.plan.graph import Graph
from ziprc.store.layout import Layout
from ziprc.systems import graph_of

FIRST_SCREEN, BELOW, LINE = 30, 150, 400
LONGEST_PAGE = 80
REFERENCES = {"original.md"}  # tables to look things up in
MAKEFILE = (ROOT / "Makefile").read_text()


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Short enough to be read.


def test_the_two_commands_come_first_and_the_rest_is_short() -> None:
    lines = README.read_text().splitlines()
    first = lines.index("## What happens")
    screen = "\n".join(lines[:first])
    assert first <= FIRST_SCREEN and len(lines) - first <= BELOW
    assert screen.index("](.github/frontier.png)") < screen.index("    make smoke ") < screen.index("    make test ")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_page_is_longer_or_wider_than_can_be_read(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert max(map(len, lines)) <= LINE
    if page in USER_PAGES and page.name not in REFERENCES:
        assert len(lines) <= LONGEST_PAGE


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    found = links(page)
    for link in found:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{named(page)}: {link}"
    assert found or page.name == "library.md"


def test_every_user_page_can_be_found_from_the_readme() -> None:
    assert {f"docs/{page.name}" for page in USER_PAGES} | {"RESULTS.md", "CHANGELOG.md"} <= set(links(README))


def test_every_room_of_the_package_has_its_line() -> None:
    (tree,) = [block for block in blocks(README, "") if "ziprc/stages" in block]
    rooms = {f"ziprc/{path.parent.name}" for path in (ROOT / "ziprc").glob("*/__init__.py")}
    assert {line.split()[0] for line in tree.splitlines()} == rooms


# Commands that can be typed.


@cache
def dry_run(words: tuple[str, ...]) -> str:
    """What `make` would do, word for word; the test of the installation is left out."""
    done = subprocess.run(
        ["make", "-n", "-o", "install", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def understood(command: list[str]) -> None:
    """Fail unless make or the command line takes it."""
    if command[0] == "make":
        variables = {word.partition("=")[0] for word in command if "=" in word}
        known = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M)) | {"BUILDER"}
        assert variables <= known, f"{' '.join(command)}: {variables - known}"
        for line in dry_run(tuple(command)).splitlines():
            if line.startswith("ziprc "):
                understood(split(line)[0])
    elif command[0] == "ziprc":
        try:
            parser().parse_args(command[1:])
        except SystemExit as error:
            raise AssertionError(" ".join(command)) from error


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_is_understood(page: Path) -> None:
    typed = [c for c in commands(page) if c[0] in ("make", "ziprc") and "…" not in "".join(c)]
    for command in typed:
        understood(command)
    assert typed or page.name == "library.md"


def test_a_wrong_command_would_be_noticed() -> None:
    for command in ("make alll", "make all EXPERIEMENT=toy", "ziprc biuld", "ziprc verify", "ziprc why --system"):
        with pytest.raises(AssertionError):
            understood(command.split())


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    """Every experiment of config.yaml and of the pages."""
    file = tmp_path_factory.mktemp("configuration") / "own.yaml"
    found = {}
    for content in [content for page in PAGES for content in configurations(page)]:
        file.write_text(yaml.safe_dump(content))
        found |= {name: settings.load(file, name) for name in content["experiments"]}
    return {name: graph_of(config, Layout(Path("results"), name)) for name, config in found.items()}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_experiment_and_artifact_that_is_named_exists(page: Path, plans: dict[str, Graph]) -> None:
    words = [word for command in commands(page) for word in command if "…" not in word]
    assert {word.partition("=")[2] for word in words if word.startswith("EXPERIMENT=")} <= set(plans)
    for path in {Path(word) for word in words if word.startswith("results/") and word.count("/") > 1}:
        plan = plans[path.parts[1]]
        files = plan.files(plan.known())
        assert path in files or path in [file.parent for file in files], f"{named(page)}: {path}"


# Keys that exist.


def documented_keys() -> list[str]:
    """Every `section.key` in the second column of the table of flags, braces expanded."""
    table = (ROOT / "docs" / "original.md").read_text()
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
        if part == "<name>":
            continue  # a key of a mapping, whose values are the model that follows
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


# What CI does.


def test_ci_runs_the_tests_then_the_smoke_run_and_checks_what_it_made() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("make test\n") < script.index("make smoke\n") < script.index("report.html")
    assert "metrics/zip-rc.json" in script and "set -euo pipefail" in script

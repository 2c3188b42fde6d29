"""What is added beside existing work reruns none of it: a table, a task, a system, a page section, in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ziprc.workflow.launch import root_of

ROOT = root_of(Path(__file__))
RECIPES = """
import json, sys
from pathlib import Path
from ziprc.config.load import load
from ziprc.store.layout import Layout
from ziprc.systems import graph_of
graph = graph_of(load(Path("config.yaml"), "smoke"), Layout(Path("results"), "smoke"))
print(json.dumps({str(ref): [graph.params(ref), graph.code(ref)] for ref in graph.known()}))
"""
SYSTEM = """
from ziprc.plan.stage import TABLE, Ref, Stage, System, one
STAGES = (Stage("extra", "made up, {name}", TABLE, one("x"), reads=lambda c, v: {"p": Ref("prompts", "test")}),)
EXTRA = System("extra", STAGES, rollouts=lambda c: {}, shows=lambda c: {"extra": Ref("extra", "x")},
               evaluated=lambda c: {}, evaluate_params=lambda c: [], sections=(), evaluation="", page="ziprc.pages.extra")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what recipes follow from."""
    shutil.copytree(ROOT / "ziprc", tmp_path / "ziprc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("config.yaml", "Snakefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def recipes(tree: Path) -> dict[str, list[object]]:
    """Params and code digest of every artifact of `smoke`."""
    found = subprocess.run(
        [sys.executable, "-c", RECIPES], cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def before() -> dict[str, list[object]]:
    """Those of the package as it is."""
    return recipes(ROOT)


def append(path: Path, text: str) -> None:
    path.write_text((path.read_text() if path.exists() else "") + text)


def test_a_new_table_task_system_and_page_rerun_nothing(tree: Path, before: dict[str, list[object]]) -> None:
    assert recipes(tree) == before, "a copy has the recipes of its original"
    assert len(before) > 30
    table = (tree / "ziprc" / "tables" / "values.py").read_text()
    append(tree / "ziprc" / "tables" / "extra.py", table.replace("VALUES", "EXTRA").replace('"values"', '"extra"'))
    append(tree / "ziprc" / "tasks" / "extra.py", (tree / "ziprc" / "tasks" / "countdown.py").read_text())
    append(tree / "ziprc" / "pages" / "extra.py", "def sections(reads: object) -> list[object]:\n    return []\n")
    append(tree / "ziprc" / "stages" / "extra.py", "def run(context: object) -> str:\n    return 'made'\n")
    append(tree / "ziprc" / "systems" / "extra.py", SYSTEM)
    registry = tree / "ziprc" / "systems" / "__init__.py"
    text = re.sub(r"^(SYSTEMS = \(.*)\)$", r"\1, EXTRA)", registry.read_text(), flags=re.MULTILINE)
    registry.write_text(
        text.replace("from ziprc.systems.zip_rc", "from ziprc.systems.extra import EXTRA\nfrom ziprc.systems.zip_rc")
    )
    after = recipes(tree)
    assert after.pop("extra x"), "the made-up stage is part of the plan"
    assert after == before


@pytest.mark.parametrize(
    ("module", "touched", "untouched"),
    [
        ("joint/bins", {"train_joint ziprc", "values train", "frontier frontier"}, {"prompts train", "grades train"}),
        ("tasks/arithmetic", {"prompts train", "base base"}, {"train_joint ziprc", "introspection ziprc"}),
        ("tables/values", {"values train", "train_joint ziprc"}, {"prompts train", "rollouts train", "grades train"}),
        ("rewards/math", set(), {"grades train", "samples majority"}),
        ("tasks/countdown", set(), {"prompts train", "frontier frontier"}),
        ("workflow/launch", set(), {"prompts train", "train_joint ziprc"}),
    ],
)
def test_changed_code_reruns_what_runs_it(
    tree: Path, before: dict[str, list[object]], module: str, touched: set[str], untouched: set[str]
) -> None:
    append(tree / "ziprc" / f"{module}.py", "\nADDED = 1\n")
    after = recipes(tree)
    moved = {ref for ref in before if before[ref] != after[ref]}
    assert touched <= moved and not untouched & moved

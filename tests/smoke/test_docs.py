"""The pages of docs/ for each kind of user: their code runs as written, their configuration files are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.doubles import tiny_checkpoint
from tests.smoke.pages import ROOT, blocks, configurations
from ziprc.config import load as settings
from ziprc.tables.prompts import content
from ziprc.tasks.base import get_task

DOCS = ROOT / "docs"
EXPERIMENTS = ("own-model.md", "own-data.md", "own-experiment.md", "on-policy.md")


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "<page>", "exec", dont_inherit=True), names)


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_of_the_library_page_runs_as_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_checkpoint(folder / "results/smoke/checkpoints/ziprc")
    names: dict[str, Any] = {"__name__": "page"}
    parts = blocks(DOCS / "library.md", "python")
    for part in parts:
        run(part, names)
    before = len(names["prompt"])
    by_hand = names["score"][before - 1 : -1].numpy()
    np.testing.assert_allclose(by_hand, names["joint"].expected_reward(), atol=1e-5)
    assert names["out"][0, before:].max() < names["layout"]["text_size"]
    assert len(parts) == 3 and capsys.readouterr().out.count("\n") >= 5


def test_the_code_of_the_model_page_finds_room_and_makes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, grow = blocks(DOCS / "own-model.md", "python")
    tiny_checkpoint(folder / "models/mine", joint=False)
    tiny_checkpoint(folder / "models/full", joint=False)
    run(count, {})
    run(grow, {})
    run(count.replace("models/mine", "models/roomy"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert "of 320" in first and "of 384" in second


@pytest.mark.parametrize("page", EXPERIMENTS)
def test_the_experiments_of_a_page_are_accepted(page: str, folder: Path) -> None:
    files = configurations(DOCS / page)
    own = {name for file in files for name in file["experiments"]} - set(settings.experiments(ROOT / "config.yaml"))
    assert files and own
    for file in files:
        (folder / "own.yaml").write_text(yaml.safe_dump(file))
        for name in own & set(file["experiments"]):
            settings.load(folder / "own.yaml", name)
        assert settings.suites(folder / "own.yaml")


def test_the_splits_of_the_data_page_are_what_it_says(folder: Path) -> None:
    (folder / "data").mkdir()
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(100)]
    (folder / "data/questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "own.yaml").write_text(yaml.safe_dump(configurations(DOCS / "own-data.md")[0]))
    prompts = settings.load(folder / "own.yaml", "my-data").prompts
    found = {s: get_task("hub").prompts(prompts.settings, s, 0, 0) for s in ("train", "validation", "test")}
    assert {split: len(of) for split, of in found.items()} == {"train": 80, "validation": 10, "test": 10}
    assert len({content(prompt.messages) for of in found.values() for prompt in of}) == 100


def test_the_reward_of_the_page_on_policies_is_one(folder: Path) -> None:
    names: dict[str, Any] = {}
    (code,) = blocks(DOCS / "on-policy.md", "python")
    run(code, names)
    found = names["brevity"](completion_ids=[[0] * 100, []], score=[1.0, 0.0], finished=[True, True], window=[9, 9])
    assert found == [0.5, 0.0]

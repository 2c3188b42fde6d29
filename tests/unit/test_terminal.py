"""`ziprc sample`: it answers live, says why, and refuses bad input before an engine starts."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import tiny_checkpoint, tiny_fitted, tiny_tokenizer
from ziprc.cli import main
from ziprc.errors import UserError
from ziprc.joint.head import read_manifest
from ziprc.pages import terminal
from ziprc.pages.terminal import Line, branch_line, cells, frame, head, sample, tail
from ziprc.sampling.live.asking import Wishes, prepare
from ziprc.store.files import write_json
from ziprc.store.manifest import write_sealed

STOPS = [*range(0, 256, 12), 258]  # many, so that a random model ends


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("results") / "tiny" / "checkpoints" / "ziprc", seed=1)
    write_json(folder / "generation_config.json", {"eos_token_id": STOPS, "pad_token_id": 256})
    write_json(folder / "calibration.json", tiny_fitted().to_dict())
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "results" / "tiny" / "checkpoints" / "ziprc"))


@pytest.fixture
def wishes(original: Path) -> Wishes:
    return Wishes("Compute 2+2", original, engine="hf", price=1e-5, max_branches=5, max_new_tokens=60, seed=3)


# --- answers --------------------------------------------------------------------------------------------------------


def test_elsewhere_than_in_a_terminal_every_change_is_a_line(wishes: Wishes, capsys: pytest.CaptureFixture[str]):
    assert sample(wishes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Compute 2+2"
    assert lines[1].startswith("zip-rc-plus@1e-05 on hf, at most 5 branches; temperature 1, min-p 0.1")
    assert re.match(r"step +1  continue #1: .*gain .* a token ≥ price 1e-05  \[#1 P 0\.\d\d, ~\d+ left\]", lines[2])
    assert re.search(r"step +\d+  stop: ", "\n".join(lines))
    assert re.match(r"answer: .*  P\(right\) \d\.\d\d, from #\d", lines[-2])
    assert re.match(r"\d+ tokens in \d branch(es)? \(\d finished\), \d+ steps, \d+ prompt tokens computed, ", lines[-1])
    assert all(c.isprintable() for line in lines for c in line)


@pytest.mark.parametrize("policy", ["zip-rc-plus", "zip-rc-plus-branching", "zip-rc-plus-wide", "zip-rc", "majority"])
def test_every_policy_answers_as_json(wishes: Wishes, policy: str, capsys: pytest.CaptureFixture[str]):
    price = wishes.price if policy.startswith("zip-rc-plus") else None
    assert sample(replace(wishes, policy=policy, price=price, samples=3), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == sum(branch["tokens"] for branch in found["branches"])
    (chosen,) = [branch for branch in found["branches"] if branch["chosen"]]
    assert chosen["answer"] == found["answer"] and 0 <= found["probability"] <= 1
    assert found["policy"].startswith("majority@3" if policy == "majority" else policy)


def test_equal_seeds_give_equal_answers(wishes: Wishes, capsys: pytest.CaptureFixture[str]):
    found = []
    for seed in (3, 3, 4):
        sample(replace(wishes, seed=seed), as_json=True)
        found.append([branch["text"] for branch in json.loads(capsys.readouterr().out)["branches"]])
    assert found[0] == found[1] != found[2]


def test_a_budget_of_tokens_is_kept_and_named_as_the_reason(wishes: Wishes, capsys: pytest.CaptureFixture[str]):
    sample(replace(wishes, price=1e-9, max_tokens=40))
    out = capsys.readouterr().out
    assert int(re.search(r"^(\d+) tokens in", out, re.M)[1]) <= 40
    assert re.search(r"stop: (the budget is spent|nothing more fits into the budget)", out)


def test_a_response_that_never_ends_has_no_answer(wishes: Wishes, capsys: pytest.CaptureFixture[str]):
    sample(replace(wishes, max_tokens=9, max_branches=1))
    assert "no answer: no branch ended with one" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_redrawn_in_place(wishes: Wishes, monkeypatch: pytest.MonkeyPatch):
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.delenv("NO_COLOR", raising=False)
    sample(wishes)
    text = out.getvalue()
    *frames, last = re.split(r"\x1b\[\d+A\r\x1b\[J", text)
    ups = [int(n) for n in re.findall(r"\x1b\[(\d+)A", text)]
    assert ups[1:] == [frame.count("\n") for frame in frames[1:]]
    assert "answer:" in last and "→#" in last
    plain = re.sub(r"\x1b\[(\d+A|J|\d+m)", "", text)
    assert all(c.isprintable() or c in "\r\n" for c in plain)
    assert max(cells(line) for line in plain.replace("\r", "").splitlines()) < 70


# --- lines ----------------------------------------------------------------------------------------------------------


def test_a_line_fits_its_columns_and_shows_the_end_of_the_text():
    line = Line(0, "running", 0.5, 12.3, 40, "漢字" * 50 + "the end", origin="#1 at 7")
    for width in (10, 40, 61, 90):
        assert cells(branch_line(line, width)) <= width
    assert branch_line(line, 90).endswith("the end")
    assert "(off #1 at 7)" in branch_line(line, 90) and "0.50" in branch_line(line, 90)
    assert (head("漢字x", 3), tail("x漢字", 3)) == ("漢", "字")


def test_the_chosen_and_the_running_branches_stay_when_rows_are_few():
    lines = [Line(i, "running" if i in (2, 5) else "paused", i / 10, 1.0, 3, "") for i in range(8)]
    shown = frame(lines, 80, 4, chosen=0)
    assert [line.split()[0] for line in shown[1:-1]] == ["→#1", "#3", "#6", "#8"]
    assert shown[-1].strip() == "and 4 other branches"


# --- what the experiment says ---------------------------------------------------------------------------------------


def frontier() -> dict[str, Any]:
    own = {"interval": 4, "window": 2, "width": 1}
    plus = [{**own, "name": f"p{t}", "price": 1 / t, "tokens": t} for t in (10.0, 30.0, 90.0)]
    return {"chosen": {"zip-rc-plus": plus, "zip-rc": []}, "one_sample": 10.0}


def test_a_checkpoint_is_asked_as_its_experiment_asked_it(checkpoint: Path):
    home = checkpoint.parent.parent
    write_json(home / "frontier.json", frontier())
    write_json(home / "prompts" / "test.manifest.json", {"params": {"prompts.task": "countdown"}})
    sampling = {"temperature": 0.6, "min_p": 0.0, "top_p": 0.9, "top_k": 7}
    params = {"engine": "hf", "sampling": sampling, "max_new_tokens": 55, "dtype": "float32", "test_thinking": False}
    write_json(home / "rollouts" / "test.manifest.json", {"params": {f"rollouts.{k}": v for k, v in params.items()}})
    ready = prepare(Wishes("Make 24 from 3,5,7", checkpoint, samples=4))
    own = ready.config.rollouts
    assert (own.engine, own.max_new_tokens, own.test_thinking, ready.task.name) == ("hf", 55, False, "countdown")
    assert own.sampling.model_dump() == sampling
    assert ready.setting.policy.price == 1 / 30
    assert (ready.controller.budget.interval, ready.setting.window) == (4, 2)
    ready = prepare(Wishes("?", checkpoint, samples=9, price=0.5, interval=3, temperature=0.1, task="arithmetic"))
    assert ready.setting.policy.price == 0.5 and ready.controller.budget.interval == 3
    assert ready.config.rollouts.sampling.temperature == 0.1 and ready.task.name == "arithmetic"


def test_a_copied_checkpoint_is_asked_with_defaults(checkpoint: Path, tmp_path: Path):
    ready = prepare(Wishes("?", Path(shutil.copytree(checkpoint, tmp_path / "copy")), policy="zip-rc"))
    assert ready.setting.policy.name == "zip-rc@1,0.03"
    assert ready.config.rollouts.sampling.temperature == 1.0
    assert ready.task.canonical_answer("<think>no</think> 7 ") == "7" and ready.task.canonical_answer(" ") is None


def test_the_engine_holds_exactly_the_prompt_and_a_response(wishes: Wishes):
    ready = prepare(replace(wishes, max_new_tokens=300))
    assert ready.config.rollouts.max_model_len == len(ready.question.prompt_token_ids) + 300


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(terminal, "answer", started)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"price": 0.0}, "price must be above 0"),
        ({"price": -1.0}, "price must be above 0"),
        ({"price": None, "alpha": 0.5}, "--alpha means nothing to the policy 'zip-rc-plus'"),
        ({"policy": "majority"}, "--price means nothing"),
        ({"policy": "zip-rc", "price": None, "alpha": 1.5}, r"alpha.*1\.5"),
        ({"policy": "zip-rc", "price": None, "beta": -0.1}, r"beta.*-0\.1"),
        ({"max_tokens": 8}, "allows 8 tokens per prompt"),
        ({"max_steps": 3}, "allows 3 latency"),
        ({"max_new_tokens": 5}, "5 tokens, less than one decision interval of 8"),
        ({"interval": 0}, "interval and branches must be at least 1"),
        ({"max_branches": 0}, "interval and branches must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature.*found -1.0"),
        ({"min_p": 2.0}, "min_p.*found 2.0"),
        ({"prompt": "1+" * 300}, "The prompt has 6.. tokens.*512 positions"),
        ({"max_new_tokens": 500}, "512 positions"),
        ({"task": "arithmetics"}, "Unknown task 'arithmetics'.*did you mean 'arithmetic'"),
    ],
)
@pytest.mark.usefixtures("no_engine")
def test_bad_input_is_refused_before_the_engine_starts(wishes: Wishes, change: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        sample(replace(wishes, **change))


@pytest.mark.usefixtures("no_engine")
def test_a_checkpoint_without_a_joint_head_is_refused(wishes: Wishes, tmp_path: Path):
    plain = tiny_checkpoint(tmp_path / "base", joint=False)
    with pytest.raises(UserError, match="has no joint head"):
        sample(replace(wishes, checkpoint=plain))


@pytest.mark.usefixtures("no_engine")
def test_a_checkpoint_without_a_calibration_is_refused(wishes: Wishes, checkpoint: Path):
    (checkpoint / "calibration.json").unlink()
    with pytest.raises(UserError, match="is not calibrated"):
        sample(replace(wishes, checkpoint=checkpoint))


@pytest.mark.usefixtures("no_engine")
def test_another_tokenizer_is_refused(wishes: Wishes, checkpoint: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(3)])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="saved with another tokenizer"):
        sample(replace(wishes, checkpoint=checkpoint))
    manifest = read_manifest(checkpoint)
    del manifest["files"]
    write_sealed(checkpoint / "ziprc.json", manifest)
    with pytest.raises(UserError, match="token 263 is in use, but text ends at row 260"):
        sample(replace(wishes, checkpoint=checkpoint))


def test_the_command_line_passes_every_option_on(original: Path, capsys: pytest.CaptureFixture[str]):
    options = "--policy zip-rc --alpha 0.5 --beta 0.01 --interval 4 --max-tokens 99 --max-steps 50 --max-branches 3"
    more = (
        "--max-new-tokens 30 --temperature 0.9 --min-p 0.05 --no-thinking --task arithmetic --engine hf --seed 2 --json"
    )
    with pytest.raises(SystemExit) as end:
        main(["sample", "2+2", "--checkpoint", str(original), *options.split(), *more.split()])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"].startswith("zip-rc@0.5,0.01") and found["tokens"] <= 99 and len(found["branches"]) <= 3

"""The tree of one prompt: what it shows is what the samples table says, and nothing in it can act."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ziprc.cli import main
from ziprc.errors import UserError
from ziprc.pages import tree as tree_view
from ziprc.pages.tree import Branch, Piece, colour, interest, load_tree, one_line, page, tree_text
from ziprc.store.layout import Layout
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.samples import SAMPLES

POLICY = "zip-rc-plus-branching"
EVIL = "<img src=x onerror=alert(1)>\x1b[2J & 2+2"


def row(decision: int, step: int, branch: int, length: int, status: str, action: str, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": "dull", "policy": f"{POLICY}@0.01", "budget": "2", "decision": decision, "step": step,
        "branch_id": branch, "parent": -1, "fork": 0, "length": length, "status": status, "action": action,
        "expected_reward": 0.5, "expected_remaining": 9.0, "tokens_spent": step, "utility": 0.02,
        "answer_number": -1, "signals": [0.0],
        "selected": False, **more,
    }  # fmt: skip


def final(step: int, branch: int, length: int, decision: int = 4, **more: Any) -> dict[str, Any]:
    more = {"probability": 0.9, "prefill": 31, **more}
    return row(decision, step, branch, length, more.pop("status", "finished"), "stop", **more)


def dull(budget: str = "2") -> list[dict[str, Any]]:
    """One branch that ran to its end."""
    rows = [row(0, 1, 0, 1, "running", "start"), final(6, 0, 6, 1, answer="7", score=0.0, selected=True)]
    return [r | {"budget": budget} for r in rows]


def rich() -> list[dict[str, Any]]:
    """#1 is paused in step 5 and resumed in step 13, #2 forks off it at token 3 in step 5, #3 starts in step 9."""
    fork = {"parent": 0, "fork": 3, "expected_reward": 0.8}
    rows = [
        row(0, 1, 0, 1, "running", "start"),
        row(1, 5, 0, 5, "running", "pause"),
        row(2, 9, 0, 5, "paused", "wait"), row(2, 9, 1, 7, "running", "branch", **fork),
        row(3, 13, 0, 5, "paused", "resume"), row(3, 13, 1, 7, "paused", "wait", **fork),
        row(3, 13, 2, 4, "finished", "start"),
        final(18, 0, 10, answer="41", score=0.0), final(18, 1, 7, status="paused", **fork),
        final(18, 2, 4, answer=EVIL, score=1.0, selected=True),
    ]  # fmt: skip
    return [r | {"prompt_id": "rich"} for r in rows]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    layout = Layout(tmp_path, "tiny")
    prompts = [
        {"prompt_id": name, "task": "arithmetic", "source": "arithmetic", "split": "test",
         "messages": [{"role": "user", "content": EVIL}], "answer": "4", "difficulty": "hard", "extra": "{}"}
        for name in ("dull", "rich", "failed")
    ]  # fmt: skip
    PROMPTS.write(layout.table("prompts", "test"), PROMPTS.make(prompts))
    SAMPLES.write(layout.table("samples", POLICY), SAMPLES.make([*dull(), *dull("16"), *dull("8"), *rich()]))
    return layout.home


def test_a_branch_is_drawn_when_it_ran(home: Path):
    one, two, three = load_tree(home, "rich").branches
    assert [(p.start, p.stop) for p in one.pieces] == [(0, 1), (1, 5), (13, 18)]
    assert one.gaps == [(5, 13)]
    assert (two.begun, two.row["fork"], two.row["parent"], two.end) == (5, 3, 0, 9)
    assert (three.begun, three.end) == (9, 13)
    assert [b.verdict for b in (one, two, three)] == ["wrong", "abandoned", "right"]
    assert three.row["selected"]


def test_the_pieces_of_all_branches_are_the_tokens_that_were_generated(home: Path):
    branches = load_tree(home, "rich").branches
    assert all(sum(p.stop - p.start for p in b.pieces) == b.row["length"] - b.row["fork"] for b in branches)


def test_decisions_are_told_by_what_they_changed(home: Path):
    words = [m["words"] for m in load_tree(home, "rich").moments]
    fork = "pause #1, branch #1 after 3 tokens as #2"
    assert words == ["continue #1", fork, "pause #2, start #3", "resume #1", "stop"]


def test_a_fork_of_a_fork_is_drawn_from_the_branch_that_generated_the_token():
    def branch(number: int, parent: int, fork: int, start: int, stop: int) -> Branch:
        return Branch({"branch_id": number, "parent": parent, "fork": fork}, start, (Piece(start, stop, None, None),))

    first, second = branch(0, -1, 0, 0, 9), branch(1, 0, 6, 9, 14)
    third, late = branch(2, 1, 4, 14, 15), branch(3, 1, 8, 14, 15)
    tree = tree_view.Tree({}, (first, second, third, late), [])
    assert tree_view._origin(tree, third) == (first, 4)
    assert tree_view._origin(tree, late) == (second, 11)


def test_auto_takes_the_prompt_that_shows_most(home: Path):
    assert load_tree(home, "auto").prompt["prompt_id"] == "rich"
    outcome = {"answer": None, "score": None}
    assert interest([outcome | r for r in rich()]) > interest([outcome | r for r in dull()])


def test_a_prompt_is_drawn_at_its_largest_budget_unless_one_is_named(home: Path):
    assert load_tree(home, "dull").chosen.row["budget"] == "16"
    assert load_tree(home, "dull", budget="8").chosen.row["budget"] == "8"


def test_what_is_not_there_is_named(home: Path, tmp_path: Path):
    with pytest.raises(UserError, match=rf"policy 'zip-rc-plus-branch' \(did you mean '{POLICY}'"):
        load_tree(home, policy="zip-rc-plus-branch")
    with pytest.raises(UserError, match="no prompt_id 'nobody'"):
        load_tree(home, "nobody")
    with pytest.raises(UserError, match="no budget '3'"):
        load_tree(home, budget="3")
    with pytest.raises(UserError, match=r"no samples.*make"):
        load_tree(tmp_path / "other")


def test_a_prompt_whose_sampling_failed_is_never_chosen_and_says_so_when_asked_for(home: Path):
    failed = [r | {"prompt_id": "failed", "selected": False, "answer": None, "score": None} for r in rich()]
    path = Layout(home.parent, home.name).table("samples", POLICY)
    SAMPLES.write(path, SAMPLES.make([*failed, *dull()]))
    assert load_tree(home).prompt["prompt_id"] == "dull"
    with pytest.raises(UserError, match="prompt failed failed"):
        load_tree(home, "failed")


def test_an_answer_without_a_score_is_neither_right_nor_wrong(home: Path):
    (branch,) = load_tree(home, "dull").branches
    assert branch.verdict == "wrong" and replace(branch, row={**branch.row, "score": None}).verdict == "not graded"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "line", "path", "circle") or f"</{tag}>" in self.get_starttag_text():
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_data_as_text_and_needs_nothing_else(home: Path):
    text = page(load_tree(home, "rich"))
    tags = Tags()
    tags.feed(text)
    assert not {"img", "script", "link", "iframe"} & tags.seen
    assert not [name for name in tags.attributes if name.startswith("on") or name in ("src", "href")]
    assert html.escape("<img src=x") in text
    assert "http" not in text
    assert "chosen, P 0.90" in tags.text and "41 wrong" in tags.text and "abandoned" in tags.text


def test_colours_run_from_the_first_to_the_last_of_the_ramp():
    assert [colour(v) for v in (0.0, 0.5, 1.0, 7.0)] == [
        "rgb(239,122,92)",
        "rgb(246,224,150)",
        "rgb(118,184,232)",
        "rgb(118,184,232)",
    ]
    assert colour(None) == "rgb(160,160,160)"


def test_the_drawing_in_characters_says_the_same(home: Path):
    text = tree_text(home, "rich")
    assert "\x1b" not in text
    lanes = [line for line in text.splitlines() if re.match(r" +#\d ", line)]
    assert re.search(r"5+\.+5+\* +41, wrong", lanes[0])
    assert re.search(r"\\-*8+x +abandoned.*from #1 at 3", lanes[1])
    assert re.search(r"5+\* .*right.*<- chosen, P 0.90", lanes[2])
    assert "step    5,    5 tokens: pause #1, branch #1 after 3 tokens as #2" in text


def test_one_line_keeps_no_control_characters():
    assert one_line("a\nb\x1b[2J\r\x7f\u202eé") == "a⏎b·[2J···é"


def test_the_command_line_draws_it(home: Path, capsys: pytest.CaptureFixture[str]):
    for options, said in ((["--text"], "right"), ([], f"tree-{POLICY}.html")):
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(home), "--tree", "auto", "--policy", POLICY, *options])
        assert not end.value.code
        assert said in capsys.readouterr().out
    assert "<svg" in (home / f"tree-{POLICY}.html").read_text()

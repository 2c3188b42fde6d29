"""One prompt's tree of branches as it was sampled live: a page with a drawing, or characters for a terminal.

Everything comes from `samples/<policy>.parquet`. The x axis counts serial decoding steps, so what is drawn above each other
ran at the same time; a piece of a branch between two decisions has the colour of what was expected of it at the second.
Question and answers are data: they reach the page escaped and the terminal without control characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ziprc.errors import UserError, nearest
from ziprc.pages.html import fill
from ziprc.store.files import write_text
from ziprc.store.layout import Layout
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.samples import SAMPLES

Row = Mapping[str, Any]
READABLE = 8  # branches: a drawing with more is not the first to show
RIGHT = 0.5


# --- what happened ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What a branch grew between two decisions, in serial steps."""

    start: int
    stop: int
    value: float | None  # expected at its end
    remaining: float | None


@dataclass(frozen=True)
class Branch:
    """One branch, from the step in which it began to its last token; `row` is its last in the table."""

    row: Row
    begun: int
    pieces: tuple[Piece, ...]

    @property
    def end(self) -> int:
        return self.pieces[-1].stop if self.pieces else self.begun

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """When it was paused and resumed."""
        return [(a.stop, b.start) for a, b in pairwise(self.pieces) if b.start > a.stop]

    @property
    def verdict(self) -> str:
        """What became of the branch, in a word or two."""
        row = self.row
        if row["status"] != "finished":
            return "abandoned"
        if row["answer"] is None:
            return "cut off"
        if row["score"] is None:
            return "not graded"
        return "right" if row["score"] >= RIGHT else "wrong"

    def at_token(self, token: int) -> int:
        """The step in which it had that many tokens; the nearest that it generated itself."""
        count = self.row["fork"]
        for piece in self.pieces:
            grown = piece.stop - piece.start
            if count + grown >= token:
                return piece.start + max(0, token - count)
            count += grown
        return self.end


@dataclass(frozen=True)
class Tree:
    """The tree of one prompt; a moment is a decision: step, tokens_spent, utility, and what it did, in `words`."""

    prompt: Row
    branches: tuple[Branch, ...]
    moments: Sequence[Row]

    @property
    def question(self) -> str:
        return "\n".join(map(one_line, self.prompt["messages"][-1]["content"].splitlines()))

    @property
    def probability(self) -> float:
        return self.chosen.row["probability"] or 0.0

    @property
    def steps(self) -> int:
        return self.moments[-1]["step"]

    @property
    def chosen(self) -> Branch:
        return next(branch for branch in self.branches if branch.row["selected"])

    @property
    def verdict(self) -> str:
        row, spent = self.chosen.row, self.moments[-1]["tokens_spent"]
        computed = f"{self.steps} steps, {row['prefill'] or 0} prompt tokens computed"
        costs = f"{spent} tokens in {len(self.branches)} branches, {computed}"
        if row["answer"] is None:
            return f"no answer; {costs}"
        return f"answer {_short(row['answer'], 60)}, {self.chosen.verdict}, P(right) {self.probability:.2f}; {costs}"


def _branch(rows: Sequence[Row], steps: Sequence[int]) -> Branch:
    """One branch from its rows, by decision; `steps[d]` is the step after which tokens of decision `d` were generated."""
    pieces = []
    for row, before in zip(rows, [rows[0]["fork"], *(row["length"] for row in rows)], strict=False):
        if grown := row["length"] - before:
            start = steps[row["decision"]]
            pieces.append(Piece(start, start + grown, row["expected_reward"], row["expected_remaining"]))
    return Branch(rows[-1], steps[rows[0]["decision"]], tuple(pieces))


def _changes(now: Mapping[int, Row], then: Mapping[int, Row]) -> Iterator[str]:
    """What a decision changed, seen in what the branches were before it and before the next."""
    for number, row in then.items():
        before = now[number]["status"] if number in now else None
        grown = number in now and row["length"] > now[number]["length"]
        if before is None:
            origin = "start" if row["parent"] < 0 else f"branch #{row['parent'] + 1} after {row['fork']} tokens as"
            yield f"{origin} #{number + 1}"
        elif before == "paused" and (grown or row["status"] == "running"):
            yield f"resume #{number + 1}"
        elif before == "running":
            yield f"{'pause' if row['status'] == 'paused' and not grown else 'continue'} #{number + 1}"


def tree_of(rows: Sequence[Row], prompt: Row) -> Tree:
    """The tree that all rows of one prompt and budget describe; UserError when sampling it failed."""
    if not any(row["selected"] for row in rows):
        raise UserError(f"Sampling of the prompt {rows[0]['prompt_id']} failed, so it has no tree. Name another one.")
    ordered = sorted(rows, key=lambda row: (row["decision"], row["branch_id"]))
    decisions = [{row["branch_id"]: row for row in part} for _, part in groupby(ordered, lambda row: row["decision"])]
    moments = []
    for now, then in zip_longest(decisions, decisions[1:]):
        words = "stop" if then is None else ", ".join(_changes(now, then))
        moments.append({**next(iter(now.values())), "words": words})
    by_branch = [[each[number] for each in decisions if number in each] for number in sorted(decisions[-1])]
    branches = tuple(_branch(own, [0, *(moment["step"] for moment in moments)]) for own in by_branch)
    return Tree(prompt, branches, moments)


# --- which prompt -----------------------------------------------------------------------------------------------------


def interest(rows: Sequence[Row]) -> tuple[float, ...]:
    """How much the tree of one prompt shows: a right choice, among several answers, by many kinds of action.

    A prompt whose sampling failed has none, and comes last.
    """
    final = [row for row in rows if row["action"] == "stop"]
    answers = {row["answer"] for row in final} - {None}
    right = any(row["selected"] and (row["score"] or 0) >= RIGHT for row in final)
    kinds = {row["action"] for row in rows} & {"start", "branch", "pause", "resume"}
    answered = any(row["selected"] for row in rows)
    return (answered, right and len(final) <= READABLE, right, len(answers) > 1, len(kinds), len(answers), len(rows))


def _policy_of(layout: Layout, policy: str | None) -> str:
    """A policy whose samples are there; the one with most to show when none is named."""
    known = sorted(path.stem for path in (layout.home / "samples").glob("*.parquet"))
    if not known:
        path = layout.table("samples", policy or "zip-rc-plus")
        raise UserError(f"{layout.home} has no samples, so there is no tree to draw. Build them first: `make {path}`.")
    if policy is None:
        return next((name for name in known if name.endswith("branching")), known[-1])
    if policy not in known:
        raise UserError(f"{layout.home} has no samples of the policy '{policy}'{nearest(policy, known)}.")
    return policy


def load_tree(home: Path, wanted: str = "auto", policy: str | None = None, budget: str | None = None) -> Tree:
    """The tree of a prompt, by its id or `auto`, the one that shows most; of its largest budget unless one is named."""
    layout = Layout(home.parent, home.name)
    samples = SAMPLES.read(layout.table("samples", _policy_of(layout, policy)))
    samples = _only(samples, "budget", budget) if budget else samples
    if wanted == "auto":
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in samples.select(["prompt_id", "budget", "action", "answer", "score", "selected"]).to_pylist():
            groups.setdefault((row["prompt_id"], row["budget"]), []).append(row)
        wanted, budget = max(sorted(groups), key=lambda key: interest(groups[key]))
    samples = _only(samples, "prompt_id", wanted)
    samples = _only(samples, "budget", budget or max(samples["budget"].to_pylist(), key=float))
    prompts = {row["prompt_id"]: row for row in PROMPTS.read(layout.table("prompts", "test")).to_pylist()}
    return tree_of(samples.to_pylist(), prompts[wanted])


def _only(samples: pa.Table, column: str, value: str) -> pa.Table:
    found = samples.filter(pc.equal(samples[column], value))
    if not found.num_rows:
        hint = nearest(value, set(samples[column].to_pylist())) if column == "budget" else ""
        raise UserError(f"The samples have no {column} '{value}'{hint}.")
    return found


# --- page -------------------------------------------------------------------------------------------------------------

LEFT, RIGHT_MARGIN, WIDTH, LANE, TOP = 46, 270, 1000, 34, 34
RAMP = ((239, 246, 118), (122, 224, 184), (92, 150, 232))  # red, green, blue, as in `ziprc inspect`
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def colour(value: float | None) -> str:
    """From low to high expected score; grey where nothing is known."""
    if value is None:
        return "rgb(160,160,160)"
    return f"rgb({','.join(str(round(np.interp(value, (0, 0.5, 1), shades))) for shades in RAMP)})"


def _origin(tree: Tree, branch: Branch) -> tuple[Branch, int]:
    """The ancestor that generated the token after which `branch` forked, and the step in which it did."""
    by_number = {each.row["branch_id"]: each for each in tree.branches}
    fork, parent = branch.row["fork"], by_number[branch.row["parent"]]
    while fork <= parent.row["fork"] and parent.row["parent"] in by_number:
        parent = by_number[parent.row["parent"]]
    return parent, parent.at_token(fork)


def page(tree: Tree) -> str:
    """A page that needs nothing else; the drawing is laid out in `templates/tree.svg`."""
    lanes = {branch.row["branch_id"]: TOP + LANE * (i + 0.5) for i, branch in enumerate(tree.branches)}
    every = next((t for t in TICKS if tree.steps / t <= 12), TICKS[-1])
    frame = {"width": WIDTH, "height": TOP + LANE * len(tree.branches) + 10, "left": LEFT, "top": TOP}
    return fill(
        "tree.html",
        **frame,
        tree=tree,
        x=lambda step: round(LEFT + step / max(1, tree.steps) * (WIDTH - LEFT - RIGHT_MARGIN), 1),
        y=lanes.__getitem__,
        grid=range(0, tree.steps + 1, every),
        forks=[(branch, *_origin(tree, branch)) for branch in tree.branches if branch.row["parent"] >= 0],
        colour=colour,
        short=_short,
    )


def tree_html(home: Path, wanted: str = "auto", policy: str | None = None, budget: str | None = None) -> Path:
    """Write `<home>/tree-<policy>.html` and return its path."""
    target = home / f"tree-{_policy_of(Layout(home.parent, home.name), policy)}.html"
    write_text(target, page(load_tree(home, wanted, policy, budget)))
    return target


# --- terminal ---------------------------------------------------------------------------------------------------------

COLUMNS = 64


def one_line(text: str) -> str:
    """Text that cannot steer a terminal, on one line."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)


def _short(text: str, most: int) -> str:
    line = one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"


def _characters(tree: Tree, branch: Branch) -> str:
    """One lane of characters: tenths of the expected score while it ran, dots while it was paused."""
    scale = min(1.0, COLUMNS / max(1, tree.steps))
    lane = [" "] * (round(tree.steps * scale) + 1)
    fork = _origin(tree, branch)[1] if branch.row["parent"] >= 0 else None
    away = [("-", fork, branch.begun)] if fork is not None else []
    for mark, start, stop in [*away, *((".", *gap) for gap in branch.gaps)]:
        lane[int(start * scale) : int(stop * scale)] = mark * (int(stop * scale) - int(start * scale))
    for piece in branch.pieces:
        a, b = int(piece.start * scale), max(int(piece.stop * scale), int(piece.start * scale) + 1)
        lane[a:b] = ("=" if piece.value is None else str(min(int(piece.value * 10), 9))) * (b - a)
    if fork is not None:
        lane[min(int(fork * scale), len(lane) - 1)] = "\\"
    return "".join(lane).rstrip() + ("*" if branch.row["status"] == "finished" else "x")


def tree_text(home: Path, wanted: str = "auto", policy: str | None = None, budget: str | None = None) -> str:
    """The tree in plain characters."""
    tree = load_tree(home, wanted, policy, budget)
    known = f"[{tree.prompt['difficulty']}; the answer is {tree.prompt['answer'] or 'not known'}]"
    run = f"{tree.chosen.row['policy']}, budget {tree.chosen.row['budget']}: {tree.verdict}"
    lines = [one_line(f"{tree.question}   {known}"), one_line(run), ""]
    for branch in tree.branches:
        row, lane = branch.row, _characters(tree, branch)
        said = "" if row["answer"] is None else f"{_short(row['answer'], 20)}, "
        value = "" if row["expected_reward"] is None else f", expected {row['expected_reward']:.2f}"
        origin = f" from #{row['parent'] + 1} at {row['fork']}" if row["parent"] >= 0 else ""
        chosen = f"  <- chosen, P {tree.probability:.2f}" if row["selected"] else ""
        name = f"#{row['branch_id'] + 1}"
        lines.append(f"{name:>4} {lane:<{COLUMNS + 3}} {said}{branch.verdict}{value}{origin}{chosen}")
    legend = "digits: tenths of the expected score; . paused; \\- branched from another; * finished; x abandoned"
    lines += ["", f"     0 to {tree.steps} decoding steps; {legend}", ""]
    lines += [f"  step {m['step']:>4}, {m['tokens_spent']:>4} tokens: {m['words']}" for m in tree.moments]
    return "\n".join(lines)

"""One prompt's tree of branches as it was sampled live: a page with a drawing, or characters for a terminal.

Everything comes from `samples/<policy>.parquet`: what a branch was at every decision. The x axis counts serial decoding
steps, so what is drawn above each other ran at the same time. A branch grows from the decision that started it; a piece of
it between two decisions has the colour of what was expected of it at the second. Question and answers are data: they reach
the page escaped and the terminal without control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.errors import UserError, nearest
from ziprc.pages.html import fill
from ziprc.store.files import write_text
from ziprc.store.layout import Layout
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.samples import SAMPLES

Row = Mapping[str, Any]
AUTO = "auto"
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
    """One branch, from the step in which it began to its last token."""

    number: int
    parent: int  # negative: the prompt
    fork: int  # tokens taken over from the parent
    begun: int
    pieces: tuple[Piece, ...]
    finished: bool
    length: int
    value: float | None  # at the end
    answer: str | None
    score: float | None
    selected: bool

    @property
    def end(self) -> int:
        return self.pieces[-1].stop if self.pieces else self.begun

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """When it was paused and resumed."""
        return [(a.stop, b.start) for a, b in zip(self.pieces, self.pieces[1:], strict=False) if b.start > a.stop]

    @property
    def verdict(self) -> str:
        if not self.finished:
            return "abandoned"
        if self.answer is None:
            return "cut off"
        if self.score is None:
            return "not graded"
        return "right" if self.score >= RIGHT else "wrong"

    def at_token(self, token: int) -> int:
        """The step in which it had that many tokens; the nearest that it generated itself."""
        count = self.fork
        for piece in self.pieces:
            grown = piece.stop - piece.start
            if count + grown >= token:
                return piece.start + max(0, token - count)
            count += grown
        return self.end


@dataclass(frozen=True)
class Moment:
    """One decision in words."""

    step: int
    tokens: int
    words: str
    utility: float | None


@dataclass(frozen=True)
class Tree:
    """The tree of one prompt under one policy and budget."""

    prompt_id: str
    policy: str
    budget: str
    question: str
    difficulty: str
    truth: str | None
    branches: tuple[Branch, ...]
    moments: tuple[Moment, ...]
    probability: float
    prefill: int

    @property
    def steps(self) -> int:
        return self.moments[-1].step

    @property
    def chosen(self) -> Branch:
        return next(b for b in self.branches if b.selected)

    @property
    def verdict(self) -> str:
        chosen = self.chosen
        tokens = self.moments[-1].tokens
        costs = f"{tokens} tokens in {len(self.branches)} branches, {self.steps} steps, {self.prefill} prompt tokens computed"
        if chosen.answer is None:
            return f"no answer; {costs}"
        return f"answer {_short(chosen.answer, 60)}, {chosen.verdict}, P(right) {self.probability:.2f}; {costs}"


def _branch(rows: Sequence[Row], steps: Sequence[int]) -> Branch:
    """One branch from its rows, by decision; `steps` are those of all decisions of the prompt."""
    first, last = rows[0], rows[-1]
    begun = steps[first["decision"] - 1] if first["decision"] else 0
    pieces, length = [], first["fork"]
    for row in rows:
        grown = row["length"] - length
        if grown:
            start = steps[row["decision"] - 1] if row["decision"] else 0
            pieces.append(Piece(start, start + grown, row["expected_reward"], row["expected_remaining"]))
        length = row["length"]
    kept = {key: last[key] for key in ("parent", "fork", "length", "answer", "score", "selected")}
    finished, value = last["status"] == "finished", last["expected_reward"]
    return Branch(number=last["branch_id"], begun=begun, pieces=tuple(pieces), finished=finished, value=value, **kept)


def _changes(now: Mapping[int, Row], then: Mapping[int, Row]) -> Iterable[str]:
    """What a decision changed, seen in what the branches were before it and before the next."""
    for number, row in then.items():
        grown = row["length"] - now[number]["length"] if number in now else 0
        before = now[number]["status"] if number in now else None
        if before is None:
            origin = "start" if row["parent"] < 0 else f"branch #{row['parent'] + 1} after {row['fork']} tokens as"
            yield f"{origin} #{number + 1}"
        elif before == "paused" and (grown or row["status"] == "running"):
            yield f"resume #{number + 1}"
        elif before == "running" and not grown and row["status"] == "paused":
            yield f"pause #{number + 1}"
        elif before == "running":
            yield f"continue #{number + 1}"


def _moments(decisions: Sequence[Mapping[int, Row]]) -> Iterable[Moment]:
    for now, then in zip(decisions, [*decisions[1:], None], strict=True):
        row = next(iter(now.values()))
        words = "stop" if then is None else ", ".join(_changes(now, then))
        yield Moment(row["step"], row["tokens_spent"], words, row["utility"])


def tree_of(rows: Sequence[Row], prompt: Row) -> Tree:
    """The tree that all rows of one prompt and budget describe; UserError when sampling it failed."""
    if not any(row["selected"] for row in rows):
        raise UserError(f"Sampling of the prompt {rows[0]['prompt_id']} failed, so it has no tree. Name another one.")
    ordered = sorted(rows, key=lambda r: (r["decision"], r["branch_id"]))
    decisions = [
        {row["branch_id"]: row for row in part} for _, part in groupby(ordered, key=lambda row: row["decision"])
    ]
    steps = [next(iter(each.values()))["step"] for each in decisions]
    numbers = sorted(decisions[-1])
    by_branch = [[each[n] for each in decisions if n in each] for n in numbers]
    chosen = next(row for row in decisions[-1].values() if row["selected"])
    return Tree(
        **{key: chosen[key] for key in ("prompt_id", "policy", "budget")},
        question="\n".join(map(one_line, prompt["messages"][-1]["content"].splitlines())),
        difficulty=prompt["difficulty"],
        truth=prompt["answer"],
        branches=tuple(_branch(own, steps) for own in by_branch),
        moments=tuple(_moments(decisions)),
        probability=chosen["probability"] or 0.0,
        prefill=chosen["prefill"] or 0,
    )


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


def most_interesting(samples: pa.Table) -> tuple[str, str]:
    """Prompt and budget of the tree that shows most; the first of equals."""
    wanted = ["prompt_id", "budget", "action", "answer", "score", "selected"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in samples.select(wanted).to_pylist():
        groups.setdefault((row["prompt_id"], row["budget"]), []).append(row)
    return max(sorted(groups), key=lambda key: interest(groups[key]))


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


def load_tree(home: Path, wanted: str = AUTO, policy: str | None = None, budget: str | None = None) -> Tree:
    """The tree of a prompt, by its id or `auto`; of its largest budget unless one is named."""
    layout = Layout(home.parent, home.name)
    policy = _policy_of(layout, policy)
    samples = SAMPLES.read(layout.table("samples", policy))
    samples = _only(samples, "budget", budget) if budget else samples
    if wanted == AUTO:
        wanted, budget = most_interesting(samples)
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
RAMP = ((239, 122, 92), (246, 224, 150), (118, 184, 232))  # as in `ziprc inspect`
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def colour(value: float | None) -> str:
    """From low to high expected score; grey where nothing is known."""
    if value is None:
        return "rgb(160,160,160)"
    place = min(max(value, 0.0), 1.0) * 2
    low = min(int(place), 1)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def _origin(tree: Tree, branch: Branch) -> tuple[Branch, int]:
    """The ancestor that generated the token after which `branch` forked, and the step in which it did."""
    by_number = {b.number: b for b in tree.branches}
    parent = by_number[branch.parent]
    while branch.fork <= parent.fork and parent.parent in by_number:
        parent = by_number[parent.parent]
    return parent, parent.at_token(branch.fork)


def page(tree: Tree) -> str:
    """A page that needs nothing else; the drawing is laid out in `templates/tree.svg`."""
    lanes = {branch.number: TOP + LANE * (i + 0.5) for i, branch in enumerate(tree.branches)}
    every = next((t for t in TICKS if tree.steps / t <= 12), TICKS[-1])
    return fill(
        "tree.html",
        tree=tree,
        width=WIDTH,
        height=TOP + LANE * len(tree.branches) + 10,
        left=LEFT,
        top=TOP,
        x=lambda step: round(LEFT + step / max(1, tree.steps) * (WIDTH - LEFT - RIGHT_MARGIN), 1),
        y=lanes.__getitem__,
        grid=range(0, tree.steps + 1, every),
        forks=[(branch, *_origin(tree, branch)) for branch in tree.branches if branch.parent >= 0],
        colour=colour,
        short=_short,
    )


def tree_html(home: Path, wanted: str = AUTO, policy: str | None = None, budget: str | None = None) -> Path:
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
    forked = branch.parent >= 0
    away = [("-", _origin(tree, branch)[1], branch.begun)] if forked else []
    for mark, a, b in [*away, *((".", *gap) for gap in branch.gaps)]:
        lane[int(a * scale) : int(b * scale)] = mark * (int(b * scale) - int(a * scale))
    for piece in branch.pieces:
        a, b = int(piece.start * scale), max(int(piece.stop * scale), int(piece.start * scale) + 1)
        lane[a:b] = ("=" if piece.value is None else str(min(int(piece.value * 10), 9))) * (b - a)
    if forked:
        lane[min(int(_origin(tree, branch)[1] * scale), len(lane) - 1)] = "\\"
    return "".join(lane).rstrip() + ("*" if branch.finished else "x")


def tree_text(home: Path, wanted: str = AUTO, policy: str | None = None, budget: str | None = None) -> str:
    """The tree in plain characters."""
    tree = load_tree(home, wanted, policy, budget)
    lines = [
        one_line(f"{tree.question}   [{tree.difficulty}; the answer is {tree.truth or 'not known'}]"),
        one_line(f"{tree.policy}, budget {tree.budget}: {tree.verdict}"),
        "",
    ]
    for branch in tree.branches:
        said = "" if branch.answer is None else f"{_short(branch.answer, 20)}, "
        value = "" if branch.value is None else f", expected {branch.value:.2f}"
        chosen = f"  <- chosen, P {tree.probability:.2f}" if branch.selected else ""
        origin = f" from #{branch.parent + 1} at {branch.fork}" if branch.parent >= 0 else ""
        lane = _characters(tree, branch)
        lines.append(
            f"{f'#{branch.number + 1}':>4} {lane:<{COLUMNS + 3}} {said}{branch.verdict}{value}{origin}{chosen}"
        )
    legend = "digits: tenths of the expected score; . paused; \\- branched from another; * finished; x abandoned"
    lines += ["", f"     0 to {tree.steps} decoding steps; {legend}", ""]
    lines += [f"  step {m.step:>4}, {m.tokens:>4} tokens: {m.words}" for m in tree.moments]
    return "\n".join(lines)

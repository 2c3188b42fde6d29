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
from ziprc.pages.html import esc, table
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
        return "right" if (self.score or 0) >= RIGHT else "wrong"

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
    return Branch(
        number=last["branch_id"],
        parent=last["parent"],
        fork=last["fork"],
        begun=begun,
        pieces=tuple(pieces),
        finished=last["status"] == "finished",
        length=last["length"],
        value=last["expected_reward"],
        answer=last["answer"],
        score=last["score"],
        selected=last["selected"],
    )


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
    """The tree that all rows of one prompt and budget describe."""
    ordered = sorted(rows, key=lambda r: (r["decision"], r["branch_id"]))
    decisions = [
        {row["branch_id"]: row for row in part} for _, part in groupby(ordered, key=lambda row: row["decision"])
    ]
    steps = [next(iter(each.values()))["step"] for each in decisions]
    numbers = sorted(decisions[-1])
    by_branch = [[each[n] for each in decisions if n in each] for n in numbers]
    chosen = next(row for row in decisions[-1].values() if row["selected"])
    return Tree(
        prompt_id=chosen["prompt_id"],
        policy=chosen["policy"],
        budget=chosen["budget"],
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
    """How much the tree of one prompt shows: a right choice, among several answers, by many kinds of action."""
    final = [row for row in rows if row["action"] == "stop"]
    answers = {row["answer"] for row in final} - {None}
    right = any(row["selected"] and (row["score"] or 0) >= RIGHT for row in final)
    kinds = {row["action"] for row in rows} & {"start", "branch", "pause", "resume"}
    return (right and len(final) <= READABLE, right, len(answers) > 1, len(kinds), len(answers), len(rows))


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
    share = place - low
    mixed = (round(a + (b - a) * share) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


@dataclass(frozen=True)
class _Canvas:
    """Where steps and branches are on the page."""

    tree: Tree

    def x(self, step: float) -> float:
        return round(LEFT + step / max(1, self.tree.steps) * (WIDTH - LEFT - RIGHT_MARGIN), 1)

    def y(self, number: int) -> float:
        order = {b.number: i for i, b in enumerate(self.tree.branches)}
        return TOP + LANE * (order[number] + 0.5)

    @property
    def height(self) -> float:
        return TOP + LANE * len(self.tree.branches) + 10


def _origin(tree: Tree, branch: Branch) -> tuple[Branch, int]:
    """The ancestor that generated the token after which `branch` forked, and the step in which it did."""
    by_number = {b.number: b for b in tree.branches}
    parent = by_number[branch.parent]
    while branch.fork <= parent.fork and parent.parent in by_number:
        parent = by_number[parent.parent]
    return parent, parent.at_token(branch.fork)


def _axis(canvas: _Canvas) -> list[str]:
    """Grid lines for steps, and a tick for every decision."""
    steps, bottom = canvas.tree.steps, canvas.height - 10
    every = next((t for t in TICKS if steps / t <= 12), TICKS[-1])
    out = [f'<text class="soft" x="{LEFT}" y="12">serial decoding steps; ticks are decisions</text>']
    for step in range(0, steps + 1, every):
        x = canvas.x(step)
        out.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP - 4}" y2="{bottom}"/>')
        out.append(f'<text class="soft mid" x="{x}" y="{TOP - 8}">{step}</text>')
    for moment in canvas.tree.moments:
        x = canvas.x(moment.step)
        title = f"<title>step {moment.step}: {esc(moment.words)}</title>"
        out.append(f'<line class="decision" x1="{x}" x2="{x}" y1="{TOP - 4}" y2="{TOP + 3}">{title}</line>')
    return out


def _fork(canvas: _Canvas, branch: Branch) -> list[str]:
    """From the parent's last shared token to the child's beginning."""
    if branch.parent < 0:
        return []
    parent, step = _origin(canvas.tree, branch)
    x, y, x2, y2 = canvas.x(step), canvas.y(parent.number), canvas.x(branch.begun), canvas.y(branch.number)
    title = f"<title>#{branch.number + 1} takes over {branch.fork} tokens of #{branch.parent + 1}</title>"
    path = f'<path class="fork" d="M{x} {y}C{x} {y2} {x} {y2} {x2} {y2}">{title}</path>'
    return [path, f'<circle class="fork" cx="{x}" cy="{y}" r="3.5"/>']


def _lane(canvas: _Canvas, branch: Branch) -> list[str]:
    """Pieces, pauses and marks of one branch."""
    y = canvas.y(branch.number)
    out = [f'<text class="name" x="6" y="{y + 4}">#{branch.number + 1}</text>']
    for a, b in branch.gaps:
        out.append(f'<line class="pause" x1="{canvas.x(a)}" x2="{canvas.x(b)}" y1="{y}" y2="{y}"/>')
        out += [_pause(canvas.x(a), y), _resume(canvas.x(b), y)]
    for piece in branch.pieces:
        x, width = canvas.x(piece.start), round(canvas.x(piece.stop) - canvas.x(piece.start), 1)
        out.append(
            f'<rect x="{x}" y="{y - 6}" width="{width}" height="12" fill="{colour(piece.value)}">'
            f"<title>{esc(_piece(branch, piece))}</title></rect>"
        )
    x = canvas.x(branch.begun)
    out.append(f'<line class="begin" x1="{x}" x2="{x}" y1="{y - 9}" y2="{y + 9}"/>')
    return out + _ending(canvas, branch, canvas.x(branch.end), y)


def _piece(branch: Branch, piece: Piece) -> str:
    value = "" if piece.value is None else f"; expected score {piece.value:.2f}"
    left = "" if not piece.remaining else f", about {piece.remaining:.0f} tokens to come"
    return f"#{branch.number + 1}, steps {piece.start} to {piece.stop}{value}{left}"


def _pause(x: float, y: float) -> str:
    return f'<path class="mark" d="M{x + 2} {y - 4}v8M{x + 5} {y - 4}v8"/>'


def _resume(x: float, y: float) -> str:
    return f'<path class="solid" d="M{x - 7} {y - 4}l5 4l-5 4z"/>'


def _ending(canvas: _Canvas, branch: Branch, x: float, y: float) -> list[str]:
    """How a branch ended and what it says; the chosen one is framed."""
    kind = branch.verdict.replace(" ", "-")
    if branch.finished:
        mark = f'<circle class="{kind}" cx="{x}" cy="{y}" r="6"/>'
    else:
        mark = f'<path class="mark" d="M{x + 3} {y - 4}l8 8m0 -8l-8 8"/>'
    answer = "" if branch.answer is None else f"{_short(branch.answer, 14)} "
    value = "" if branch.value is None else f"  {branch.value:.2f}"
    text = f'<text class="{kind}" x="{x + 16}" y="{y + 4}">{esc(answer + branch.verdict)}<tspan class="soft">{value}</tspan>'
    out = [mark]
    if branch.selected:
        text += f"<tspan> ← chosen, P {canvas.tree.probability:.2f}</tspan>"
        out.insert(0, f'<circle class="chosen" cx="{x}" cy="{y}" r="10"/>')
    return [*out, text + "</text>"]


def _short(text: str, most: int) -> str:
    line = one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"


def drawing(tree: Tree) -> str:
    """The tree as an inline SVG."""
    canvas = _Canvas(tree)
    parts = _axis(canvas)
    for draw in (_lane, _fork):
        parts += [shape for branch in tree.branches for shape in draw(canvas, branch)]
    label = f"Branches over {tree.steps} decoding steps; {tree.verdict}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {canvas.height}" role="img" aria-label="{esc(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--soft:#667;--line:#d8dce2;--page:#fff;--card:#f6f7f9;--good:#2b8a57;--bad:#c94a3b}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#99a;--line:#363b43;--page:#15181c;--card:#1d2126;--good:#5cc48d;--bad:#ee8272}}
*{box-sizing:border-box}body{margin:0 auto;max-width:72rem;padding:1.2rem 1rem 3rem;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.35rem;margin:.2rem 0;white-space:pre-wrap;overflow-wrap:anywhere}.soft,caption{color:var(--soft)}p{margin:.3rem 0 .9rem;overflow-wrap:anywhere}
.right{color:var(--good)}.wrong,.cut-off{color:var(--bad)}.scroll{overflow-x:auto}svg{width:100%;min-width:44rem;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:var(--ink);font-variant-numeric:tabular-nums}svg text.name{font-weight:600}svg .soft{fill:var(--soft)}svg .mid{text-anchor:middle}
svg .grid{stroke:var(--line)}svg .decision{stroke:var(--soft);stroke-width:1.5}svg .pause{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:2 3}
svg .begin,svg .mark{stroke:var(--ink);stroke-width:1.6;fill:none}svg .solid{fill:var(--ink)}svg path.fork{fill:none;stroke:var(--ink);stroke-width:1.2;stroke-dasharray:4 2}
svg circle.fork{fill:var(--ink)}svg circle.right{fill:var(--good)}svg circle.wrong,svg circle.cut-off{fill:var(--bad)}svg text.right{fill:var(--good)}svg text.wrong,svg text.cut-off{fill:var(--bad)}
svg text.abandoned{fill:var(--soft)}svg circle.chosen{fill:none;stroke:var(--good);stroke-width:2}
.scale{display:inline-block;width:9rem;height:.7rem;border-radius:4px;vertical-align:middle;margin:0 .4rem;background:linear-gradient(90deg,rgb(239,122,92),rgb(246,224,150),rgb(118,184,232))}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;margin-top:1rem}th{text-align:left;color:var(--soft);border-bottom:1px solid var(--line);padding:.3rem .9rem .3rem 0;white-space:nowrap}
td{border-bottom:1px solid var(--line);padding:.3rem .9rem .3rem 0}
"""  # noqa: E501


def page(tree: Tree) -> str:
    """A page that needs nothing else."""
    rows = [
        [str(m.step), str(m.tokens), esc(m.words), "" if m.utility is None else f"{m.utility:.2g}"]
        for m in tree.moments
    ]
    facts = f"{tree.policy}, budget {tree.budget} · {tree.difficulty} · the answer is {tree.truth or 'not known'}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{esc(tree.policy)} · {esc(tree.prompt_id)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{esc(tree.question)}</h1><p class="soft">{esc(facts)} · {esc(tree.prompt_id)}</p>'
        f'<p><b class="{tree.chosen.verdict.replace(" ", "-")}">{esc(tree.verdict)}</b></p>'
        f'<div class="scroll">{drawing(tree)}</div>'
        '<p class="soft">Expected score 0<span class="scale"></span>1 · ❙ begins · dashed: branched from the dot, or paused '
        "(❙❙) and resumed (▶) · ● finished · ✕ abandoned. Point at a piece to read what was expected.</p>"
        f"{table(('step', 'tokens so far', 'decided', 'utility'), rows)}</body></html>\n"
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


def _digit(value: float | None) -> str:
    return "=" if value is None else str(min(int(value * 10), 9))


def _characters(tree: Tree, branch: Branch) -> str:
    """One lane of characters: tenths of the expected score while it ran, dots while it was paused."""
    scale = min(1.0, COLUMNS / max(1, tree.steps))
    lane = [" "] * (round(tree.steps * scale) + 1)
    forked = branch.parent >= 0
    for a, b in [(_origin(tree, branch)[1], branch.begun)] if forked else []:
        lane[int(a * scale) : int(b * scale)] = "-" * (int(b * scale) - int(a * scale))
    for a, b in branch.gaps:
        lane[int(a * scale) : int(b * scale)] = "." * (int(b * scale) - int(a * scale))
    for piece in branch.pieces:
        a, b = int(piece.start * scale), max(int(piece.stop * scale), int(piece.start * scale) + 1)
        lane[a:b] = _digit(piece.value) * (b - a)
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

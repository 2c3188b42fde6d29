"""`ziprc sample`: watch adaptive sampling answer one question in a terminal.

In a terminal the branches are redrawn in place at every decision: status, P(right), expected remaining tokens and the tail
of the text of each, and one line that says what was decided and why. Elsewhere every change is a plain line, and with
`--json` there is one JSON object at the end and nothing else. Model text is data: no control character of it is printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO
from unicodedata import combining, east_asian_width

import numpy as np

from ziprc.chat import visible_answer
from ziprc.engines.base import stop_token_ids
from ziprc.pages.tree import one_line
from ziprc.sampling.controller import NONE, Policy
from ziprc.sampling.live.asking import Ready, Wishes, answer, prepare
from ziprc.sampling.live.records import Answered, Event
from ziprc.sampling.policies.zip_rc import ZipRC
from ziprc.sampling.policies.zip_rc_plus import REMAINING, ZipRCPlus
from ziprc.sampling.tree import Trees

TAIL_TOKENS = 60  # decoded for the tail of a text
INTERRUPTED = 130  # exit code, as shells have it
OTHER_LINES = 7  # of the screen, besides those of the branches
STYLES = {"running": "1", "paused": "2", "chosen": "32"}  # bold, dim, green


# --- what was decided, in words ---------------------------------------------------------------------------------------


def moves(event: Event) -> str:
    """What a decision does: `continue #1; pause #2; start #3`."""
    trees, decision, applied = event.decided.trees, event.decided.decision, event.applied
    kept = decision.run[0] & trees.running[0]
    groups = {"continue": kept, "resume": applied.resumed[0], "pause": applied.paused[0], "start": applied.started[0]}
    words = [
        f"{verb} {', '.join(f'#{slot + 1}' for slot in np.flatnonzero(mask).tolist())}"
        for verb, mask in groups.items()
        if mask.any()
    ]
    for slot in np.flatnonzero(applied.branched[0]).tolist():
        words.append(f"branch #{slot + 1} off #{decision.branch[0] + 1} after {decision.branch_at[0]} tokens")
    return "; ".join(words) if decision.going[0] else "stop"


def reason(policy: Policy, event: Event, tokens_left: bool = True) -> str:
    """Why, in the terms of the policy."""
    decision, trees = event.decided.decision, event.decided.trees
    if isinstance(policy, ZipRCPlus):
        return _gain(policy, event, tokens_left)
    if isinstance(policy, ZipRC):
        if decision.going[0]:
            return f"the set of highest utility, {decision.utility[0]:.3f} (α {policy.alpha:g}, β {policy.beta:g})"
        return "no more samples are worth their price" if tokens_left else "the budget is spent"
    return f"{int(trees.finished.sum())} of {int(trees.used.sum())} samples are finished"


def _gain(policy: ZipRCPlus, event: Event, tokens_left: bool) -> str:
    """Gain of the best move, for how many tokens, against the price of a token."""
    decision, trees = event.decided.decision, event.decided.trees
    worth = float(decision.utility[0])
    if not decision.going[0]:
        if worth >= policy.price:
            return "the budget is spent" if not tokens_left or trees.used.all() else "nothing more fits into the budget"
        if not np.isfinite(worth):
            return "every branch is finished, and there is no room for another"
        return f"nothing gains {policy.price:.2g} a token any more, the most is {worth:.2g}"
    if worth < policy.price:
        return "no answer yet, so one branch must go on"
    cost = _cost(trees, event)
    if cost is None:
        return f"gains up to {worth:.2g} a token ≥ price {policy.price:.2g}"
    return f"gain {worth * cost:.3f} for {cost:.0f} tokens, {worth:.2g} a token ≥ price {policy.price:.2g}"


def _cost(trees: Trees, event: Event) -> float | None:
    """Expected tokens of what was decided; None when it is more than one thing."""
    decision = event.decided.decision
    branch = int(decision.branch[0])
    costs = trees.signals[0, decision.run[0], REMAINING].tolist()
    costs += [float(trees.root[0, REMAINING])] * int(decision.start[0])
    costs += [] if branch == NONE else [float(trees.spot_signals[0, branch, REMAINING])]
    return max(costs[0], 1.0) if len(costs) == 1 else None


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """What is shown of one branch."""

    slot: int
    status: str
    value: float | None
    remaining: float | None
    tokens: int
    text: str
    answer: str | None = None
    origin: str = ""


@dataclass
class View:
    """What is known of a question that is being answered; `lines` are its branches after the newest decision."""

    ready: Ready
    book: Any
    lines: list[Line] = field(default_factory=list)
    said: str = ""

    def hear(self, event: Event) -> None:
        """Take in what an event says."""
        expected, remaining = (x[0] for x in self.ready.setting.policy.expectations(event.decided.trees))
        self.lines = [
            self._line(event, slot, ids, float(expected[slot]), float(remaining[slot]))
            for slot, ids in enumerate(event.token_ids)
        ]
        decided = event.decided
        budget = self.ready.controller.budget
        every = self.ready.setting.interval
        left = decided.tokens + every <= budget.tokens and decided.step + every <= budget.latency
        self.said = f"{moves(event)}: {reason(self.ready.setting.policy, event, left)}"

    def _line(self, event: Event, slot: int, ids: Sequence[int], expected: float, remaining: float) -> Line:
        trees, applied = event.decided.trees, event.applied
        fresh = bool(applied.started[0, slot] or applied.branched[0, slot])
        finished = bool(trees.finished[0, slot])
        running = fresh or bool(event.decided.decision.run[0, slot])
        parent = int(event.decided.decision.branch[0]) if applied.branched[0, slot] else int(trees.parent[0, slot])
        fork = int(event.decided.decision.branch_at[0]) if applied.branched[0, slot] else int(trees.fork[0, slot])
        return Line(
            slot=slot,
            status="finished" if finished else "running" if running else "paused",
            value=None if fresh or not np.isfinite(expected) else expected,
            remaining=None if fresh or finished or not np.isfinite(remaining) else remaining,
            tokens=len(ids),
            text=one_line(self.book.text(ids[-TAIL_TOKENS:])),
            answer=answer_text(self.ready, self.book, ids) if finished else None,
            origin=f"#{parent + 1} at {fork}" if parent >= 0 else "",
        )


def answer_text(ready: Ready, book: Any, ids: Sequence[int]) -> str | None:
    """The canonical answer of a response, else what is visible of it; None when no stop token ends it."""
    if not len(ids) or ids[-1] not in book.stops:
        return None
    text = book.text(ids)
    return ready.task.canonical_answer(text) or visible_answer(text) or None


def header(ready: Ready) -> list[str]:
    """The question and how it is answered."""
    budget, own = ready.controller.budget, ready.config.rollouts
    limits = [f"{budget.branches} branches"]
    limits += [f"{budget.tokens} tokens"] if budget.tokens < 1 << 30 else []
    limits += [f"{budget.latency} steps"] if budget.latency < 1 << 30 else []
    how = f"at most {', '.join(limits)}; temperature {own.sampling.temperature:g}, min-p {own.sampling.min_p:g}"
    return [one_line(ready.wishes.prompt), f"{ready.setting.name} on {own.engine}, {how}; answers of {ready.task.name}"]


def closing(ready: Ready, answered: Answered, book: Any) -> list[str]:
    """The answer, and what it cost."""
    found = answer_text(ready, book, answered.branches[answered.slot].token_ids)
    count = len(answered.branches)
    ended = sum(branch.finish_reason is not None for branch in answered.branches)
    said = "no answer: no branch ended with one"
    if found is not None:
        said = f"answer: {one_line(found)}   P(right) {answered.probability:.2f}, from #{answered.slot + 1}"
    return [
        said,
        f"{answered.tokens} tokens in {count} branch{'es' if count != 1 else ''} ({ended} finished), {answered.latency} steps, "
        f"{answered.prefill} prompt tokens computed, {answered.seconds:.2f} s",
    ]


# --- ways to show it --------------------------------------------------------------------------------------------------


def cells(text: str) -> int:
    """How many columns of a terminal a printable text takes."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def head(text: str, width: int) -> str:
    """The beginning of a text, in at most `width` columns."""
    while cells(text) > width:
        text = text[:-1]
    return text


def tail(text: str, width: int) -> str:
    """The end of a text, in at most `width` columns."""
    while cells(text) > width:
        text = text[1:]
    return text


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def branch_line(line: Line, width: int, chosen: bool = False) -> str:
    """One branch on one line."""
    mark = f"{'→' if chosen else ''}#{line.slot + 1}"
    facts = f"{mark:>4} {line.status:<8} {_number(line.value, 2):>4} {_number(line.remaining, 0):>6} {line.tokens:>6}  "
    said = f"[{one_line(line.answer)}] " if line.answer is not None else ""
    origin = f"(off {line.origin}) " if line.origin else ""
    facts = head(facts + origin + said, width)
    return facts + tail(line.text, max(0, width - cells(facts)))


COLUMNS = f"{'':>4} {'status':<8} {'P':>4} {'left':>6} {'tokens':>6}  text so far"


def frame(lines: Sequence[Line], width: int, rows: int, chosen: int | None = None, colours: bool = False) -> list[str]:
    """The branches that fit into `rows`: the chosen one, running ones, then the likeliest; in their order."""
    ranked = sorted(lines, key=lambda li: (li.slot != chosen, li.status != "running", -(li.value or 0), li.slot))
    shown = sorted(ranked[: max(1, rows)], key=lambda line: line.slot)
    out = [head(COLUMNS, width)]
    for line in shown:
        text = branch_line(line, width, line.slot == chosen)
        style = STYLES.get("chosen" if line.slot == chosen else line.status) if colours else None
        out.append(f"\x1b[{style}m{text}\x1b[0m" if style else text)
    hidden = len(lines) - len(shown)
    return out + ([head(f"     and {hidden} other branches", width)] if hidden else [])


class Screen:
    """Redraws the branches in place."""

    def __init__(self, view: View, out: TextIO) -> None:
        self.view, self.out, self.drawn = view, out, 0
        self.colours = "NO_COLOR" not in os.environ
        for line in header(view.ready):
            print(head(line, self.size()[0]), file=out, flush=True)

    @staticmethod
    def size() -> tuple[int, int]:
        """Columns and rows; one column stays free, since some terminals wrap a full line."""
        found = shutil.get_terminal_size()
        return found.columns - 1, found.lines

    def hear(self, event: Event) -> None:
        self.view.hear(event)
        self.draw([f"step {event.decided.step}, {event.decided.tokens} tokens · {self.view.said}"])

    def draw(self, below: Sequence[str], chosen: int | None = None) -> None:
        width, rows = self.size()
        lines = frame(self.view.lines, width, rows - OTHER_LINES, chosen, self.colours)
        lines += [head(line, width) for line in below]
        up = f"\x1b[{self.drawn}A\r\x1b[J" if self.drawn else ""
        self.out.write(up + "\n".join(lines) + "\n")
        self.out.flush()
        self.drawn = len(lines)

    def end(self, answered: Answered) -> None:
        last = f"step {answered.latency}, {answered.tokens} tokens · {self.view.said}"
        self.draw([last, *closing(self.view.ready, answered, self.view.book)], answered.slot)


class Lines:
    """A line for every decision that changes something, and for every branch that has finished."""

    def __init__(self, view: View, out: TextIO) -> None:
        self.view, self.out = view, out
        self.moves, self.finished = "", set[int]()
        self.say(*header(view.ready))

    def say(self, *lines: str) -> None:
        print(*lines, sep="\n", file=self.out, flush=True)

    def hear(self, event: Event) -> None:
        """Print what one decision changed, finished branches first."""
        self.view.hear(event)
        for line in self.view.lines:
            if line.status == "finished" and line.slot not in self.finished:
                self.finished.add(line.slot)
                said = f"says {one_line(line.answer)}" if line.answer is not None else "has no answer"
                value = "" if line.value is None else f", P(right) {line.value:.2f}"
                self.say(
                    f"    #{line.slot + 1} finished after {line.tokens} tokens, {said}{value}: …{tail(line.text, 60)}"
                )
        if moves(event) != self.moves:
            self.moves = moves(event)
            self.say(f"step {event.decided.step:>5}  {self.view.said}{self._running()}")

    def _running(self) -> str:
        """What is expected of the branches that go on."""
        known = [li for li in self.view.lines if li.status == "running" and li.value is not None]
        said = [f"#{li.slot + 1} P {li.value:.2f}, ~{li.remaining or 0:.0f} left" for li in known]
        return f"  [{'; '.join(said)}]" if said else ""

    def end(self, answered: Answered) -> None:
        self.say(*closing(self.view.ready, answered, self.view.book))


class Record:
    """One JSON object at the end."""

    def __init__(self, view: View, out: TextIO) -> None:
        self.view, self.out = view, out

    def hear(self, event: Event) -> None:
        self.view.hear(event)

    def end(self, answered: Answered) -> None:
        print(json.dumps(record(self.view, answered), indent=1), file=self.out, flush=True)


def record(view: View, answered: Answered) -> dict[str, Any]:
    """Answer, probability, costs and branches."""
    expected = [line.value for line in view.lines]
    branches = [
        {
            "branch": slot + 1,
            "parent": branch.parent + 1 or None,
            "fork": branch.fork,
            "tokens": branch.generated,
            "end": branch.finish_reason.value if branch.finish_reason is not None else None,
            "value": expected[slot],
            "text": view.book.text(branch.token_ids),
            "answer": answer_text(view.ready, view.book, branch.token_ids),
            "chosen": slot == answered.slot,
        }
        for slot, branch in enumerate(answered.branches)
    ]
    return {
        "prompt": view.ready.wishes.prompt,
        "policy": view.ready.setting.name,
        "answer": branches[answered.slot]["answer"],
        "probability": answered.probability,
        "tokens": answered.tokens,
        "prefill": answered.prefill,
        "steps": answered.latency,
        "seconds": answered.seconds,
        "decisions": len(answered.decisions),
        "branches": branches,
    }


@contextlib.contextmanager
def own_output() -> Iterator[TextIO]:
    """Standard output, for us alone: what engines and their libraries print meanwhile, in C++ too, goes to stderr."""
    sys.stdout.flush()
    try:
        ours = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", errors="replace")
    except (OSError, io.UnsupportedOperation):  # somebody has put another stream in its place
        yield sys.stdout
        return
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        with ours:
            yield ours
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


def sample(wishes: Wishes, as_json: bool = False) -> int:
    """Answer one question live; the exit code."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its start alone would fill the screen
    ready = prepare(wishes)
    book = ready.book(stop_token_ids(wishes.checkpoint, ready.tokenizer))
    redraw = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with own_output() as out:
        show = (Record if as_json else Screen if redraw else Lines)(View(ready, book), out)
        try:
            show.end(answer(ready, book, show.hear))
        except KeyboardInterrupt:
            print("stopped before there was an answer", file=sys.stderr)
            return INTERRUPTED
    return 0

"""`ziprc sample`: watch adaptive sampling answer one question in a terminal.

In a terminal the branches are redrawn in place at every decision, with one line that says what was decided and why.
Elsewhere every change is a plain line, and with `--json` there is one JSON object at the end and nothing else. Model text
is data: no control character of it is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO
from unicodedata import combining, east_asian_width

import numpy as np

from ziprc.chat import visible_answer
from ziprc.engines.base import stop_token_ids
from ziprc.pages.tree import one_line
from ziprc.sampling.controller import NONE, Policy
from ziprc.sampling.live.asking import Ready, Wishes, answer, prepare
from ziprc.sampling.live.bench import UNLIMITED, AnswerBook
from ziprc.sampling.live.records import Answered, Decided, Event
from ziprc.sampling.policies.zip_rc import ZipRC
from ziprc.sampling.policies.zip_rc_plus import REMAINING, ZipRCPlus

TAIL_TOKENS = 60  # decoded for the tail of a text
OTHER_LINES = 7  # of the screen, besides those of the branches
STYLES = {"running": "1", "paused": "2", "chosen": "32"}  # bold, dim, green
COLUMNS = f"{'':>4} {'status':<8} {'P':>4} {'left':>6} {'tokens':>6}  text so far"


# --- what was decided, in words ---------------------------------------------------------------------------------------


def moves(event: Event) -> str:
    """What a decision does: `continue #1; pause #2; start #3`."""
    trees, decision, applied = event.decided.trees, event.decided.decision, event.applied
    if not decision.going[0]:
        return "stop"
    masks = {"continue": decision.run & trees.running, "resume": applied.resumed, "pause": applied.paused}
    slots = {verb: np.flatnonzero(mask[0]) for verb, mask in {**masks, "start": applied.started}.items()}
    words = [f"{verb} {', '.join(f'#{slot + 1}' for slot in own)}" for verb, own in slots.items() if len(own)]
    fork = f"off #{decision.branch[0] + 1} after {decision.branch_at[0]} tokens"
    return "; ".join(words + [f"branch #{slot + 1} {fork}" for slot in np.flatnonzero(applied.branched[0])])


def reason(policy: Policy, decided: Decided, tokens_left: bool) -> str:
    """Why, in the terms of the policy; zip-rc-plus: gain of the best move and its tokens against the price of a token."""
    decision, trees = decided.decision, decided.trees
    going, worth = decision.going[0], float(decision.utility[0])
    if isinstance(policy, ZipRC):
        if going:
            return f"the set of highest utility, {worth:.3f} (α {policy.alpha:g}, β {policy.beta:g})"
        return "no more samples are worth their price" if tokens_left else "the budget is spent"
    if not isinstance(policy, ZipRCPlus):
        return f"{int(trees.finished.sum())} of {int(trees.used.sum())} samples are finished"
    if not going:
        if worth >= policy.price:
            return "the budget is spent" if not tokens_left or trees.used.all() else "nothing more fits into the budget"
        if not np.isfinite(worth):
            return "every branch is finished, and there is no room for another"
        return f"nothing gains {policy.price:.2g} a token any more, the most is {worth:.2g}"
    if worth < policy.price:
        return "no answer yet, so one branch must go on"
    branch = decision.branch[0]
    costs = trees.signals[0, decision.run[0], REMAINING].tolist()
    costs += [float(trees.root[0, REMAINING])] * int(decision.start[0])
    costs += [] if branch == NONE else [float(trees.spot_signals[0, branch, REMAINING])]
    if len(costs) != 1:
        return f"gains up to {worth:.2g} a token ≥ price {policy.price:.2g}"
    cost = max(costs[0], 1.0)
    return f"gain {worth * cost:.3f} for {cost:.0f} tokens, {worth:.2g} a token ≥ price {policy.price:.2g}"


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


class View:
    """What is known of a question that is being answered; `lines` are its branches after the newest decision."""

    moves = said = ""  # what was decided, and the same with the reason

    def __init__(self, ready: Ready, book: AnswerBook, out: TextIO) -> None:
        self.ready, self.book, self.out = ready, book, out
        self.lines: list[Line] = []
        self.say(*self.header())

    def say(self, *lines: str) -> None:
        self.out.writelines(f"{line}\n" for line in lines)
        self.out.flush()

    def hear(self, event: Event) -> None:
        """Take in what an event says."""
        decided, applied, policy = event.decided, event.applied, self.ready.setting.policy
        trees, decision, budget = decided.trees, decided.decision, self.ready.controller.budget
        expected, remaining = (x[0].tolist() for x in policy.expectations(trees))
        self.lines = []
        for slot, ids in enumerate(event.token_ids):
            forked, finished = applied.branched[0, slot], trees.finished[0, slot]
            fresh = forked or applied.started[0, slot]
            parent, fork = trees.parent[0, slot], trees.fork[0, slot]
            if forked:
                parent, fork = decision.branch[0], decision.branch_at[0]
            line = Line(
                slot=slot,
                status="finished" if finished else "running" if fresh or decision.run[0, slot] else "paused",
                value=None if fresh or not np.isfinite(expected[slot]) else expected[slot],
                remaining=None if fresh or finished or not np.isfinite(remaining[slot]) else remaining[slot],
                tokens=len(ids),
                text=one_line(self.book.text(ids[-TAIL_TOKENS:])),
                answer=self.answer(ids) if finished else None,
                origin=f"#{parent + 1} at {fork}" if parent >= 0 else "",
            )
            self.lines.append(line)
        every = budget.interval
        left = decided.tokens + every <= budget.tokens and decided.step + every <= budget.latency
        self.moves = moves(event)
        self.said = f"{self.moves}: {reason(policy, decided, left)}"

    def end(self, answered: Answered) -> None:
        self.say(*self.closing(answered))

    def answer(self, ids: Sequence[int]) -> str | None:
        """The canonical answer of a response, else what is visible of it; None when no stop token ends it."""
        if not len(ids) or ids[-1] not in self.book.stops:
            return None
        text = self.book.text(ids)
        return self.book.task.canonical_answer(text) or visible_answer(text) or None

    def header(self) -> list[str]:
        """The question and how it is answered."""
        ready, budget, own = self.ready, self.ready.controller.budget, self.ready.config.rollouts
        limits = {"branches": budget.branches, "tokens": budget.tokens, "steps": budget.latency}
        most = ", ".join(f"{limit} {what}" for what, limit in limits.items() if limit < UNLIMITED)
        how = f"at most {most}; temperature {own.sampling.temperature:g}, min-p {own.sampling.min_p:g}"
        return [
            one_line(ready.wishes.prompt),
            f"{ready.setting.name} on {own.engine}, {how}; answers of {ready.task.name}",
        ]

    def closing(self, answered: Answered) -> list[str]:
        """The answer, and what it cost."""
        found, count = self.answer(answered.branches[answered.slot].token_ids), len(answered.branches)
        ended = sum(branch.finish_reason is not None for branch in answered.branches)
        said = "no answer: no branch ended with one"
        if found is not None:
            said = f"answer: {one_line(found)}   P(right) {answered.probability:.2f}, from #{answered.slot + 1}"
        return [
            said,
            f"{answered.tokens} tokens in {count} branch{'es' if count != 1 else ''} ({ended} finished), {answered.latency} "
            f"steps, {answered.prefill} prompt tokens computed, {answered.seconds:.2f} s",
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
    return head(text[::-1], width)[::-1]


def branch_line(line: Line, width: int, chosen: bool = False) -> str:
    """One branch on one line."""
    mark = f"{'→' if chosen else ''}#{line.slot + 1}"
    value = "" if line.value is None else f"{line.value:.2f}"
    left = "" if line.remaining is None else f"{line.remaining:.0f}"
    origin = f"(off {line.origin}) " if line.origin else ""
    said = f"[{one_line(line.answer)}] " if line.answer is not None else ""
    facts = head(f"{mark:>4} {line.status:<8} {value:>4} {left:>6} {line.tokens:>6}  {origin}{said}", width)
    return facts + tail(line.text, max(0, width - cells(facts)))


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


class Screen(View):
    """Redraws the branches in place."""

    drawn = 0  # lines that are there

    def header(self) -> list[str]:
        width = shutil.get_terminal_size().columns - 1
        return [head(line, width) for line in super().header()]

    def hear(self, event: Event) -> None:
        super().hear(event)
        self._draw(event.decided.step, event.decided.tokens)

    def end(self, answered: Answered) -> None:
        self._draw(answered.latency, answered.tokens, self.closing(answered), answered.slot)

    def _draw(self, step: int, tokens: int, closing: Sequence[str] = (), chosen: int | None = None) -> None:
        size = shutil.get_terminal_size()
        width = size.columns - 1  # some terminals wrap a full line
        lines = frame(self.lines, width, size.lines - OTHER_LINES, chosen, "NO_COLOR" not in os.environ)
        lines += [head(line, width) for line in (f"step {step}, {tokens} tokens · {self.said}", *closing)]
        up = f"\x1b[{self.drawn}A\r\x1b[J" if self.drawn else ""
        self.say(up + lines[0], *lines[1:])
        self.drawn = len(lines)


class Lines(View):
    """A line for every decision that changes something, and for every branch that has finished."""

    def hear(self, event: Event) -> None:
        """Print what one decision changed, finished branches first."""
        before, known = self.moves, {li.slot for li in self.lines if li.status == "finished"}
        super().hear(event)
        for line in self.lines:
            if line.status == "finished" and line.slot not in known:
                said = f"says {one_line(line.answer)}" if line.answer is not None else "has no answer"
                value = "" if line.value is None else f", P(right) {line.value:.2f}"
                ended = f"    #{line.slot + 1} finished after {line.tokens} tokens"
                self.say(f"{ended}, {said}{value}: …{tail(line.text, 60)}")
        if self.moves != before:
            going = "; ".join(
                f"#{li.slot + 1} P {li.value:.2f}, ~{li.remaining or 0:.0f} left"
                for li in self.lines
                if li.status == "running" and li.value is not None
            )
            self.say(f"step {event.decided.step:>5}  {self.said}" + (f"  [{going}]" if going else ""))


class Record(View):
    """One JSON object at the end: answer, probability, costs and branches."""

    def header(self) -> list[str]:
        return []

    def end(self, answered: Answered) -> None:
        """Print the whole run as one JSON object: answer, tokens, steps, and every branch with why it ended."""
        branches = [
            {"branch": slot + 1, "parent": branch.parent + 1 or None, "fork": branch.fork, "tokens": branch.generated,
             "end": branch.finish_reason.value if branch.finish_reason is not None else None,
             "value": self.lines[slot].value, "text": self.book.text(branch.token_ids),
             "answer": self.answer(branch.token_ids), "chosen": slot == answered.slot}
            for slot, branch in enumerate(answered.branches)
        ]  # fmt: skip
        record = {
            "prompt": self.ready.wishes.prompt, "policy": self.ready.setting.name,
            "answer": branches[answered.slot]["answer"], "probability": answered.probability, "tokens": answered.tokens,
            "prefill": answered.prefill, "steps": answered.latency, "seconds": answered.seconds,
            "decisions": len(answered.decisions), "branches": branches,
        }  # fmt: skip
        self.say(json.dumps(record, indent=1))


@contextlib.contextmanager
def own_output() -> Iterator[TextIO]:
    """Standard output, for us alone: what engines and their libraries print meanwhile, in C++ too, goes to stderr."""
    sys.stdout.flush()
    try:
        ours, before = os.dup(sys.stdout.fileno()), os.dup(1)
    except OSError:  # somebody has put another stream in its place
        yield sys.stdout
        return
    os.dup2(2, 1)
    try:
        with os.fdopen(ours, "w", encoding="utf-8", errors="replace") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


def sample(wishes: Wishes, as_json: bool = False) -> int:
    """Answer one question live; the exit code."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its start alone would fill the screen
    ready = prepare(wishes)
    book = AnswerBook(ready.task, ready.tokenizer, stop_token_ids(wishes.checkpoint, ready.tokenizer))
    redraw = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    with own_output() as out:
        show = (Record if as_json else Screen if redraw else Lines)(ready, book, out)
        try:
            show.end(answer(ready, book, show.hear))
        except KeyboardInterrupt:
            print("stopped before there was an answer", file=sys.stderr)
            return 130  # as shells have it
    return 0

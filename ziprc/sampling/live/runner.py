"""Executing a policy on a real engine: one batch over all prompts in flight, and decisions between two engine steps.

An engine session decodes whatever is in it, one token a step. The runner writes each step into the prefix trees, lets the
controller decide for every prompt that is due, and turns the decision into requests: to pause is to abort, to resume or to
branch is to add prompt and prefix again (the prefix cache still has them), to start is to add the prompt. The other
prompts go on decoding meanwhile, so the batch never drains (ZIP-RC, arXiv 2512.01457, §4). A prompt is due when `interval`
steps gave it a token since its last decision, or when none of its branches runs any more; so no branch gets more tokens
than the controller has paid for. With seats for everybody, and where nothing is branched or resumed, decisions, tokens
and answers are those of `replay.py` on the same tokens.

An engine that breaks takes all prompts in flight with it; in a fresh session they start over with their old seeds, one at a
time, and only the one that breaks the engine alone has failed. Shapes: P prompts in flight, S slots, n rows of a step.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ziprc.engines.base import Request, Session, Step
from ziprc.errors import UserError
from ziprc.sampling import features as f
from ziprc.sampling.controller import NONE, Applied, Controller, Decision, apply
from ziprc.sampling.live.readings import Rows, _Readings, _Stem
from ziprc.sampling.live.records import Answered, Answers, Decided, Event, Question, Timing
from ziprc.sampling.tree import NO_ANSWER, Status, Trees
from ziprc.store.digests import derived_seed
from ziprc.tables.rollouts import FinishReason


@dataclass
class _Flight:
    """One question in flight."""

    index: int
    question: Question
    admitted: float
    stems: list[_Stem] = field(default_factory=list)
    decisions: list[Decided] = field(default_factory=list)
    prefill: int = 0
    error: str | None = None


class _Decided(NamedTuple):
    """One decision for all prompts that were due."""

    before: Trees
    decision: Decision
    applied: Applied
    trees: Trees  # afterwards


class Runner:
    """Answers questions with one controller on one engine. `run` yields answers as they are found.

    The session is the caller's to close; sessions that the runner opens itself (`new_session`) it closes.
    """

    def __init__(
        self,
        session: Session,
        controller: Controller,
        questions: Sequence[Question],
        answer_of: Answers,
        *,
        window: int,
        max_new_tokens: int,
        cells: int,
        in_flight: int,
        on_event: Callable[[Event], None] | None = None,
        seconds: Callable[[], float] = time.monotonic,
        new_session: Callable[[], Session] | None = None,
    ) -> None:
        _check_settings(controller, window, max_new_tokens, cells, in_flight)
        self.session, self.controller, self.questions, self.answer_of = session, controller, questions, answer_of
        self.max_new_tokens, self.on_event, self.seconds = max_new_tokens, on_event, seconds
        self.new_session, self._own_session = new_session, False
        self.timing = Timing()
        rows, slots = max(1, min(in_flight, len(questions))), controller.budget.branches
        self._trees = self._empty(rows)
        self._readings = _Readings(rows, slots, cells, window)
        self._joined = np.zeros((rows, slots), np.int32)  # [P, S] tokens of the prefix in the newest request
        self._steps = np.zeros(rows, np.int64)  # [P] that gave a token, since the last decision
        self._decided = np.zeros(rows, np.int64)  # [P] decisions
        self._flights: dict[int, _Flight] = {}  # by row
        self._flying: dict[str, _Stem] = {}  # by key of the request
        self._queue = deque(range(len(questions)))
        self._alone: dict[int, int] = {}  # questions that must fly alone, and the tokens they lost

    def run(self) -> Iterator[Answered]:
        """Every question, once, in the order in which answers are found. UserError for a prompt that can never fit."""
        ordered = sorted(self.questions, key=lambda question: len(question.prompt_token_ids))
        for question in ordered[:1] + ordered[1:][-1:]:  # the session refuses one that cannot fit before any is decoded
            request = Request(f"prompt {question.key}", question.prompt_token_ids, question.seed, self.max_new_tokens)
            self.session.add(request)
            self.session.abort([request.key])
        try:
            while self._queue or self._flights:
                with self._timed("total_s"):
                    answers = self._round()
                yield from answers
        finally:
            self.session.abort(list(self._flying))
            if self._own_session:
                self.session.close()

    def _round(self) -> list[Answered]:
        """Admit, decode one step, decide for those who are due; who ended with it."""
        self._admit()
        try:
            with self._timed("stepping_s"):
                step = self.session.step()
            if step is None:
                raise RuntimeError(f"the engine has nothing in flight and still owes {sorted(self._flying)}")
        except Exception as error:  # the boundary to the engine: what it raises becomes the error of prompts
            if is_bug_of_ours(error):
                raise
            return self._broken(error)
        self.timing.steps += 1
        with self._timed("tracking_s"):
            self._track(step)
        failed = [self._end(row) for row, flight in list(self._flights.items()) if flight.error is not None]
        rows = self._due()
        if not len(rows):
            return failed
        with self._timed("deciding_s"):
            decided = self._decide(rows)
        with self._timed("requesting_s"):
            self._act(rows, decided.applied, decided.trees)
        with self._timed("deciding_s"):
            self._record(rows, decided)
            return failed + self._answer(rows[~decided.trees.running.any(-1)])

    def _empty(self, rows: int) -> Trees:
        policy = self.controller.policy
        return Trees.empty(rows, self.controller.budget.branches, policy.signals, policy.can_branch)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self.seconds()
        try:
            yield
        finally:
            setattr(self.timing, name, getattr(self.timing, name) + self.seconds() - start)

    # Coming: questions become flights, branches become requests.

    def _admit(self) -> None:
        while self._queue and len(self._flights) < self._seats():
            row = next(row for row in range(len(self._trees)) if row not in self._flights)
            index = self._queue.popleft()
            self._trees.put(np.array([row]), self._empty(1))
            self._readings.clear(row)
            self._steps[row] = self._decided[row] = 0
            self._flights[row] = _Flight(index, self.questions[index], self.seconds())
            self._trees.status[row, 0] = Status.RUNNING
            self._request(self._sprout(row, 0))

    def _seats(self) -> int:
        """How many prompts may be in flight, given who is and who comes next."""
        concerned = [self._queue[0], *(flight.index for flight in self._flights.values())]
        return 1 if any(index in self._alone for index in concerned) else len(self._trees)

    def _sprout(self, row: int, slot: int) -> _Stem:
        stems = self._flights[row].stems
        assert slot == len(stems), "slots are handed out in order"
        stems.append(_Stem(row, slot))
        return stems[-1]

    def _request(self, stem: _Stem) -> None:
        """Let the branch decode from the next step on."""
        flight, kept = self._flights[stem.row], len(stem.token_ids)
        question = flight.question
        stem.key = f"{flight.index}:{question.key}/{stem.slot}/{stem.segments}"
        prompt = (*question.prompt_token_ids, *stem.token_ids)
        seed = derived_seed(question.seed, stem.slot, stem.segments)
        self.session.add(Request(stem.key, prompt, seed, self.max_new_tokens - kept))
        stem.segments += 1
        self._joined[stem.row, stem.slot] = kept
        self._flying[stem.key] = stem

    # Following: what a step emitted.

    def _track(self, step: Step) -> None:
        stems = [self._flying[key] for key in step.keys]
        p = np.fromiter((stem.row for stem in stems), np.int64, len(stems))
        s = np.fromiter((stem.slot for stem in stems), np.int64, len(stems))
        trees = self._trees
        assert (trees.length[p, s] == self._joined[p, s] + step.position).all(), "the engine lost or repeated a token"
        can_branch = self.controller.policy.can_branch
        readings = self._readings.add(p, s, step, keep=can_branch)
        trees.length[p, s] += 1
        heard = np.zeros(len(trees), bool)
        heard[p] = True
        trees.latency += heard
        self._steps += heard
        for stem, token, reading in zip(stems, step.token_ids.tolist(), readings, strict=True):
            stem.token_ids.append(token)
            if can_branch:
                stem.readings.append(reading)
        for i in np.flatnonzero(step.position == 0):  # its prompt has been computed; one aborted before costs nothing
            flight = self._flights[stems[i].row]
            prefix = len(flight.question.prompt_token_ids) + int(self._joined[p[i], s[i]])
            flight.prefill += prefix - int(step.cached[i])
        for stem, reason in zip(stems, step.finish, strict=True):
            if reason is not None:
                self._finish(stem, reason)

    def _finish(self, stem: _Stem, reason: FinishReason) -> None:
        del self._flying[stem.key]
        stem.finish_reason = reason
        self._trees.status[stem.row, stem.slot] = Status.FINISHED
        if reason is not FinishReason.STOP:
            return
        flight = self._flights[stem.row]
        try:
            answer = self.answer_of(flight.index, stem.token_ids)
        except Exception as error:  # the boundary to the task: one prompt's answers must not end the others
            if is_bug_of_ours(error):
                raise
            flight.error = f"Prompt {flight.question.key}: its answer could not be read: {_text(error)}"
        else:
            self._trees.answer[stem.row, stem.slot] = NO_ANSWER if answer is None else answer

    # Deciding.

    def _due(self) -> Rows:
        wait = np.where(self._decided == 0, 1, self.controller.budget.interval)
        return np.flatnonzero(self._trees.used[:, 0] & ((self._steps >= wait) | ~self._trees.running.any(-1)))

    def _decide(self, rows: Rows) -> _Decided:
        """Decide for these prompts, and change their trees accordingly."""
        part = self._trees.take(rows)
        self._read(rows, part)
        decision = self.controller.decide(part)
        _check_branching(self.controller, decision, part)
        before = part.take(np.arange(len(rows)))
        applied = apply(decision, part)
        fresh = applied.started | (applied.branched & (part.fork == 0))
        part.signals[fresh] = part.root[np.nonzero(fresh)[0]]  # in the state of the prompt
        self._trees.put(rows, part)
        self._steps[rows] = 0
        self._decided[rows] += 1
        self.timing.decisions += 1
        return _Decided(before, decision, applied, part)

    def _read(self, rows: Rows, part: Trees) -> None:
        """Signals of whatever was read since the last decision."""
        i, s = np.nonzero(self._readings.unread[rows])
        if len(i):
            joint, features = self._readings.smoothed(rows[i], s), self._readings.features[rows[i], s]
            part.signals[i, s] = self.controller.policy.read(joint, features)
            self._readings.unread[rows] = False
            if self.controller.policy.can_branch:
                self._spot(rows, part, i, s, features[:, f.SLIP].astype(np.int32))
        first = self._decided[rows] == 0
        part.root[first] = part.signals[first, 0]

    def _spot(self, rows: Rows, part: Trees, i: Rows, s: Rows, spot: NDArray[np.int32]) -> None:
        """Where [n] the branches would fork, and the signals of the states there; read again only where it has moved."""
        moved = np.flatnonzero((spot != part.spot[i, s]) & (spot > 0))
        part.spot[i, s] = spot
        if not len(moved):
            return
        stems = [self._flights[int(rows[i[n]])].stems[s[n]] for n in moved]
        states = [self._readings.state(stem, int(spot[n])) for stem, n in zip(stems, moved, strict=True)]
        joint, features = (np.stack(column) for column in zip(*states, strict=True))
        part.spot_signals[i[moved], s[moved]] = self.controller.policy.read(joint, features)

    def _act(self, rows: Rows, applied: Applied, part: Trees) -> None:
        """Turn what changed into requests."""
        self._abort(self._stems(rows, applied.paused))
        for stem in self._stems(rows, applied.resumed):
            self._readings.guess_gap(stem.row, stem.slot)
            self._request(stem)
        for i, slot in np.argwhere(applied.started).tolist():
            self._request(self._sprout(int(rows[i]), slot))
        for i, slot in np.argwhere(applied.branched).tolist():
            stem = self._sprout(int(rows[i]), slot)
            stem.parent, stem.fork = int(part.parent[i, slot]), int(part.fork[i, slot])
            parent = self._flights[stem.row].stems[stem.parent]
            stem.token_ids = parent.token_ids[: stem.fork]
            self._readings.inherit(stem, parent)
            self._request(stem)

    def _stems(self, rows: Rows, mask: NDArray[np.bool_]) -> list[_Stem]:
        return [self._flights[int(rows[i])].stems[slot] for i, slot in np.argwhere(mask).tolist()]

    def _abort(self, stems: Iterable[_Stem]) -> None:
        keys = [stem.key for stem in stems]
        if keys:
            self.session.abort(keys)
        for key in keys:
            del self._flying[key]

    def _record(self, rows: Rows, decided: _Decided) -> None:
        for i, row in enumerate(rows.tolist()):
            flight = self._flights[row]
            flight.decisions.append(Decided(_one(decided.before, i), _one(decided.decision, i)))
            if self.on_event is not None:
                texts = [tuple(stem.token_ids) for stem in flight.stems]
                self.on_event(Event(flight.index, flight.decisions[-1], _one(decided.applied, i), texts))

    # Going: answers, and failures.

    def _answer(self, rows: Rows) -> list[Answered]:
        """Let go of the prompts that have stopped."""
        if not len(rows):
            return []
        choice = self.controller.choose(self._trees.take(rows))
        chosen = zip(rows.tolist(), choice.slot.tolist(), choice.probability.tolist(), strict=True)
        return [self._end(row, slot, probability) for row, slot, probability in chosen]

    def _end(self, row: int, slot: int = NONE, probability: float = 0.0) -> Answered:
        """Release the row of a prompt."""
        self._abort([stem for stem in self._flights[row].stems if stem.key in self._flying])
        flight = self._land(row)
        return Answered(
            flight.index, flight.question, tuple(stem.frozen() for stem in flight.stems), slot, probability,
            tokens=int(self._trees.spent[row]), prefill=flight.prefill, latency=int(self._trees.latency[row]),
            seconds=self.seconds() - flight.admitted, decisions=flight.decisions, error=flight.error,
            lost=self._alone.pop(flight.index, 0),
        )  # fmt: skip

    def _land(self, row: int) -> _Flight:
        self._trees.status[row] = Status.FREE
        return self._flights.pop(row)

    def _broken(self, error: Exception) -> list[Answered]:
        """The engine raised. Whom the error names (`keys`) has failed; otherwise everybody in flight is a suspect."""
        keys = getattr(error, "keys", ())
        named = {self._flying[key].row for key in keys if key in self._flying} if not callable(keys) else set()
        if named:
            return [self._fail(row, error) for row in sorted(named)]
        self._flying.clear()
        problem = self._reopen(error)
        if problem is not None:
            answers = [self._fail(row, problem) for row in sorted(self._flights)]
            return answers + [self._never(problem) for _ in range(len(self._queue))]
        if len(self._flights) == 1:
            return [self._fail(row, error) for row in list(self._flights)]
        for row in sorted(self._flights, key=lambda row: -self._flights[row].index):
            flight = self._land(row)
            self._alone[flight.index] = int(self._trees.spent[row])
            self._queue.appendleft(flight.index)
        return []

    def _reopen(self, error: Exception) -> Exception | None:
        """Go on in a fresh session; why not, if that is impossible."""
        if self.new_session is None:
            return error
        with suppress(Exception):  # it is broken already, and may not even close
            self.session.close()
        try:
            self.session, self._own_session = self.new_session(), True
        except Exception as again:  # the boundary to the engine, as above
            return RuntimeError(f"{_text(error)}; and no new session could be opened: {_text(again)}")
        return None

    def _fail(self, row: int, error: Exception) -> Answered:
        flight = self._flights[row]
        flight.error = f"Prompt {flight.question.key}: the engine failed while it was in flight: {_text(error)}"
        return self._end(row)

    def _never(self, error: Exception) -> Answered:
        """The next question in line, when there is no engine any more."""
        index = self._queue.popleft()
        question = self.questions[index]
        text = f"Prompt {question.key}: never started, the engine had failed before: {_text(error)}"
        return Answered(index, question, (), NONE, 0.0, 0, 0, 0, 0.0, [], text, self._alone.pop(index, 0))


T = TypeVar("T", Trees, Decision, Applied)
_FIELDS: dict[type, list[str]] = {each: [one.name for one in fields(each)] for each in (Trees, Decision, Applied)}


def _one(record: T, i: int) -> T:
    """The i-th prompt of a record of arrays, as a view."""
    return type(record)(*(getattr(record, name)[i : i + 1] for name in _FIELDS[type(record)]))


def is_bug_of_ours(error: Exception) -> bool:
    """An assertion of this package that did not hold; one of vLLM's is a failure of the engine like any other."""
    where = traceback.walk_tb(error.__traceback__)
    return isinstance(error, AssertionError) and list(where)[-1][0].f_globals["__name__"].startswith("ziprc")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check_settings(controller: Controller, window: int, max_new_tokens: int, cells: int, in_flight: int) -> None:
    for name, value in {"window": window, "cells": cells, "in_flight": in_flight}.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, found {value}.")
    if max_new_tokens < controller.budget.interval:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, less than one decision interval of {controller.budget.interval} "
            "tokens. Raise it, or lower the interval."
        )


def _check_branching(controller: Controller, decision: Decision, trees: Trees) -> None:
    """Our own invariants: a branch grows from tokens that are there, and not after a stop token."""
    rows = np.flatnonzero(decision.branch != NONE)
    if len(rows):
        assert controller.policy.can_branch, f"{controller.policy.name} branches without saying that it can"
        slot, at = decision.branch[rows], decision.branch_at[rows]
        longest = trees.length[rows, slot] - trees.finished[rows, slot]
        assert (trees.used[rows, slot] & (at >= 0) & (at <= longest)).all(), "a branch needs a prefix to grow from"

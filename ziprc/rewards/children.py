"""Comparing in child processes that can be killed: what the symbolic graders share.

Symbolic comparison of text that a model wrote can take for ever or all memory (`9**9**9**9`). So the comparing runs in
children (`python -m ziprc.rewards.math`, say), started once each, one item in flight per child. A child has a memory limit,
and for every item a timer of CPU time, not of wall-clock, so that a loaded machine does not change grades; the timer's
signal kills it. The parent sees the end of the pipe, records `timeout` or `error` for that item, and starts another.
Model text travels as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ziprc.rewards.base import Grade, Item, graded, lacks_answer, ungraded
from ziprc.tables.grades import GradeStatus

MEMORY_BYTES = 2 << 30  # address space of a child; SymPy and its parser need about 400 MiB
START_S = 120.0  # imports on a machine that is busy with something else
WALL_PER_CPU = 6.0  # a child that does not even use its CPU time is stopped after this many timeouts of wall-clock
EXTRACTED_CHARACTERS = 200
MOST_WORKERS = 8


def workers() -> int:
    """Children of a grader that has the machine for itself."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


def outcome(score: float | None, extracted: str | None = None, why: str | None = None) -> dict[str, Any]:
    """What a child says of one item: a score, or None and why there is none."""
    return {"score": score, "extracted": extracted and extracted[:EXTRACTED_CHARACTERS], "why": why}


# --- the parent ------------------------------------------------------------------------------------------------------


class _Child:
    """One grading process and what it is busy with."""

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [*command, str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + START_S

    def send(self, item: int, payload: bytes, wall_s: float) -> None:
        """Hand over one item. A child that is already gone is noticed at the end of its output, not here."""
        self.item, self.deadline = item, time.monotonic() + wall_s
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(payload)
            self.stdin.flush()

    def read(self) -> dict[str, Any] | None:
        """The next message, or None when the child is gone (a cut line counts as gone)."""
        line = self.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def stop(self) -> int:
        """End the process and return its exit status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return status


class ChildGrader:
    """A grader that settles what it can and sends the rest to children. A context manager: it owns processes.

    A kind of it has a `name`, the `command` of its child (`python -m` of a module that calls `serve`), and says what needs no
    child and what a child is sent.
    """

    name: str
    command: Sequence[str]

    def __init__(self, timeout_s: float, workers: int = 1, command: Sequence[str] | None = None) -> None:
        self.timeout_s, self.workers, self.command = timeout_s, workers, command or self.command
        self.children: list[_Child] = []

    def settled(self, item: Item) -> Grade | None:
        """The grade of an item that needs no child."""
        raise NotImplementedError

    def question(self, item: Item) -> Mapping[str, Any]:
        """What a child is sent, for JSON."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self.children:
            child.stop()
        self.children = []

    def lacks(self, item: Item) -> str | None:
        return lacks_answer(item)

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items; what is not settled goes to child processes, each item with its time limit."""
        grades: dict[int, Grade] = {}
        waiting: deque[int] = deque()
        for i, item in enumerate(items):
            if (grade := self.settled(item)) is not None:
                grades[i] = grade
            else:
                waiting.append(i)
        while len(grades) < len(items):
            while len(self.children) < min(self.workers, len(items) - len(grades)):
                self.children.append(_Child(self.command, self.timeout_s))
            for child in self.children:
                if child.ready and child.item is None and waiting:
                    i = waiting.popleft()
                    payload = json.dumps(self.question(items[i])).encode() + b"\n"
                    child.send(i, payload, self.timeout_s * WALL_PER_CPU)
            self._collect(grades)
        return [grades[i] for i in range(len(items))]

    def _collect(self, grades: dict[int, Grade]) -> None:
        """Wait for the next message, end or deadline of any child."""
        with selectors.DefaultSelector() as selector:
            active = [child for child in self.children if child.item is not None or not child.ready]
            for child in active:
                selector.register(child.stdout, selectors.EVENT_READ, child)
            patience = max(0.0, min(child.deadline for child in active) - time.monotonic())
            speaking = [key.data for key, _ in selector.select(patience)]
        for child in speaking:
            message = child.read()
            if message is None:
                self._bury(child, grades, overdue=False)
            elif child.item is None:
                child.ready = True
            else:
                if (score := message["score"]) is None:
                    grades[child.item] = ungraded(GradeStatus.ERROR, message["why"])
                else:
                    grades[child.item] = graded(score, message["extracted"])
                child.item = None
        for child in active:
            if child not in speaking and time.monotonic() >= child.deadline:
                self._bury(child, grades, overdue=True)

    def _bury(self, child: _Child, grades: dict[int, Grade], overdue: bool) -> None:
        """Remove a dead or overdue child and record what that means for the item it had."""
        status = child.process.wait() if not overdue else None
        child.stop()
        self.children.remove(child)
        if not child.ready:
            command = " ".join(self.command)
            raise RuntimeError(f"the {self.name} grader's child `{command}` did not start (exit status {status})")
        assert child.item is not None, "an idle child is not listened to"
        if overdue or status == -signal.SIGPROF:
            grades[child.item] = ungraded(GradeStatus.TIMEOUT, f"no verdict within {self.timeout_s:g} s")
        else:
            grades[child.item] = ungraded(GradeStatus.ERROR, f"the grading process ended with status {status}")


# --- the child -------------------------------------------------------------------------------------------------------


def serve(compare: Callable[..., dict[str, Any]], warm_up: Callable[[], object], timeout_s: float) -> None:
    """Answer one JSON line per JSON line until the input ends: `compare`, whose arguments are the keys of the line.

    `warm_up` runs once, before the first timer: imports and compiled tables. Whatever libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    warm_up()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    answers.write(b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        try:
            verdict = compare(**item)
        except Exception as error:  # the boundary to SymPy, which raises anything: MemoryError, RecursionError, …
            verdict = outcome(None, why=f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(verdict).encode() + b"\n")

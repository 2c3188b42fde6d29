"""The one error that a user is meant to read.

A `UserError` says in one paragraph what was found, what was expected, where, and what to do. Entry points print
it without a traceback and exit with code 2. Everything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Input that cannot be worked with; the message tells how to mend it."""


class Dark(UserError):
    """Not one question of a batch to a grader was answered, so that there is nothing to learn from."""


class Stopped(BaseException):
    """A signal asked this process to end. No Exception, so that nothing on the way takes it for a failure of its own."""

    def __init__(self, number: int, kept: str = "Nothing is half-written; finished pieces are kept.") -> None:
        super().__init__(number, kept)
        self.number, self.kept = number, kept


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" for the nearest known word, else the list of known words."""
    known = sorted(known)
    match = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{match[0]}'?)" if match else f" (known: {', '.join(known)})"


def first_few(names: Sequence[object], most: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more

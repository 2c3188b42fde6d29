"""A watchdog for engines: a step that does not come back within a stated limit ends the process, with a reason.

A hung collective, a dead worker or a stuck driver would otherwise hold a node until the scheduler's own limit. A thread
ends the process while the interpreter still runs. It counts its own looks, not the clock, so a job that the scheduler
suspends is not taken for one that hangs. For a hang that holds the interpreter's lock, C code of `faulthandler` does it,
later and by the clock. Either way every thread's stack is in the log, finished pieces are kept, and the kernel
releases the output's lock. Nothing is watched between steps. Imports no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator

import psutil

EXIT_STALLED = 70  # EX_SOFTWARE of sysexits.h
LOOKS_PER_LIMIT = 20
LIMITS_IF_STUCK = 4  # limits after which `faulthandler` ends a process whose interpreter is stuck


class Watchdog:
    """Ends the process when one `watching` block takes longer than `limit_s` seconds."""

    def __init__(self, limit_s: float, what: str) -> None:
        self.limit_s, self.what = limit_s, what
        self._step, self._watched = 0, False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """One step of the engine."""
        self._step += 1
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    def close(self) -> None:
        """Stop watching for good."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        """Look now and then; each look that finds nothing puts off the end that needs no interpreter."""
        seen = looks = 0
        while not self._closed.wait(self.limit_s / LOOKS_PER_LIMIT):
            looks = looks + 1 if self._watched and self._step == seen else 0
            seen = self._step
            if looks > LOOKS_PER_LIMIT:
                self._end_process()
            faulthandler.dump_traceback_later(LIMITS_IF_STUCK * self.limit_s, exit=True, file=sys.__stderr__)

    def _end_process(self) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__)
        print(
            f"{self.what}: one step of the engine has taken more than {self.limit_s:g} s (runtime.stall_limit_s), so the "
            "process ends itself; the stacks above show where it hangs. Finished pieces are kept: run the same command "
            "again. If a step may take that long, raise runtime.stall_limit_s.",
            file=sys.__stderr__,
            flush=True,
        )
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(EXIT_STALLED)

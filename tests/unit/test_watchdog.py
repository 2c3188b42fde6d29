"""The watchdog ends a process whose engine hangs, even one that holds the interpreter's lock, and no other."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ziprc.engines.watchdog import EXIT_STALLED

LIMIT_S = 0.5
PROGRAM = """
import ctypes, subprocess, sys, time
from ziprc.engines.watchdog import Watchdog
watchdog = Watchdog({limit}, "engine x")
{body}
print("alive", flush=True)
"""


def run(body: str, limit: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(limit=limit, body=body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_a_step_over_the_limit_ends_the_process_with_the_limit_and_the_stack() -> None:
    started = time.monotonic()
    done = run("with watchdog.watching(): time.sleep(50)")
    assert done.returncode == EXIT_STALLED and time.monotonic() - started < 20
    assert "engine x: one step of the engine has taken more than 0.5 s (runtime.stall_limit_s)" in done.stderr
    assert 'File "<string>", line 5' in done.stderr


def test_a_hang_that_holds_the_interpreter_is_ended_too() -> None:
    done = run("with watchdog.watching():\n    time.sleep(0.3)\n    ctypes.PyDLL(None).sleep(50)")
    assert done.returncode == 1 and "Timeout" in done.stderr and 'File "<string>"' in done.stderr


def test_its_children_end_with_it() -> None:
    done = run("print(subprocess.Popen(['sleep', '50']).pid, flush=True)\nwith watchdog.watching(): time.sleep(50)")
    assert done.returncode == EXIT_STALLED
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(done.stdout))
        for _ in range(100):  # killed, it may take a moment to be gone
            if child.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the child lives on")


def test_many_steps_and_long_pauses_between_them_are_fine() -> None:
    done = run("for _ in range(30):\n    with watchdog.watching(): time.sleep(0.03)\ntime.sleep(0.9)\nwatchdog.close()")
    assert done.returncode == 0 and done.stdout == "alive\n"


def test_a_suspended_process_is_not_taken_for_one_that_hangs() -> None:
    body = "print('in', flush=True)\nwith watchdog.watching(): time.sleep(1.5)"
    program = PROGRAM.format(limit=1.8, body=body)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)  # over the limit, under that of a stuck interpreter
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "alive\n" and process.returncode == 0


def test_a_step_that_fails_is_no_longer_watched() -> None:
    done = run("try:\n    with watchdog.watching(): 1 / 0\nexcept ZeroDivisionError: time.sleep(1.5)")
    assert done.returncode == 0 and done.stdout == "alive\n"

"""kill -9 of the whole process tree, then the same command again: it finishes, and every table is the same.

What is built goes as far as the values of the critics, which need all that is killed here: pieces, tables, training. What
lies below them is made of the same bytes; tests/workflow/test_faults.py kills every stage of it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflow.conftest import Workplace, environment
from ziprc.workflow.build import lock_experiment

pytestmark = pytest.mark.slow

TARGET = "values/train.parquet"


def start(place: Workplace) -> subprocess.Popen[bytes]:
    place.folder.mkdir(parents=True, exist_ok=True)
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        place.command("build", f"results/micro/{TARGET}"),
        cwd=place.folder,
        env=environment(),
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    )


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL every process of the session at once."""
    listing = subprocess.run(["ps", "-eo", "pid=,sess="], capture_output=True, text=True, check=True).stdout
    members = [
        int(pid) for pid, session in (line.split() for line in listing.splitlines()) if int(session) == process.pid
    ]
    for pid in members:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(happens: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None, "the workflow ended before the moment to kill it came"
        assert time.monotonic() < limit, "the moment to kill never came"
        time.sleep(0.05)


MOMENTS = {
    "rollouts": lambda home: lambda: any((home / "rollouts").glob(".train.pieces/*")),
    "training": lambda home: lambda: any((home / "checkpoints").glob(".*.training/**/checkpoint-*")),
    "grading": lambda home: lambda: (home / "grades" / ".train.parquet.lock").exists(),
}


def test_killed_three_times_it_ends_in_the_same_tables(built: Workplace, tmp_path: Path) -> None:
    place = Workplace(tmp_path / "killed")
    for moment in ("rollouts", "grading", "training"):
        process = start(place)
        wait_for(MOMENTS[moment](place.home), process)
        kill_tree(process)
    done = place.run("build", f"results/micro/{TARGET}", timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made, wanted = place.tables(), built.tables()
    assert TARGET in made and made == {name: wanted[name] for name in made}


def test_a_build_beside_a_living_one_is_refused(workplace: Workplace) -> None:
    lock = lock_experiment(workplace.home)  # as a stage that outlived its workflow would hold it
    second = workplace.run("build")
    os.close(lock)
    assert second.returncode == 2 and f"is being built by process {os.getpid()}" in second.stderr
    assert workplace.run("build").returncode == 0

"""What of this workflow is still alive: jobs of SLURM, and the processes that hold the kernel's locks.

A killed Snakemake leaves its SLURM jobs running, and forgets them. Whoever starts the workflow again, or unlocks its
folder, asks here first. Jobs are known by their working folder, which the executor sets, and by their comment,
`rule_<rule>_wildcards_<experiment>_<name>`. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ziprc.errors import UserError

SECONDS_FOR_AN_ANSWER = 30  # a busy controller takes some
NO_CLUSTER = "Could not establish a configuration source"  # SLURM's commands, installed without a configuration
SECONDS_BETWEEN_LOOKS = 10
SECONDS_BETWEEN_LINES = 60


@dataclass(frozen=True)
class Living:
    """Something that may still write into this folder."""

    what: str
    stop: str

    def __str__(self) -> str:
        return f"{self.what} (stop it: `{self.stop}`)"


@dataclass(frozen=True)
class SlurmJob:
    """A job of SLURM that is pending, running or ending."""

    number: str
    state: str
    folder: str
    comment: str

    @property
    def task(self) -> str:
        """`rollouts smoke_train`: the rule and its wildcards."""
        rule, _, wildcards = self.comment.removeprefix("rule_").partition("_wildcards_")
        return f"{rule} {wildcards}".strip() or "without a comment"

    def belongs_to(self, experiment: str) -> bool:
        wildcards = self.comment.partition("_wildcards_")[2]
        return wildcards == experiment or wildcards.startswith(f"{experiment}_")

    def living(self) -> Living:
        return Living(f"SLURM job {self.number}, {self.state}: {self.task}", f"scancel {self.number}")


def _answer(*command: str) -> str | None:
    """What a command of SLURM prints; None on a machine that belongs to no cluster.

    Raises UserError when there is a cluster that does not answer: then nobody knows what is alive.
    """
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_AN_ANSWER, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"`{command[0]}` gave no answer in {SECONDS_FOR_AN_ANSWER} s. Try again later.") from None
    if NO_CLUSTER in done.stderr:
        return None
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip() or f'exit code {done.returncode}'}.")
    return done.stdout


def status_command() -> str:
    """The command that tells Snakemake how jobs ended: `sacct` where accounts are kept, else `squeue`.

    sacct remembers jobs for good; squeue forgets them after MinJobAge. Without accounting sacct always fails, and the
    executor, which takes it wherever it is installed, would wait for ever.
    """
    settings = ""
    with contextlib.suppress(UserError):
        settings = _answer("scontrol", "show", "config") or ""
    storage = re.search(r"^AccountingStorageType\s*=\s*(\S+)", settings, re.MULTILINE)
    kept = storage is not None and not storage[1].endswith("none") and shutil.which("sacct")
    return "sacct" if kept else "squeue"


def slurm_jobs(folder: Path, experiment: str | None = None) -> list[SlurmJob]:
    """Jobs of this user that work in `folder`, of one experiment or of all; none without SLURM. Errors: `_answer`."""
    listing = _answer("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%T|%Z|%k") or ""
    own = os.environ.get("SLURM_JOB_ID")  # Snakemake itself may run in a job
    jobs = [SlurmJob(*line.split("|", 3)) for line in listing.splitlines() if line.count("|") >= 3]
    here = [job for job in jobs if _same_path(job.folder, folder) and job.number != own]
    return [job for job in here if experiment is None or job.belongs_to(experiment)]


def _same_path(text: str, path: Path) -> bool:
    return os.path.realpath(text) == os.path.realpath(path)


def locks(results: Path) -> Iterator[Path]:
    """Lock files under `results` that a living process holds, on this machine or, where the file system says so, another."""
    for path in sorted([*results.glob("*/.lock"), *results.glob("*/**/.*.lock")]):
        with open(path) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield path


def holder(lock: Path) -> Living:
    """Who holds a lock file: all processes of this machine that have it open, or else the one of another that it names."""
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(_same_path(opened.path, lock) for opened in process.open_files()):
                found[process.pid] = " ".join(process.cmdline()[1:])[:100]
    if not found:
        written = lock.read_text().strip() or "unknown"
        return Living(f"process {written} of another machine, which holds {lock}", f"kill {written}")
    which = ", ".join(f"{pid} ({command})" for pid, command in found.items())
    what = f"process{'es' * (len(found) > 1)} {which}, which hold{'s' * (len(found) == 1)} {lock}"
    return Living(what, f"kill {' '.join(map(str, found))}")


def everything(folder: Path, results: Path) -> list[Living]:
    """All that is alive of the workflow in `folder`: jobs, and whoever holds locks that they don't explain."""
    return [job.living() for job in slurm_jobs(folder)] or [holder(lock) for lock in list(locks(results))]


def wait_for_jobs(folder: Path, experiment: str, say: Callable[[str], None] = print) -> None:
    """Return when no SLURM job of an earlier run of this experiment is left; says now and then what it waits for.

    A controller that is away for a while ends neither the jobs nor the waiting; Ctrl-C ends the waiting alone.
    """
    jobs, next_line = slurm_jobs(folder, experiment), 0.0
    while jobs:
        if time.monotonic() >= next_line:
            names = ", ".join(f"{job.number} ({job.task}, {job.state.lower()})" for job in jobs)
            say(
                f"{experiment}: an earlier run left SLURM jobs: {names}. Waiting for them, so that nothing is made twice; "
                f"Ctrl-C leaves them alone, `scancel {' '.join(job.number for job in jobs)}` ends them."
            )
            next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        time.sleep(SECONDS_BETWEEN_LOOKS)
        with contextlib.suppress(UserError):
            jobs = slurm_jobs(folder, experiment)

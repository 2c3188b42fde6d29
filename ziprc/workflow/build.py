"""Building experiments through Snakemake, each under a lock that the children inherit.

`build` holds a kernel lock on every experiment that it builds. It is released when the last child dies, so a run that was
killed with all its children leaves nothing to unlock, while a stage left over from a killed run is noticed and named. Under
that lock Snakemake's own lock is not needed. Deleted artifacts are rebuilt first and alone; as their manifests come out the
same, nothing below them reruns.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

from ziprc.errors import UserError
from ziprc.plan.provenance import hand_on_revision
from ziprc.store.files import disk_errors_explained
from ziprc.workflow import living
from ziprc.workflow.call import INTERRUPTED, answer, call_to_the_end, failures, snakemake_command
from ziprc.workflow.targets import RESULTS, look_up


def lock_experiment(home: Path) -> int:
    """An inheritable, kernel-held lock on an experiment; UserError naming the holders when somebody has it."""
    home.mkdir(parents=True, exist_ok=True)
    handle = os.open(home / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        holder = living.holder(home / ".lock")
        raise UserError(
            f"{home} is being built by {holder.what}. Wait for it to end, or stop it (`{holder.stop}`), then run the same "
            "command again."
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def build(options: argparse.Namespace) -> int:
    """Build the targets, or everything of the experiments; the exit code is Snakemake's, or INTERRUPTED."""
    wanted = look_up(options)
    if options.dry_run:
        return subprocess.call(snakemake_command(options, wanted.configs, "--dry-run", *(wanted.targets or ["all"])))
    locks = []
    for layout in wanted.layouts:
        with disk_errors_explained(layout.home):
            locks.append(lock_experiment(layout.home))
            if options.container:
                hand_on_revision(layout)
    for experiment in wanted.configs:
        try:
            living.wait_for_jobs(Path.cwd(), experiment)
        except KeyboardInterrupt:
            print(f"\n{experiment}: stopped waiting; the SLURM jobs go on.")
            return INTERRUPTED
        except UserError as error:
            print(f"{experiment}: whether an earlier run left SLURM jobs is not known. {error}", file=sys.stderr)
    started, names = time.time(), list(wanted.configs)
    for targets in filter(None, [wanted.targets] if wanted.targets else [wanted.missing(), ["all"]]):
        code = call_to_the_end(snakemake_command(options, wanted.configs, "--nolock", *targets), pass_fds=locks)
        if code == INTERRUPTED:
            print(f"\n{', '.join(names)}: stopped by Ctrl-C. Nothing is half-written; the same command goes on.")
        elif code and (failed := list(failures(started, names))):
            print("", *failed, sep="\n\n", file=sys.stderr)
        if code:
            return code
    done = f"up to date: {' '.join(wanted.targets)}"
    if not wanted.targets:
        pages = [str(page) for layout in wanted.layouts if (page := layout.home / "report.html").exists()]
        done = f"everything is up to date; see {', '.join(pages)}"
    print(f"{', '.join(names)}: {done}")
    return 0


def unlock(options: argparse.Namespace) -> str:
    """Remove the locks that a killed Snakemake left in this folder; UserError naming what is still alive."""
    wanted = look_up(options)
    if alive := living.everything(Path.cwd(), RESULTS):
        listing = "\n".join(f"  * {one}" for one in alive)
        raise UserError(
            f"This folder is in use, so its lock stays:\n{listing}\nWait for them, or stop them; then `make unlock` again."
        )
    if not any(path.is_file() for path in Path(".snakemake/locks").glob("*")):
        return "unlock: nothing was locked, and nothing of this workflow is alive in this folder"
    answer(snakemake_command(options, wanted.configs, "--unlock"))
    return "unlock: nothing of this workflow is alive, so Snakemake's lock was removed; the same command goes on"

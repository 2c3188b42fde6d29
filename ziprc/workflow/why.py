"""What would rerun and why, in sentences, from Snakemake's dry run."""

from __future__ import annotations

import argparse
import re
import subprocess

from ziprc.errors import UserError
from ziprc.workflow.build import snakemake_command


def explain(options: argparse.Namespace) -> str:
    """What would rerun and why, one line a job, from Snakemake's dry run."""
    command = snakemake_command(options, "--dry-run", "--nolock", *(options.targets or ["all"]))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"Snakemake could not plan this:\n{(result.stderr or result.stdout)[-2000:]}")
    return explain_plan(result.stdout + result.stderr)


def explain_plan(text: str) -> str:
    """Turn the jobs of a dry run into sentences: what the job makes, and why Snakemake would run it."""
    lines: list[str] = []
    job = ""
    for line in text.splitlines():
        if line.startswith("Job "):
            job = line.split(": ", 1)[-1]
        elif line.startswith("Reason:") and job:
            lines.append(f"* {job}\n    {_plain_reason(line.removeprefix('Reason:'))}")
            job = ""
    if not lines:
        return "Nothing would rerun: everything is up to date."
    return f"{len(lines)} jobs would run:\n\n" + "\n".join(lines)


def _plain_reason(reason: str) -> str:
    plain = reason.strip().replace("Input files updated by another job", "its input is made anew")
    plain = plain.replace("Missing output files", "not there").replace("Updated input files", "its input has changed")
    return re.sub(r"results/[^/]+/", "", plain)

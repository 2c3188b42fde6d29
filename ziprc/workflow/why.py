"""What Snakemake knows about an experiment: what would rerun and why, the graph of its rules, its own report."""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict

from ziprc.store.files import write_text
from ziprc.workflow.call import answer, snakemake_command
from ziprc.workflow.targets import look_up


def explain(options: argparse.Namespace) -> str:
    """What would rerun and why, in sentences, from Snakemake's dry run."""
    wanted = look_up(options)
    command = snakemake_command(options, wanted.configs, "--dry-run", "--nolock", *(wanted.targets or ["all"]))
    return explain_plan("".join(answer(command)))


def explain_plan(text: str) -> str:
    """Turn the jobs of a dry run into a line a stage, and then a sentence a job: what it makes, and why it would run."""
    jobs: list[tuple[str, str]] = []
    job = ""
    for line in text.splitlines():
        if line.startswith("Job "):
            job = line.split(": ", 1)[-1]
        elif line.startswith("Reason:") and job:
            plain = line.removeprefix("Reason:").strip().replace("Missing output files", "not there")
            plain = plain.replace("Input files updated by another job", "its input is made anew")
            plain = plain.replace("Updated input files", "its input has changed")
            jobs.append((job, re.sub(r"results/[^/]+/", "", plain)))
            job = ""
    if not jobs:
        return "Nothing would rerun: everything is up to date."
    stages: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for job, reason in jobs:
        stages[job.partition(":")[0]][reason.partition(":")[0]] += 1
    width, table = max(map(len, stages)), []
    for stage, reasons in stages.items():
        often = (reason if len(reasons) == 1 else f"{reason} ({count})" for reason, count in reasons.items())
        table.append(f"  {stage:{width}}  {reasons.total():3}  {', '.join(often)}")
    details = [f"* {job}\n    {reason}" for job, reason in jobs]
    return "\n".join([f"{len(jobs)} jobs would run:", "", *table, "", *details])


def draw(options: argparse.Namespace) -> str:
    """Write the graph of an experiment's rules as `dag.md`, a Mermaid drawing that GitHub shows."""
    wanted = look_up(options)
    drawing, _ = answer(snakemake_command(options, wanted.configs, "all", "--rulegraph", "mermaid-js"))
    target = wanted.layouts[0].home / "dag.md"
    write_text(target, f"```mermaid\n{drawing.strip()}\n```\n")
    return f"dag: wrote {target}"


def provenance(options: argparse.Namespace) -> str:
    """Let Snakemake write its own report of an experiment, `snakemake.html`."""
    wanted = look_up(options)
    target = wanted.layouts[0].home / "snakemake.html"
    answer(snakemake_command(options, wanted.configs, "all", "--report", str(target)))
    return f"provenance: wrote {target}; open it in a browser"

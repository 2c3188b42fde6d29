"""Headline numbers of several runs side by side (seeds, say), as a Markdown table: the head's, then the sampler's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ziprc.artifacts import read_json
from ziprc.evaluation.pages import as_interval, found

Record = Mapping[str, Any]
VERDICT = {True: "yes", False: "no", None: "cannot be said"}
ABSENT = "–"


def cell(result: Record | float | None) -> str:
    """A value with its interval, if it has one."""
    interval = as_interval(result)
    if interval["value"] is None:
        return ABSENT
    ends = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
    return f"{found(interval['value'])}{ends}"


def headline(home: Path) -> dict[str, Record]:
    """The targets of one run by name; those of adaptive sampling where they were measured."""
    files = [home / "metrics.json", *(path for path in [home / "frontier.json"] if path.exists())]
    return {record["name"]: record for path in files for record in read_json(path)["headline"]}


def summary(homes: Sequence[Path]) -> str:
    """One row per target, one column per run; the last column says in which runs it was met."""
    runs = [headline(home) for home in homes]
    header = ["", "target", *(home.name for home in homes), "met"]
    rows = [header, ["---"] * len(header)]
    for name, first in {name: record for run in reversed(runs) for name, record in run.items()}.items():
        bound = f"{'≥' if first['direction'] == 'at least' else '≤'} {first['target']:.3g}"
        records = [run.get(name) for run in runs]
        values = (cell(record["result"]) if record else ABSENT for record in records)
        met = ", ".join(VERDICT[record["met"]] if record else ABSENT for record in records)
        rows.append([name, bound, *values, met])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

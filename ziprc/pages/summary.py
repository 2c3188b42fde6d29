"""Headline numbers of several runs side by side (seeds, say), as a Markdown table: the head's, then the sampler's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ziprc.errors import UserError
from ziprc.pages.html import as_interval, found
from ziprc.store.files import read_json

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
    files = [path for path in (home / "metrics/zip-rc.json", home / "frontier.json") if path.exists()]
    if not files:
        raise UserError(
            f"{home} holds neither metrics/zip-rc.json nor frontier.json. Build it: `make all EXPERIMENT={home.name}`."
        )
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


def sampling_table(homes: Sequence[Path]) -> str:
    """Accuracy at equal tokens, by budget and run: ours, the published policy, the plain vote, the best competitor."""
    runs = [read_json(path) for home in homes if (path := home / "frontier.json").exists()]
    if not runs:
        return ""
    names = [home.name for home in homes if (home / "frontier.json").exists()]
    header = [
        "samples' worth of tokens",
        *(f"{name}: zip-rc-plus · zip-rc · majority · best other; ours minus it" for name in names),
    ]
    rows = [header, ["---"] * len(header)]
    for budget in sorted(runs[0]["budgets"], key=float):
        rows.append([budget, *(_sampling_cell(run, budget) for run in runs)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _sampling_cell(run: Record, budget: str) -> str:
    differences = run["difference"].get(budget)
    if not differences:
        return ABSENT
    best = min(differences, key=lambda name: differences[name]["value"])
    points = [run["families"][name]["points"].get(budget) for name in ("zip-rc-plus", "zip-rc", "majority", best)]
    shown = " · ".join(found(point["accuracy"]["value"]) if point else ABSENT for point in points)
    return f"{shown} ({best}); {cell(differences[best])}"

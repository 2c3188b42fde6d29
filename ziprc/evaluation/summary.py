"""Headline numbers of several runs side by side (seeds, say), as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ziprc.artifacts import read_json

VERDICT = {True: "yes", False: "no", None: "cannot be said"}


def cell(result: Mapping[str, float | None]) -> str:
    """A value with its interval."""
    if result["value"] is None:
        return "–"
    ends = "" if result["low"] is None else f" [{result['low']:.3f}, {result['high']:.3f}]"
    return f"{result['value']:.3f}{ends}"


def summary(homes: Sequence[Path]) -> str:
    """One row per target, one column per run; the last column says in which runs it was met."""
    runs = [(home.name, read_json(home / "metrics.json")["headline"]) for home in homes]
    header = ["", "target", *(name for name, _ in runs), "met"]
    rows = [header, ["---"] * len(header)]
    for records in zip(*(headline for _, headline in runs), strict=True):
        first = records[0]
        bound = f"{'≥' if first['direction'] == 'at least' else '≤'} {first['target']:g}"
        met = ", ".join(VERDICT[record["met"]] for record in records)
        rows.append([first["name"], bound, *(cell(record["result"]) for record in records), met])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

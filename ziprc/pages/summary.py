"""Headline numbers of several runs side by side (seeds, say), as a Markdown table: the head's, then the sampler's.

Only a run whose experiment is judged by the targets of the toy scale (`evaluate.targets`) gets a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ziprc.errors import UserError
from ziprc.pages.html import Record, as_interval, found
from ziprc.store.files import read_json
from ziprc.store.layout import MANIFEST_SUFFIX, manifest_of

VERDICT = {True: "yes", False: "no", None: "cannot be said"}
ABSENT = "–"


def metrics_of(home: Path) -> list[Path]:
    """The metrics of the systems that a run has built."""
    return sorted(path for path in home.glob("metrics/*.json") if not path.name.endswith(MANIFEST_SUFFIX))


def cell(result: Record | float | None) -> str:
    """A value with its interval, if it has one."""
    interval = as_interval(result)
    if interval["value"] is None:
        return ABSENT
    ends = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
    return f"{found(interval['value'])}{ends}"


def headline(home: Path) -> dict[str, Record]:
    """The headline numbers of one run by name: of every system that it has built, and of adaptive sampling."""
    files = [*metrics_of(home), *(path for path in (home / "frontier.json",) if path.exists())]
    if not files:
        raise UserError(f"{home} holds no metrics. Build it: `make all EXPERIMENT={home.name}`.")
    return {record["name"]: record for path in files for record in read_json(path)["headline"]}


def _judged(manifest: Path) -> bool:
    """Whether targets are for this run, as the params of its metrics say."""
    params = read_json(manifest)["params"] if manifest.exists() else {}
    return bool(params.get("evaluate", {}).get("targets") or params.get("evaluate.targets"))


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def summary(homes: Sequence[Path]) -> str:
    """One row per headline number, one column per run; the target, and in which runs it was met, where one is judged."""
    runs, names = [headline(home) for home in homes], [home.name for home in homes]
    judged = [any(_judged(manifest_of(path)) for path in metrics_of(home)) for home in homes]
    rows = []
    for name, first in {name: record for run in reversed(runs) for name, record in run.items()}.items():
        bound = f"{'≥' if first['direction'] == 'at least' else '≤'} {first['target']:.3g}"
        records = [run.get(name) for run in runs]
        values = [cell(record["result"]) if record else ABSENT for record in records]
        verdicts = [VERDICT[r["met"]] if r and known else ABSENT for r, known in zip(records, judged, strict=True)]
        rows.append([name, bound, *values, ", ".join(verdicts)] if any(judged) else [name, *values])
    return _markdown(["", "target", *names, "met"] if any(judged) else ["", *names], rows)


def sampling_table(homes: Sequence[Path]) -> str:
    """Accuracy at equal tokens, by budget and run: ours, the published policy, the plain vote, the best competitor."""
    files = [home / "frontier.json" for home in homes]
    runs = [(path.parent.name, read_json(path)) for path in files if path.exists()]
    if not runs:
        return ""
    what = "zip-rc-plus · zip-rc · majority · best other; ours minus it"
    budgets = sorted(runs[0][1]["budgets"], key=float)
    rows = [[budget, *(_sampling_cell(run, budget) for _, run in runs)] for budget in budgets]
    return _markdown(["samples' worth of tokens", *(f"{name}: {what}" for name, _ in runs)], rows)


def _sampling_cell(run: Record, budget: str) -> str:
    differences = run["difference"].get(budget)
    if not differences:
        return ABSENT
    best = min(differences, key=lambda name: differences[name]["value"])
    points = [run["families"][name]["points"].get(budget) for name in ("zip-rc-plus", "zip-rc", "majority", best)]
    shown = " · ".join(found(point["accuracy"]["value"]) if point else ABSENT for point in points)
    return f"{shown} ({best}); {cell(differences[best])}"

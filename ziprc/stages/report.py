"""report: the page results/<experiment>/report.html, from metrics.json, frontier.json, live samples, manifests, provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ziprc.artifacts import read_json, write_text
from ziprc.config import Evaluate
from ziprc.evaluation.dag import read_graph
from ziprc.evaluation.decisions import live_record
from ziprc.evaluation.inspection import load_rollouts
from ziprc.evaluation.report import Page, read_costs, render
from ziprc.schemas import read_table
from ziprc.stages.context import Context, run_stage


def live(samples: Path, own: Evaluate) -> dict[str, Any]:
    """What a live run showed, by budget; its wall-clock times, where they lie beside the table, are no artifact."""
    timing = samples.with_suffix(".timing.json")
    times = read_json(timing) if timing.exists() else {}
    return live_record(read_table(samples, "samples"), times, own.bootstrap, own.confidence)


def run(context: Context) -> str:
    config, layout = context.config, context.layout
    target, metrics, frontier = (layout.home / name for name in ("report.html", "metrics.json", "frontier.json"))
    samples = {policy: layout.table("samples", policy) for policy in config.samples.policies}
    shown = config.report.rollouts_shown
    page = Page(
        metrics=read_json(metrics),
        config=config.model_dump(mode="json"),
        graph=read_graph(layout),
        costs=read_costs(layout.home / "provenance"),
        rollouts=load_rollouts(layout, "ziprc", shown) if shown else (),
        sampling=read_json(frontier),
        live={policy: live(path, config.evaluate) for policy, path in samples.items()},
    )
    write_text(target, render(page))
    context.write_manifest("report")
    return f"wrote {target}"


if __name__ == "__main__":
    run_stage("report", run)

"""report: the page results/<experiment>/report.html, from the metrics, frontier.json, live samples, manifests, provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ziprc.config.shared import Evaluate
from ziprc.evaluation.samplers.decisions import live_record
from ziprc.pages.dag import read_graph
from ziprc.pages.inspect import load_rollouts
from ziprc.pages.report import Page, read_costs, render
from ziprc.stages.context import Context, run_stage
from ziprc.store.files import read_json, write_text
from ziprc.tables.samples import SAMPLES


def live(samples: Path, own: Evaluate) -> dict[str, Any]:
    """What a live run showed, by budget; its wall-clock times, where they lie beside the table, are no artifact."""
    timing = samples.with_suffix(".timing.json")
    times = read_json(timing) if timing.exists() else {}
    return live_record(SAMPLES.read(samples), times, own.bootstrap, own.confidence)


def run(context: Context) -> str:
    config, layout, reads = context.config, context.graph.layout, context.reads
    shown = config.report.rollouts_shown
    page = Page(
        metrics=read_json(reads["metrics/zip-rc"]),
        config=context.params,
        graph=read_graph(layout),
        costs=read_costs(layout.home / "provenance"),
        rollouts=load_rollouts(layout, "ziprc", shown) if shown else (),
        sampling=read_json(reads["frontier"]),
        live={policy: live(reads[f"samples/{policy}"], config.evaluate) for policy in config.samples.policies},
    )
    write_text(context.target, render(page))
    context.write_manifest()
    return f"wrote {context.target}"


if __name__ == "__main__":
    run_stage("report", run)

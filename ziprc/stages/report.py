"""report: the page results/<experiment>/report.html, from metrics.json, the manifests and the benchmark files."""

from __future__ import annotations

from ziprc.artifacts import output_lock, read_json, write_manifest, write_text
from ziprc.config import params_of
from ziprc.evaluation.dag import read_graph
from ziprc.evaluation.inspection import load_rollouts
from ziprc.evaluation.report import Page, read_benchmarks, render
from ziprc.stages.context import Context, run_stage


def run(context: Context) -> str:
    config, layout = context.config, context.layout
    target, metrics = layout.home / "report.html", layout.home / "metrics.json"
    shown = config.report.rollouts_shown
    page = Page(
        metrics=read_json(metrics),
        config=config.model_dump(mode="json"),
        graph=read_graph(layout),
        benchmarks=read_benchmarks(layout.home / "benchmarks"),
        rollouts=load_rollouts(layout, "ziprc", shown) if shown else (),
    )
    with output_lock(target):
        write_text(target, render(page))
        tables = [("introspection", "ziprc"), ("rollouts", "test"), ("grades", "test"), ("prompts", "test")]
        parents = {"metrics": metrics} | {f"{kind}/{name}": layout.table(kind, name) for kind, name in tables}
        write_manifest(target, params_of(config, "report", context.name), parents)
    return f"wrote {target}"


if __name__ == "__main__":
    run_stage("report", run)

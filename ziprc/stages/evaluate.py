"""evaluate: what the numbers of a system mean, in results/<experiment>/metrics/<system>.json.

Held-out prompts only; every number with a bootstrap interval over prompts. Each system has a module that makes its record
(`System.evaluation`; for ZIP-RC evaluation/head/record.py).
"""

from __future__ import annotations

import importlib

from ziprc.stages.context import Context, run_stage
from ziprc.store.files import write_json


def run(context: Context) -> str:
    """Write the system's metrics; the closing line."""
    metrics = importlib.import_module(context.variant.evaluation).metrics(context.config, context.reads)
    write_json(context.target, {"experiment": context.graph.layout.experiment} | metrics)
    context.write_manifest()
    met, prompts = [record["met"] for record in metrics["headline"]], metrics["counts"]["prompts"]["test"]
    found = f"{len(met)} headline numbers"
    if context.config.evaluate.targets:
        found = f"{sum(map(bool, met))} of {len(met)} targets met"
    return f"wrote {context.target}: {found} on {prompts} held-out prompts"


if __name__ == "__main__":
    run_stage("evaluate", run)

"""evaluate: what the numbers mean, in results/<experiment>/metrics.json (records: evaluation/metrics.py).

Held-out prompts only; every number with a bootstrap interval over prompts. Predictors are compared on the same rollouts
at the start, 25, 50, 75 % and the end; at the end a joint head's expected reward is the mean over its last states.
"""

from __future__ import annotations

from ziprc.evaluation.head.record import Evaluation
from ziprc.stages.context import Context, run_stage
from ziprc.store.files import write_json


def run(context: Context) -> str:
    target = context.layout.home / "metrics.json"
    evaluation = Evaluation(context.config, context.layout)
    metrics = evaluation.metrics()
    write_json(target, metrics)
    context.write_manifest("evaluate")
    met = [record["met"] for record in metrics["headline"]]
    return (
        f"wrote {target}: {sum(map(bool, met))} of {len(met)} targets met on {evaluation.boot.prompts} held-out prompts"
    )


if __name__ == "__main__":
    run_stage("evaluate", run)

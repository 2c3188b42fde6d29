"""baselines: what honest competitors predict for the test rollouts (evaluation/head/probes.py says which and why).

They are fitted on rollouts/train and grades/train with the frozen base model, the same rollouts the joint head learns
from.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ziprc.evaluation.head.probes import all_predictions, collect
from ziprc.evaluation.outcomes import join_outcomes
from ziprc.joint.tokenizer import text_ids
from ziprc.reading.states import load_for_reading
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.tables.baselines import BASELINES
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS

TORCH_SEEDS = 2**32


def run(context: Context) -> str:
    """Fit the competitors on training rollouts and read them at every moment of the test rollouts; the closing line."""
    config, own, sources = context.config, context.config.baselines, context.reads
    rollouts, test = (ROLLOUTS.read(sources[split]) for split in ("train", "test"))
    known = join_outcomes(rollouts, GRADES.read(sources["grades"]), str(sources["grades"]))
    model, rows = load_for_reading(sources["base"]), max(text_ids(sources["base"])) + 1
    seen = collect(model, rows, rollouts.take(pa.array(known.rows)), own.window, config.runtime)
    asked = collect(model, rows, test, own.window, config.runtime)
    seed = derived_seed(config.seed, "baselines") % TORCH_SEEDS
    ids = test["rollout_id"].combine_chunks()
    table = pa.concat_tables(
        BASELINES.make(
            {
                "rollout_id": ids,
                "predictor": pa.repeat(predictor, len(ids)),
                "moment": pa.repeat(moment, len(ids)),
                "expected_reward": np.clip(values, 0.0, 1.0).astype(np.float32),
            }
        )
        for (predictor, moment), values in all_predictions(seen, known.score, known.group, asked, own, seed).items()
    )
    context.write(BASELINES, table)
    return f"wrote {table.num_rows} predictions for {test.num_rows} rollouts to {context.target}"


if __name__ == "__main__":
    run_stage("baselines", run)

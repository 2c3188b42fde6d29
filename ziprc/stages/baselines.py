"""baselines: what honest competitors predict for the test rollouts (evaluation/probes.py says which and why).

They are fitted on rollouts/train and grades/train with the frozen base model, the same rollouts the joint head learns
from.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from ziprc.config.load import Config
from ziprc.evaluation.head.metrics import Predictions
from ziprc.evaluation.head.probes import MomentData, ProbeSettings, all_predictions, collect
from ziprc.evaluation.outcomes import join_outcomes, moment_positions, response_lengths
from ziprc.joint.tokenizer import text_ids
from ziprc.progress import progress
from ziprc.reading.logits import TokenScores, token_scores
from ziprc.reading.states import load_for_reading, token_pairs
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.tables.baselines import BASELINES
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS

TORCH_SEEDS = 2**32


def moment_data(model: PreTrainedModel, rows: int, rollouts: pa.Table, config: Config) -> MomentData:
    """Features of all rollouts at their moments, from one pass of the frozen base model."""
    pairs, positions = token_pairs(rollouts), moment_positions(response_lengths(rollouts))
    with progress(len(pairs), "baselines", "rollouts") as bar:

        def counted() -> Iterator[tuple[int, TokenScores]]:
            for item in token_scores(model, rows, pairs, config.runtime.forward_tokens, config.runtime.position_chunk):
                yield item
                bar.update(1)

        return collect(counted(), positions, config.baselines.window, model.config.hidden_size)


def prediction_table(ids: pa.Array, predictions: Predictions) -> pa.Table:
    """One row per rollout, predictor and moment."""
    return pa.concat_tables(
        BASELINES.make(
            {
                "rollout_id": ids,
                "predictor": pa.repeat(predictor, len(ids)),
                "moment": pa.repeat(moment, len(ids)),
                "expected_reward": np.clip(values, 0.0, 1.0).astype(np.float32),
            }
        )
        for (predictor, moment), values in predictions.items()
    )


def run(context: Context) -> str:
    config, sources = context.config, context.reads
    base = sources["base"]
    rollouts, test = (ROLLOUTS.read(sources[split]) for split in ("train", "test"))
    known = join_outcomes(rollouts, GRADES.read(sources["grades"]), str(sources["grades"]))
    model, rows = load_for_reading(base), max(text_ids(base)) + 1
    seen = moment_data(model, rows, rollouts.take(pa.array(known.rows)), config)
    asked = moment_data(model, rows, test, config)
    seed = derived_seed(config.seed, "baselines") % TORCH_SEEDS
    settings = ProbeSettings(config.baselines.probe_hidden, config.baselines.probe_epochs, seed)
    predictions = all_predictions(seen, known.score, known.group, asked, settings)
    table = prediction_table(test["rollout_id"].combine_chunks(), predictions)
    context.write(BASELINES, table)
    return f"wrote {table.num_rows} predictions for {test.num_rows} rollouts to {context.target}"


if __name__ == "__main__":
    run_stage("baselines", run)

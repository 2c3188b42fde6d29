"""values: a critic's expected score for every rollout of `train` or `test-many`.

The value is the mean expected score over the last `values.last_k` labelled states. Critics are cross-fitted: a rollout
of a training prompt is scored by the critic of its own fold, which never saw that prompt (`folds: 1` is the published
way, in sample). Other splits are new to every critic, so their mean speaks (critic "mean", fold -1). Unfinished
rollouts are scored like any other; what their label becomes is `train_joint.ziprc.unfinished`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ziprc.joint.distribution import JointDistribution
from ziprc.progress import progress
from ziprc.reading.states import JointReader, pieces, token_pairs
from ziprc.stages.context import Context, run_stage
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.values import VALUES
from ziprc.training.data import prompt_fold


def score_rollouts(reader: JointReader, rollouts: pa.Table, last_k: int, token_budget: int) -> NDArray[np.float64]:
    """[n] mean expected reward over the last `last_k` labelled states."""
    values = []
    with progress(rollouts.num_rows, "values", "rollouts") as bar:
        for piece in pieces(rollouts):
            for joint in reader.joints(token_pairs(piece), token_budget):
                tail = JointDistribution(reader.joint.grid, joint[-last_k:])
                values.append(float(np.clip(tail.expected_reward().mean(), 0.0, 1.0)))
            bar.update(piece.num_rows)
    return np.array(values)


def run(context: Context) -> str:
    config, cross_fitted = context.config, context.variant.cross_fitted
    rollouts = ROLLOUTS.read(context.reads["rollouts"])
    names = [role for role in context.reads if role != "rollouts"]
    fold = np.full(rollouts.num_rows, -1, dtype=np.int32)
    if cross_fitted:
        fold = np.array(
            [prompt_fold(p, config.values.folds) for p in rollouts["prompt_id"].to_pylist()], dtype=np.int32
        )
    value = np.zeros(rollouts.num_rows)
    for i, name in enumerate(names):
        reader = JointReader.open(context.reads[name])
        rows = np.flatnonzero(fold == i) if cross_fitted else np.arange(rollouts.num_rows)
        scores = score_rollouts(
            reader, rollouts.take(pa.array(rows)), config.values.last_k, config.runtime.forward_tokens
        )
        value[rows] += scores if cross_fitted else scores / len(names)
    columns = {
        "rollout_id": rollouts["rollout_id"],
        "critic": [names[f] if cross_fitted else "mean" for f in fold.tolist()],
        "fold": fold,
        "value": np.clip(value, 0.0, 1.0).astype(np.float32),
    }
    context.write(VALUES, VALUES.make(columns))
    return f"wrote {len(value)} values, mean {value.mean():.3f}, to {context.target}"


if __name__ == "__main__":
    run_stage("values", run)

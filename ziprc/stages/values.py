"""values: a critic's expected score for every rollout of `train` or `test-many`.

The value is the mean expected score over the last `values.last_k` labelled states. Critics are cross-fitted: a rollout
of a training prompt is scored by the critic of its own fold, which never saw that prompt (`folds: 1` is the published
way, in sample). Other splits are new to every critic, so their mean speaks (critic "mean", fold -1). Unfinished
rollouts are scored like any other; what their label becomes is `train_joint.ziprc.unfinished`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.config.load import Config
from ziprc.joint.distribution import JointDistribution
from ziprc.progress import progress
from ziprc.reading.states import JointReader, token_pairs, token_ranges
from ziprc.stages.context import Context, run_stage
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.values import VALUES
from ziprc.training.data import prompt_fold


def score_rollouts(reader: JointReader, rollouts: pa.Table, last_k: int, token_budget: int) -> NDArray[np.float64]:
    """[n] mean expected reward over the last `last_k` labelled states."""
    joints = reader.joints(token_pairs(rollouts), token_budget)
    tails = [JointDistribution(reader.joint.grid, joint[-last_k:]).expected_reward().mean() for joint in joints]
    return np.clip(np.array(tails, dtype=np.float64), 0.0, 1.0)


def values_of(rollouts: pa.Table, readers: Mapping[str, JointReader], config: Config, cross_fitted: bool) -> pa.Table:
    """Rows of the values table for some rollouts."""
    own, names, n = config.values, list(readers), rollouts.num_rows
    fold = np.full(n, -1, dtype=np.int32)
    if cross_fitted:
        fold[:] = [prompt_fold(prompt, own.folds) for prompt in rollouts["prompt_id"].to_pylist()]
    value = np.zeros(n)
    for i, reader in enumerate(readers.values()):
        rows = np.flatnonzero(fold == i) if cross_fitted else np.arange(n)
        if len(rows):
            scores = score_rollouts(reader, rollouts.take(pa.array(rows)), own.last_k, config.runtime.forward_tokens)
            value[rows] += scores if cross_fitted else scores / len(names)
    return VALUES.make(
        {
            "rollout_id": rollouts["rollout_id"],
            "critic": [names[f] if cross_fitted else "mean" for f in fold.tolist()],
            "fold": fold,
            "value": np.clip(value, 0.0, 1.0).astype(np.float32),
        }
    )


def run(context: Context) -> str:
    """Let the critics value every rollout and write the table; the closing line."""
    reads = context.reads
    rollouts = ROLLOUTS.read(reads["rollouts"])
    pieces = context.pieces(VALUES, token_ranges(rollouts))
    if missing := {number: rollouts.slice(a, b - a) for number in pieces.missing() for a, b in [pieces.parts[number]]}:
        readers = {role: JointReader.open(path) for role, path in reads.items() if role != "rollouts"}
        with progress(sum(map(len, missing.values())), f"values {context.name}", "rollouts") as bar:
            for number, part in missing.items():
                pieces.write(number, values_of(part, readers, context.config, context.variant.cross_fitted))
                bar.update(len(part))
    pieces.merge(context.target)
    context.write_manifest()
    pieces.remove()
    mean = pc.mean(VALUES.read(context.target)["value"]).as_py()
    return f"wrote {len(rollouts)} values, mean {mean:.3f}, to {context.target}"


if __name__ == "__main__":
    run_stage("values", run)

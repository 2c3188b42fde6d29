"""What a checkpoint says at every labelled state of a rollout."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.tables.check import TEXT, TableSchema, column


def _log_prob_and_entropy_in_range(table: pa.Table) -> tuple[str, pa.Array, str]:
    log_prob, entropy = table["log_prob"], table["entropy"]
    bad = pc.invert(pc.and_(pc.is_finite(log_prob), pc.less_equal(log_prob, 0.0)))
    if pc.any(bad).as_py():
        return "log_prob", bad, "a log-probability is finite and at most 0"
    bad = pc.invert(pc.and_(pc.is_finite(entropy), pc.greater_equal(entropy, 0.0)))
    return "entropy", bad, "an entropy is finite and at least 0"


INTROSPECTION = TableSchema(
    "introspection",
    pa.schema(
        [
            column("rollout_id", TEXT),
            column("position", pa.int32()),
            column("expected_reward", pa.float32()),
            column("expected_remaining", pa.float32()),
            column("log_prob", pa.float32()),
            column("entropy", pa.float32()),
            column("joint", pa.large_list(pa.float16())),
        ]
    ),
    key=("rollout_id", "position"),
    unit_range=("expected_reward",),
    rule=_log_prob_and_entropy_in_range,
)

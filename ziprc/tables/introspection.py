"""What a checkpoint says at every labelled state of a rollout."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.tables.check import TEXT, TableSchema, column, columns


def _log_prob_and_entropy_in_range(table: pa.Table) -> tuple[str, pa.Array, str]:
    bad = pc.invert(pc.and_(pc.is_finite(table["log_prob"]), pc.less_equal(table["log_prob"], 0.0)))
    if pc.any(bad).as_py():
        return "log_prob", bad, "a log-probability is finite and at most 0"
    bad = pc.invert(pc.and_(pc.is_finite(table["entropy"]), pc.greater_equal(table["entropy"], 0.0)))
    return "entropy", bad, "an entropy is finite and at least 0"


INTROSPECTION = TableSchema(
    "introspection",
    pa.schema(
        [
            column("rollout_id", TEXT),
            column("position", pa.int32()),
            *columns(pa.float32(), "expected_reward", "expected_remaining", "log_prob", "entropy"),
            column("joint", pa.large_list(pa.float16())),
        ]
    ),
    key=("rollout_id", "position"),
    unit_range=("expected_reward",),
    rule=_log_prob_and_entropy_in_range,
)

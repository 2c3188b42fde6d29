"""What honest competitors predict for a rollout at five moments."""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column, columns

BASELINES = TableSchema(
    "baselines",
    pa.schema([*columns(TEXT, "rollout_id", "predictor", "moment"), column("expected_reward", pa.float32())]),
    key=("rollout_id", "predictor", "moment"),
    unit_range=("expected_reward",),
)

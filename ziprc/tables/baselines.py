"""What honest competitors predict for a rollout at five moments."""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column

BASELINES = TableSchema(
    "baselines",
    pa.schema(
        [
            column("rollout_id", TEXT),
            column("predictor", TEXT),
            column("moment", TEXT),
            column("expected_reward", pa.float32()),
        ]
    ),
    key=("rollout_id", "predictor", "moment"),
    unit_range=("expected_reward",),
)

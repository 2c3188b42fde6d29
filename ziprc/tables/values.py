"""A critic's expected score of a whole rollout."""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column, columns

VALUES = TableSchema(
    "values",
    pa.schema([*columns(TEXT, "rollout_id", "critic"), column("fold", pa.int32()), column("value", pa.float32())]),
    key=("rollout_id",),
    unit_range=("value",),
)

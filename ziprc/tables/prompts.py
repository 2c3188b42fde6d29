"""What is asked: a row is one prompt of one split."""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column

MESSAGES = pa.large_list(pa.struct([("role", TEXT), ("content", TEXT)]))

PROMPTS = TableSchema(
    "prompts",
    pa.schema(
        [
            column("prompt_id", TEXT),
            column("task", TEXT),
            column("source", TEXT),
            column("split", TEXT),
            column("messages", MESSAGES),
            column("answer", TEXT, null=True),
            column("difficulty", TEXT),
            column("extra", TEXT),
        ]
    ),
    key=("prompt_id",),
)

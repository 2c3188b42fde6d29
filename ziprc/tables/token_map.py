"""What the copies of a reasoning vocabulary are: one row a copy, in the checkpoint that has them."""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column, columns

TOKEN_MAP = TableSchema(
    "token_map",
    pa.schema(
        [
            *columns(pa.int64(), "reasoning_id", "source_id", "multiplicity"),  # multiplicity: 1 is the first copy
            column("text", TEXT),  # of the source, as the tokenizer writes it
        ]
    ),
    key=("reasoning_id",),
)

"""Responses that a critic has guided: the columns of rollouts, and how far each was led away."""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TableSchema, column
from ziprc.tables.rollouts import ROLLOUTS

GUIDED = TableSchema(
    "guided",
    pa.schema([*ROLLOUTS.columns, column("kl", pa.float32())]),  # nats, over the response, of the law that was sampled
    key=ROLLOUTS.key,
    choices=ROLLOUTS.choices,
    rule=ROLLOUTS.rule,
)

"""Facts about sampled responses: what was asked, what came out, why it ended."""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.tables.check import TEXT, TOKENS, TableSchema, column, columns


class FinishReason(StrEnum):
    """Why a response ended, as the engine reported it."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


def _response_not_empty(table: pa.Table) -> tuple[str, pa.Array, str]:
    bad = pc.less(pc.list_value_length(table["response_token_ids"]), 1)
    return "response_token_ids", bad, "a response has at least one token"


ROLLOUTS = TableSchema(
    "rollouts",
    pa.schema(
        [
            *columns(TEXT, "rollout_id", "prompt_id"),
            column("sample_index", pa.int32()),
            column("seed", pa.int64()),
            *columns(TOKENS, "prompt_token_ids", "response_token_ids"),
            *columns(TEXT, "response_text", "finish_reason"),
            column("thinking", pa.bool_()),
            column("policy", TEXT),
        ]
    ),
    key=("rollout_id",),
    choices={"finish_reason": tuple(FinishReason)},
    rule=_response_not_empty,
)

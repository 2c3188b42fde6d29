"""Decisions of live runs: a row is one branch at one decision, and one more for a prompt that failed.

The row of a failed prompt has the action `failed`, no branch (-1), the error, and what had been spent until then. `lost`
are tokens of an attempt that went down with the engine, also of a prompt that was answered afterwards.
"""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column, columns
from ziprc.tables.grades import GradeStatus

SAMPLES = TableSchema(
    "samples",
    pa.schema(
        [
            *columns(TEXT, "prompt_id", "policy", "budget"),
            *columns(pa.int32(), "decision", "step", "branch_id", "parent", "fork", "length"),
            *columns(TEXT, "status", "action"),
            *columns(pa.float32(), "expected_reward", "expected_remaining", null=True),
            column("tokens_spent", pa.int32()),
            column("utility", pa.float32(), null=True),
            column("signals", pa.large_list(pa.float32())),
            column("answer_number", pa.int32()),
            column("spot", pa.int32(), null=True),
            column("spot_signals", pa.large_list(pa.float32()), null=True),
            column("selected", pa.bool_()),
            *columns(TEXT, "answer", "grade_status", null=True),
            *columns(pa.float32(), "score", "probability", null=True),
            column("prefill", pa.int32(), null=True),
            column("error", TEXT, null=True),
            column("lost", pa.int32(), null=True),
        ]
    ),
    key=("prompt_id", "budget", "decision", "branch_id"),
    unit_range=("expected_reward", "score", "probability"),
    choices={
        "status": ("running", "paused", "finished", "failed"),
        "action": ("start", "branch", "continue", "pause", "resume", "wait", "done", "stop", "failed"),
        "grade_status": tuple(GradeStatus),
    },
)

"""Decisions of live runs: a row is one branch at one decision, and one more for a prompt that failed.

The row of a failed prompt has the action `failed`, no branch (-1), the error, and what had been spent until then. `lost`
are tokens of an attempt that went down with the engine, also of a prompt that was answered afterwards.
"""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column
from ziprc.tables.grades import GradeStatus

SAMPLES = TableSchema(
    "samples",
    pa.schema(
        [
            column("prompt_id", TEXT),
            column("policy", TEXT),
            column("budget", TEXT),
            column("decision", pa.int32()),
            column("step", pa.int32()),
            column("branch_id", pa.int32()),
            column("parent", pa.int32()),
            column("fork", pa.int32()),
            column("length", pa.int32()),
            column("status", TEXT),
            column("action", TEXT),
            column("expected_reward", pa.float32(), null=True),
            column("expected_remaining", pa.float32(), null=True),
            column("tokens_spent", pa.int32()),
            column("utility", pa.float32(), null=True),
            column("signals", pa.large_list(pa.float32())),
            column("answer_number", pa.int32()),
            column("spot", pa.int32(), null=True),
            column("spot_signals", pa.large_list(pa.float32()), null=True),
            column("selected", pa.bool_()),
            column("answer", TEXT, null=True),
            column("grade_status", TEXT, null=True),
            column("score", pa.float32(), null=True),
            column("probability", pa.float32(), null=True),
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

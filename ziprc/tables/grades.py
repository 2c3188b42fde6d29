"""Graders' verdicts on responses: a score, or the reason why there is none."""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.tables.check import TEXT, TableSchema, column


class GradeStatus(StrEnum):
    """Whether a grade has a score, or the reason why it has none."""

    GRADED = "graded"
    UNFINISHED = "unfinished"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    ERROR = "error"


def _score_matches_status(table: pa.Table) -> tuple[str, pa.Array, str]:
    graded = pc.equal(table["status"], GradeStatus.GRADED.value)
    bad = pc.not_equal(pc.is_valid(table["score"]), graded)
    return "score", bad, "score must be null exactly when status is not 'graded'"


GRADES = TableSchema(
    "grades",
    pa.schema(
        [
            column("rollout_id", TEXT),
            column("grader", TEXT),
            column("score", pa.float32(), null=True),
            column("status", TEXT),
            column("extracted_answer", TEXT, null=True),
            column("rationale", TEXT, null=True),
        ]
    ),
    key=("rollout_id",),
    unit_range=("score",),
    choices={"status": tuple(GradeStatus)},
    rule=_score_matches_status,
)

"""Graders' verdicts on responses: a score, or the reason why there is none.

`grader` is who decided: of rule and judge, the one whose verdict stands. Several graders may stand side by side, each in
rows of its own; who joins on the rollout alone asks for `one_a_rollout`. `parts` is JSON text, points by criterion.
"""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.errors import UserError
from ziprc.tables.check import TEXT, TableSchema, column, columns


class GradeStatus(StrEnum):
    """Whether a grade has a score, or the reason why it has none."""

    GRADED = "graded"
    UNFINISHED = "unfinished"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    ERROR = "error"
    UNSCORED = "unscored"  # the server of a grader failed: nothing is known of the response


def _score_matches_status(table: pa.Table) -> tuple[str, pa.Array, str]:
    graded = pc.equal(table["status"], GradeStatus.GRADED.value)
    bad = pc.not_equal(pc.is_valid(table["score"]), graded)
    return "score", bad, "score must be null exactly when status is not 'graded'"


GRADES = TableSchema(
    "grades",
    pa.schema(
        [
            *columns(TEXT, "rollout_id", "grader"),
            column("score", pa.float32(), null=True),
            column("status", TEXT),
            *columns(TEXT, "extracted_answer", "rationale", "parts", null=True),
        ]
    ),
    key=("rollout_id", "grader"),
    unit_range=("score",),
    choices={"status": tuple(GradeStatus)},
    rule=_score_matches_status,
)


def one_a_rollout(table: pa.Table, where: str) -> None:
    """UserError when a rollout has several rows in `table`, of which a join on `rollout_id` would take any."""
    counts = table.group_by("rollout_id").aggregate([([], "count_all")])
    several = counts.filter(pc.greater(counts["count_all"], 1))
    if several.num_rows:
        graders = sorted(pc.unique(table["grader"]).to_pylist()) if "grader" in table.column_names else []
        who = f" by {', '.join(graders)}" if graders else ""
        raise UserError(
            f"{where}: column 'rollout_id': {several.num_rows} rollouts have more than one row{who}, for example "
            f"{several['rollout_id'][0].as_py()}. One is expected: keep the rows of one grader in a table."
        )

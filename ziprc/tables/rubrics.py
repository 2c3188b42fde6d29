"""What full marks are given for: one rubric a prompt.

`rubric` is JSON text, a list of items (`name`, whole `points`, `requirement`), or null where the rubric is running text alone;
`text` is what a grader reads. A rubric that is not `valid` says why in `problem`, and nobody is graded by it.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.tables.check import TEXT, TableSchema, column


def _problem_matches_valid(table: pa.Table) -> tuple[str, pa.Array, str]:
    bad = pc.equal(pc.is_valid(table["problem"]), table["valid"])
    return "problem", bad, "problem must be null exactly when the rubric is valid"


RUBRICS = TableSchema(
    "rubrics",
    pa.schema(
        [
            column("prompt_id", TEXT),
            column("rubric", TEXT, null=True),
            column("text", TEXT),
            column("valid", pa.bool_()),
            column("problem", TEXT, null=True),
        ]
    ),
    key=("prompt_id",),
    rule=_problem_matches_valid,
)

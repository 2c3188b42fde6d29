"""The tables of the project: columns, keys, ranges and null rules, checked on every write and every read.

Tables are never edited; a later stage adds a narrow table that joins on `rollout_id`. Facts are stored once (token
ids as int32), views such as label positions and lengths are derived. A failed check names file, column and first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ziprc.artifacts import atomic_path
from ziprc.errors import UserError

TOKENS = pa.list_(pa.int32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
FIRST_BAD_ROWS = 5


class FinishReason(StrEnum):
    """Why a response ended, as the engine reported it."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class GradeStatus(StrEnum):
    """Whether a grade has a score, or the reason why it has none."""

    GRADED = "graded"
    UNFINISHED = "unfinished"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class TableSchema:
    """Arrow schema plus the rules that Arrow cannot express."""

    name: str
    columns: pa.Schema
    key: tuple[str, ...]
    unit_range: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rule: Callable[[pa.Table], tuple[str, pa.Array, str] | None] | None = None


def _column(name: str, kind: pa.DataType, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null)


def _score_matches_status(table: pa.Table) -> tuple[str, pa.Array, str]:
    graded = pc.equal(table["status"], GradeStatus.GRADED.value)
    bad = pc.not_equal(pc.is_valid(table["score"]), graded)
    return "score", bad, "score must be null exactly when status is not 'graded'"


def _response_not_empty(table: pa.Table) -> tuple[str, pa.Array, str]:
    bad = pc.less(pc.list_value_length(table["response_token_ids"]), 1)
    return "response_token_ids", bad, "a response has at least one token"


def _log_prob_and_entropy_in_range(table: pa.Table) -> tuple[str, pa.Array, str]:
    log_prob, entropy = table["log_prob"], table["entropy"]
    bad = pc.invert(pc.and_(pc.is_finite(log_prob), pc.less_equal(log_prob, 0.0)))
    if pc.any(bad).as_py():
        return "log_prob", bad, "a log-probability is finite and at most 0"
    bad = pc.invert(pc.and_(pc.is_finite(entropy), pc.greater_equal(entropy, 0.0)))
    return "entropy", bad, "an entropy is finite and at least 0"


SCHEMAS: dict[str, TableSchema] = {
    schema.name: schema
    for schema in (
        TableSchema(
            "prompts",
            pa.schema(
                [
                    _column("prompt_id", pa.string()),
                    _column("task", pa.string()),
                    _column("source", pa.string()),
                    _column("split", pa.string()),
                    _column("messages", MESSAGES),
                    _column("answer", pa.string(), null=True),
                    _column("difficulty", pa.string()),
                    _column("extra", pa.string()),
                ]
            ),
            key=("prompt_id",),
        ),
        TableSchema(
            "rollouts",
            pa.schema(
                [
                    _column("rollout_id", pa.string()),
                    _column("prompt_id", pa.string()),
                    _column("sample_index", pa.int32()),
                    _column("seed", pa.int64()),
                    _column("prompt_token_ids", TOKENS),
                    _column("response_token_ids", TOKENS),
                    _column("response_text", pa.string()),
                    _column("finish_reason", pa.string()),
                    _column("thinking", pa.bool_()),
                    _column("policy", pa.string()),
                ]
            ),
            key=("rollout_id",),
            choices={"finish_reason": tuple(FinishReason)},
            rule=_response_not_empty,
        ),
        TableSchema(
            "grades",
            pa.schema(
                [
                    _column("rollout_id", pa.string()),
                    _column("grader", pa.string()),
                    _column("score", pa.float32(), null=True),
                    _column("status", pa.string()),
                    _column("extracted_answer", pa.string(), null=True),
                    _column("rationale", pa.string(), null=True),
                ]
            ),
            key=("rollout_id",),
            unit_range=("score",),
            choices={"status": tuple(GradeStatus)},
            rule=_score_matches_status,
        ),
        TableSchema(
            "values",
            pa.schema(
                [
                    _column("rollout_id", pa.string()),
                    _column("critic", pa.string()),
                    _column("fold", pa.int32()),
                    _column("value", pa.float32()),
                ]
            ),
            key=("rollout_id",),
            unit_range=("value",),
        ),
        TableSchema(
            "introspection",
            pa.schema(
                [
                    _column("rollout_id", pa.string()),
                    _column("position", pa.int32()),
                    _column("expected_reward", pa.float32()),
                    _column("expected_remaining", pa.float32()),
                    _column("log_prob", pa.float32()),
                    _column("entropy", pa.float32()),
                    _column("joint", pa.list_(pa.float16())),
                ]
            ),
            key=("rollout_id", "position"),
            unit_range=("expected_reward",),
            rule=_log_prob_and_entropy_in_range,
        ),
        TableSchema(
            "samples",
            pa.schema(
                [
                    _column("prompt_id", pa.string()),
                    _column("policy", pa.string()),
                    _column("budget", pa.string()),
                    _column("decision", pa.int32()),
                    _column("step", pa.int32()),
                    _column("branch_id", pa.int32()),
                    _column("parent", pa.int32()),
                    _column("fork", pa.int32()),
                    _column("length", pa.int32()),
                    _column("status", pa.string()),
                    _column("action", pa.string()),
                    _column("expected_reward", pa.float32(), null=True),
                    _column("expected_remaining", pa.float32(), null=True),
                    _column("tokens_spent", pa.int32()),
                    _column("utility", pa.float32(), null=True),
                    _column("signals", pa.list_(pa.float32())),
                    _column("answer_number", pa.int32()),
                    _column("spot", pa.int32(), null=True),
                    _column("spot_signals", pa.list_(pa.float32()), null=True),
                    _column("selected", pa.bool_()),
                    _column("answer", pa.string(), null=True),
                    _column("score", pa.float32(), null=True),
                    _column("probability", pa.float32(), null=True),
                    _column("prefill", pa.int32(), null=True),
                ]
            ),
            key=("prompt_id", "budget", "decision", "branch_id"),
            unit_range=("expected_reward", "score", "probability"),
            choices={
                "status": ("running", "paused", "finished"),
                "action": ("start", "branch", "continue", "pause", "resume", "wait", "done", "stop"),
            },
        ),
        TableSchema(
            "baselines",
            pa.schema(
                [
                    _column("rollout_id", pa.string()),
                    _column("predictor", pa.string()),
                    _column("moment", pa.string()),
                    _column("expected_reward", pa.float32()),
                ]
            ),
            key=("rollout_id", "predictor", "moment"),
            unit_range=("expected_reward",),
        ),
    )
}


def _fail(where: str, column: str, bad: Sequence[int], why: str) -> None:
    rows = ", ".join(str(i) for i in bad[:FIRST_BAD_ROWS])
    more = f" and {len(bad) - FIRST_BAD_ROWS} more" if len(bad) > FIRST_BAD_ROWS else ""
    raise UserError(f"{where}: column '{column}', rows {rows}{more}: {why}.")


def _rows_where(mask: pa.ChunkedArray | pa.Array) -> list[int]:
    return np.flatnonzero(np.asarray(pc.fill_null(mask, False))).tolist()


def check_table(table: pa.Table, schema: TableSchema, where: str) -> None:
    """Raise UserError naming `where`, column and first bad rows unless `table` obeys `schema`."""
    for column in schema.columns:
        if column.name not in table.column_names:
            raise UserError(
                f"{where}: column '{column.name}' is missing (found: {', '.join(table.column_names)}). Is it a "
                f"'{schema.name}' table?"
            )
        if table.schema.field(column.name).type != column.type:
            found = table.schema.field(column.name).type
            raise UserError(f"{where}: column '{column.name}' has type {found}, expected {column.type}.")
        if not column.nullable and table[column.name].null_count:
            _fail(where, column.name, _rows_where(pc.is_null(table[column.name])), "null is not allowed here")
    for name in schema.unit_range:
        inside = pc.and_(pc.greater_equal(table[name], 0.0), pc.less_equal(table[name], 1.0))  # NaN compares false
        bad = _rows_where(pc.and_(pc.is_valid(table[name]), pc.invert(inside)))
        if bad:
            _fail(where, name, bad, f"found {table[name][bad[0]].as_py()}, expected a number in [0, 1]")
    for name, allowed in schema.choices.items():
        bad = _rows_where(pc.invert(pc.is_in(table[name], value_set=pa.array(allowed))))
        if bad:
            _fail(where, name, bad, f"found '{table[name][bad[0]].as_py()}', expected one of {', '.join(allowed)}")
    if schema.rule is not None:
        column_name, mask, why = schema.rule(table)
        if bad := _rows_where(mask):
            _fail(where, column_name, bad, why)
    _check_key(table, schema, where)


def _check_key(table: pa.Table, schema: TableSchema, where: str) -> None:
    grouped = table.select(list(schema.key)).group_by(list(schema.key)).aggregate([([], "count_all")])
    if grouped.num_rows == table.num_rows:
        return
    twice = grouped.filter(pc.greater(grouped["count_all"], 1)).slice(0, 1).to_pylist()[0]
    twice.pop("count_all")
    raise UserError(f"{where}: column '{', '.join(schema.key)}': {twice} occurs more than once; keys must be unique.")


def make_table(name: str, rows: Iterable[Mapping[str, Any]] | Mapping[str, Any]) -> pa.Table:
    """Build a table of kind `name` from rows or from columns."""
    schema = SCHEMAS[name]
    if isinstance(rows, Mapping):
        return pa.table(dict(rows), schema=schema.columns)
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema.columns)


def write_table(path: Path, name: str, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
    """Check `table` and write it atomically, with `metadata` in the file's footer.

    Raises UserError when a check fails; whatever stood at `path` is then untouched.
    """
    check_table(table, SCHEMAS[name], str(path))
    if metadata:
        table = table.replace_schema_metadata({k.encode(): v.encode() for k, v in metadata.items()})
    with atomic_path(path) as private:
        pq.write_table(table, private, compression="zstd", write_page_checksum=True)


def read_table(path: Path, name: str) -> pa.Table:
    """Read and check a table of kind `name`; UserError for a missing, truncated or wrong file."""
    if not path.exists():
        raise UserError(f"{path} does not exist. Build it first: `make {path}`.")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({error}). It is truncated or damaged: delete it and build it "
            f"again with `make {path}`."
        ) from None
    check_table(table, SCHEMAS[name], str(path))
    return table

"""A table that breaks a rule is refused on write and on read, with file, column and rows named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.doubles import TABLES
from ziprc.errors import UserError
from ziprc.tables.check import TEXT
from ziprc.tables.grades import GRADES
from ziprc.tables.introspection import INTROSPECTION
from ziprc.tables.rollouts import ROLLOUTS

NAN = float("nan")


def grade(number: int, **changes: Any) -> dict[str, Any]:
    row = {"rollout_id": f"r{number}", "grader": "exact", "score": 1.0, "status": "graded"}
    return {**row, "extracted_answer": None, "rationale": None, "parts": None, **changes}


def grades(*rows: dict[str, Any]) -> pa.Table:
    return GRADES.make(rows)


def stored(folder: Path, table: pa.Table) -> Path:
    """A file written behind the back of `write_table`."""
    pq.write_table(table, folder / "grades.parquet")
    return folder / "grades.parquet"


def test_a_good_table_comes_back_as_it_was(tmp_path: Path) -> None:
    table = grades(grade(0), grade(1, score=None, status="timeout"))
    GRADES.write(tmp_path / "grades.parquet", table, {"key": "value"})
    found = GRADES.read(tmp_path / "grades.parquet")
    assert found.to_pylist() == table.to_pylist() and found.schema.metadata[b"key"] == b"value"


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = stored(tmp_path, grades(grade(0)).drop_columns(["score"]))
    with pytest.raises(UserError, match=r"grades\.parquet: column 'score' is missing \(found: rollout_id, grader"):
        GRADES.read(path)


def test_a_wrong_type_is_named(tmp_path: Path) -> None:
    table = grades(grade(0))
    doubles = table.set_column(2, "score", table["score"].cast(pa.float64()))
    with pytest.raises(UserError, match="column 'score' has type double, expected float"):
        GRADES.read(stored(tmp_path, doubles))


@pytest.mark.parametrize("score", [float("nan"), -0.01, 1.5, float("inf")])
def test_a_score_outside_the_unit_interval_is_refused(tmp_path: Path, score: float) -> None:
    bad = grades(grade(0), grade(1), grade(2, score=score))
    with pytest.raises(UserError, match=r"column 'score', rows 2: found .*, expected a number in \[0, 1\]"):
        GRADES.write(tmp_path / "x.parquet", bad)
    with pytest.raises(UserError, match="column 'score', rows 2"):
        GRADES.read(stored(tmp_path, bad))


@pytest.mark.parametrize("changes", [{"score": None}, {"status": "timeout"}])
def test_a_score_is_null_exactly_when_nothing_was_graded(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="rows 1: score must be null exactly when"):
        GRADES.check(grades(grade(0), grade(1, **changes)), "x")


def test_null_where_none_is_allowed_is_refused() -> None:
    table = grades(grade(0), grade(1))
    holes = table.set_column(1, pa.field("grader", TEXT), pa.array(["exact", None], TEXT))
    with pytest.raises(UserError, match="column 'grader', rows 1: null is not allowed here"):
        GRADES.check(holes, "x")


def test_an_unknown_status_is_refused() -> None:
    with pytest.raises(UserError, match="'status', rows 0: found 'maybe', expected one of graded, unfinished"):
        GRADES.check(grades(grade(0, status="maybe", score=None)), "x")


def test_a_key_that_occurs_twice_is_named() -> None:
    with pytest.raises(UserError, match=r"'rollout_id, grader'.*'r1'.*more than once"):
        GRADES.check(grades(grade(0), grade(1), grade(1)), "x")


def test_at_most_five_bad_rows_are_listed() -> None:
    with pytest.raises(UserError, match="rows 0, 1, 2, 3, 4 and 3 more"):
        GRADES.check(grades(*[grade(i, score=2.0) for i in range(8)]), "x")


def test_a_truncated_file_says_what_to_do(tmp_path: Path) -> None:
    path = stored(tmp_path, grades(*[grade(i) for i in range(50)]))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"grades\.parquet cannot be read as parquet .* truncated or damaged"):
        GRADES.read(path)


@pytest.mark.parametrize("content", [b"", b"not a table"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as parquet"):
        GRADES.read(tmp_path / "x.parquet")


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist. Build it first: `make .*x\.parquet`"):
        GRADES.read(tmp_path / "x.parquet")


def test_a_refused_write_leaves_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "grades.parquet"
    GRADES.write(path, grades(grade(0)))
    before = path.read_bytes()
    with pytest.raises(UserError):
        GRADES.write(path, grades(grade(0, score=7.0)))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_response_has_at_least_one_token() -> None:
    row = {"rollout_id": "a", "prompt_id": "p", "sample_index": 0, "seed": 1, "prompt_token_ids": [1]}
    row |= {"response_text": "", "finish_reason": "stop", "thinking": True, "policy": "base", "response_token_ids": []}
    with pytest.raises(UserError, match="'response_token_ids', rows 0: a response has at least one token"):
        ROLLOUTS.check(ROLLOUTS.make([row]), "x")


@pytest.mark.parametrize(
    ("column", "value"),
    [("log_prob", 0.1), ("log_prob", -float("inf")), ("log_prob", NAN), ("entropy", -0.1), ("entropy", NAN)],
)
def test_what_cannot_be_a_log_probability_or_an_entropy_is_refused(column: str, value: float) -> None:
    row = {"rollout_id": "a", "position": 0, "expected_reward": 0.5, "expected_remaining": 3.0, "joint": [0.5, 0.5]}
    good = row | {"log_prob": 0.0, "entropy": 0.0}
    bad = row | {"log_prob": -1.0, "entropy": 1.0, "position": 1, column: value}
    INTROSPECTION.check(INTROSPECTION.make([good]), "x")
    with pytest.raises(UserError, match=f"column '{column}', rows 1: an? .* is finite and at"):
        INTROSPECTION.check(INTROSPECTION.make([good, bad]), "x")


def test_an_empty_table_is_well_formed() -> None:
    for name, schema in TABLES.items():
        schema.check(TABLES[name].make([]), name)

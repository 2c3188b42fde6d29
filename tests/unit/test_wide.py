"""Our tables and the wide table of the original systems say the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.doubles import TABLES, tiny_tables
from ziprc.errors import UserError
from ziprc.integrations.wide import export_wide, import_wide
from ziprc.store.layout import Layout, manifest_of
from ziprc.tables.grades import GRADES
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.values import VALUES


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path, "tiny")
    tiny_tables(layout, "train", prompts=5, samples=3, unfinished=0.3)
    ids = ROLLOUTS.read(layout.table("rollouts", "train"))["rollout_id"].to_pylist()
    rows = [{"rollout_id": r, "critic": "c", "fold": 0, "value": i / len(ids)} for i, r in enumerate(ids)]
    VALUES.write(layout.table("values", "train"), VALUES.make(rows))
    return layout


@pytest.fixture
def labelled(layout: Layout, tmp_path: Path) -> Path:
    """A wide file with labels of all but the last rollout."""
    rng, rows = np.random.default_rng(0), []
    for rollout in ROLLOUTS.read(layout.table("rollouts", "train")).to_pylist()[:-1]:
        states = [sorted({token, 300}) for token in rollout["response_token_ids"]]
        offsets = np.cumsum([0, *map(len, states)])
        q = rng.random(offsets[-1]).astype(np.float32)
        taken = [q[a + ids.index(t)] for a, ids, t in zip(offsets, states, rollout["response_token_ids"], strict=False)]
        rows.append(
            {"rollout_id": rollout["rollout_id"], "source": "critic", "siblings": 2, "offsets": offsets,
             "ids": [i for ids in states for i in ids], "log_prob": np.full(len(q), -1.0), "q": q, "cells": [],
             "values": [np.float32(q[: offsets[1]].mean()), *taken]}
        )  # fmt: skip
    QVALUES.write(layout.table("qvalues", "train"), QVALUES.make(rows))
    assert export_wide(layout, "train", tmp_path / "labelled.parquet") == (14, 1)
    return tmp_path / "labelled.parquet"


def test_labels_go_out_in_the_columns_of_the_original_and_come_back(
    layout: Layout, labelled: Path, tmp_path: Path
) -> None:
    types = {field.name: str(field.type) for field in pq.read_schema(labelled)}
    assert types["candidate_ids"] == "list<element: list<element: int64>>"
    assert types["candidate_q_values"] == types["candidate_ref_logprobs"] == "list<element: list<element: float>>"
    first = pq.read_table(labelled).to_pylist()[0]
    assert len(first["candidate_ids"]) == first["length"] and all(300 in ids for ids in first["candidate_ids"])
    other = Layout(tmp_path, "other")
    assert import_wide(labelled, other, "train") == 14
    ours, theirs = (QVALUES.read(home.table("qvalues", "train")) for home in (layout, other))
    for name in ("offsets", "ids", "log_prob", "q"):
        assert ours[name].to_pylist() == theirs[name].to_pylist(), name
    for mine, back in zip(ours["values"].to_pylist(), theirs["values"].to_pylist(), strict=True):
        assert mine == pytest.approx(back, abs=1e-6)
    assert theirs.schema.metadata[b"kind"] == b'"candidates"'


@pytest.mark.parametrize(
    ("column", "change", "why"),
    [
        ("candidate_q_values", lambda own: own[:-1], "one list for every response token"),
        ("candidate_ref_logprobs", lambda own: [[0.0] * len(of) for of in own], "zeros throughout are placeholders"),
        (
            "candidate_ids",
            lambda own: [[301 + i for i in range(len(of))] for of in own],
            "the token taken has to be among",
        ),
        ("candidate_ref_logprobs", lambda own: None, "one list for every response token"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(
    labelled: Path, tmp_path: Path, column: str, change: Callable[[Any], Any], why: str
) -> None:
    changed(labelled, column, 1, change(pq.read_table(labelled)[column][1].as_py()))
    with pytest.raises(UserError, match=rf"labelled\.parquet: column '{column}', row 1: .*{why}"):
        import_wide(labelled, Layout(tmp_path, "other"), "train")


@pytest.fixture
def wide(layout: Layout, tmp_path: Path) -> Path:
    assert export_wide(layout, "train", tmp_path / "wide.parquet") == (15, 0)
    return tmp_path / "wide.parquet"


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


def test_the_columns_have_the_dtypes_of_the_original(wide: Path) -> None:
    types = {field.name: str(field.type) for field in pq.read_schema(wide)}
    assert types["prompt_idx"] == types["length"] == "int64" and types["value"] == "double"
    assert types["input_ids"] == types["label_positions"] == "list<element: int64>"
    assert types["correct"] == types["finished"] == types["reasoning_enabled"] == "bool"


def test_a_round_trip_keeps_every_fact(layout: Layout, wide: Path, tmp_path: Path) -> None:
    other = Layout(tmp_path, "other")
    assert import_wide(wide, other, "train") == 15
    for kind, lost in (
        ("prompts", ("prompt_id", "task", "source", "difficulty")),
        ("rollouts", ("prompt_id", "rollout_id", "seed")),
        ("grades", ("rollout_id", "grader")),
        ("values", ("rollout_id", "critic")),
    ):
        ours, theirs = (TABLES[kind].read(home.table(kind, "train")).to_pylist() for home in (layout, other))
        assert without(ours, *lost) == without(theirs, *lost), kind
        assert manifest_of(other.table(kind, "train")).exists()
    export_wide(other, "train", tmp_path / "again.parquet")
    assert pq.read_table(tmp_path / "again.parquet").equals(pq.read_table(wide))


def test_rollouts_without_a_label_are_left_out_and_counted(layout: Layout, tmp_path: Path) -> None:
    """The original would train a null label as a wrong answer; an unfinished response is wrong there too."""
    grades = GRADES.read(layout.table("grades", "train")).to_pylist()
    unfinished = [row["rollout_id"] for row in grades if row["status"] == "unfinished"]
    blind = next(i for i, row in enumerate(grades) if row["status"] == "graded")
    grades[blind] |= {"score": None, "status": "timeout"}
    GRADES.write(layout.table("grades", "train"), GRADES.make(grades))
    values = VALUES.read(layout.table("values", "train"))
    without = next(i for i in range(15) if i != blind)
    VALUES.write(layout.table("values", "train"), values.filter([i != without for i in range(15)]))
    assert export_wide(layout, "train", tmp_path / "wide.parquet") == (13, 2)
    found = pq.read_table(tmp_path / "wide.parquet")
    assert found["correct"].null_count == found["value"].null_count == 0
    lost = {grades[i]["rollout_id"] for i in (blind, without)}
    assert unfinished and found["finished"].to_pylist().count(False) == len(set(unfinished) - lost)
    assert not any(c for c, f in zip(found["correct"].to_pylist(), found["finished"].to_pylist(), strict=True) if not f)


def test_several_grades_of_a_rollout_are_refused(layout: Layout, tmp_path: Path) -> None:
    grades = GRADES.read(layout.table("grades", "train")).to_pylist()
    GRADES.write(layout.table("grades", "train"), GRADES.make([*grades, grades[0] | {"grader": "judge"}]))
    with pytest.raises(UserError, match=r"grades.train\.parquet: .*1 rollouts have more than one row by exact, judge"):
        export_wide(layout, "train", tmp_path / "wide.parquet")


def test_the_narrowest_file_is_enough(wide: Path, tmp_path: Path) -> None:
    table = pq.read_table(wide).drop_columns(["input_ids", "label_positions", "length", "model_id", "correct", "value"])
    pq.write_table(table, wide)
    import_wide(wide, Layout(tmp_path, "other"), "test")
    assert not Layout(tmp_path, "other").table("grades", "test").exists()


def changed(path: Path, column: str, row: int, value: Any) -> None:
    table = pq.read_table(path)
    content = table[column].to_pylist()
    content[row] = value
    array = pa.array(content, type=table.schema.field(column).type)
    pq.write_table(table.set_column(table.column_names.index(column), column, array), path)


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("prompt", None, "null is not allowed"),
        ("output_token_ids", [], "at least one token"),
        ("prompt_token_ids", [-1], "a token id"),
        ("length", 1, "does not agree"),
        ("input_ids", [1], "does not agree"),
        ("value", float("nan"), "found nan"),
        ("value", 1.5, r"expected a number in \[0, 1\]"),
    ],
)
def test_a_bad_row_names_file_column_and_row(wide: Path, tmp_path: Path, column: str, value: Any, why: str) -> None:
    changed(wide, column, 2, value)
    with pytest.raises(UserError, match=rf"wide\.parquet: column '{column}', row 2: .*{why}"):
        import_wide(wide, Layout(tmp_path, "other"), "train")
    assert not (tmp_path / "other").exists()


def test_a_file_of_another_shape_names_the_column(wide: Path, tmp_path: Path) -> None:
    table = pq.read_table(wide)
    pq.write_table(table.drop_columns(["finished"]), wide)
    with pytest.raises(UserError, match="column 'finished' is missing"):
        import_wide(wide, Layout(tmp_path, "other"), "train")
    words = pa.array(["x"] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("length"), "length", words), wide)
    with pytest.raises(UserError, match="column 'length' has type string, expected int64"):
        import_wide(wide, Layout(tmp_path, "other"), "train")


def test_tables_that_exist_are_not_overwritten(layout: Layout, wide: Path) -> None:
    with pytest.raises(UserError, match="never edited"):
        import_wide(wide, layout, "train")


def test_a_truncated_file_is_refused(wide: Path, tmp_path: Path) -> None:
    wide.write_bytes(wide.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        import_wide(wide, Layout(tmp_path, "other"), "train")

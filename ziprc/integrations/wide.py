"""The wide table of the original ZIP-RC and ICL-V scripts: written from our tables, and read into them.

The original keeps one parquet file in which every stage adds a column; ours are narrow tables that join on
`rollout_id`. Column names and dtypes are those of the original. What it cannot say is lost on the way out: scores
between 0 and 1 (`correct` is score ≥ 0.5), seeds, and rollouts without a label (an unfinished one is `False`, as there):
the original would train them as wrong. Of labels (`candidate_…`, a list a response token) it has no joint and no value before
the first token: on the way in that is the mean of the first candidates under the reference.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ziprc.errors import UserError
from ziprc.store.digests import digest_file, digest_json
from ziprc.store.files import atomic_path, output_lock
from ziprc.store.layout import Layout
from ziprc.store.manifest import write_manifest
from ziprc.tables.grades import GRADES, GradeStatus, one_a_rollout
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS, FinishReason
from ziprc.tables.values import VALUES
from ziprc.tasks.base import prompt_id

TASK = "imported"
SCHEMAS = {schema.name: schema for schema in (PROMPTS, ROLLOUTS, GRADES, VALUES, QVALUES)}

WIDE = pa.schema(
    [
        pa.field("prompt_idx", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("output_token_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("input_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("label_positions", pa.list_(pa.int64()), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("finished", pa.bool_(), nullable=False),
        pa.field("reasoning_enabled", pa.bool_(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
    ]
)
CORRECT = pa.field("correct", pa.bool_())
VALUE = pa.field("value", pa.float64())
CANDIDATES = {  # column of the original, by ours
    "ids": pa.field("candidate_ids", pa.list_(pa.list_(pa.int64()))),
    "q": pa.field("candidate_q_values", pa.list_(pa.list_(pa.float32()))),
    "log_prob": pa.field("candidate_ref_logprobs", pa.list_(pa.list_(pa.float32()))),
}
DERIVED = {"input_ids", "label_positions", "length", "model_id"}  # may be absent from a file that is read

Row = dict[str, Any]


# --- out ---------------------------------------------------------------------------------------------------------


def export_wide(layout: Layout, name: str, target: Path) -> tuple[int, int]:
    """Join prompts, rollouts and, where they exist, grades and values of `name`.

    The number of rows, and of rollouts that are left out because a grade or value that others have is missing.
    """
    source = layout.table("prompts", "train" if name == "train" else "test")
    asked = PROMPTS.read(source).to_pylist()
    prompts = {row["prompt_id"]: (index, row) for index, row in enumerate(asked)}
    rollouts = ROLLOUTS.read(layout.table("rollouts", name)).to_pylist()
    if absent := {row["prompt_id"] for row in rollouts} - set(prompts):
        raise UserError(f"{source}: column 'prompt_id': {min(absent)} of the rollouts is missing.")
    labels = {}
    for field, schema, label in ((CORRECT, GRADES, _correct), (VALUE, VALUES, lambda row: row["value"])):
        if (path := layout.table(schema.name, name)).exists():
            table = schema.read(path)
            one_a_rollout(table, str(path))
            labels[field] = {row["rollout_id"]: label(row) for row in table.to_pylist()}
    if (path := layout.table("qvalues", name)).exists():
        own = QVALUES.read(path).to_pylist()
        for key, field in CANDIDATES.items():
            labels[field] = {row["rollout_id"]: _by_state(row[key], row["offsets"]) for row in own}
    rows = [
        {**_wide_row(r, *prompts[r["prompt_id"]]), **{f.name: of.get(r["rollout_id"]) for f, of in labels.items()}}
        for r in rollouts
    ]
    kept = [row for row in rows if all(row[field.name] is not None for field in labels)]
    with atomic_path(target) as private:
        pq.write_table(pa.Table.from_pylist(kept, schema=pa.schema([*WIDE, *labels])), private, compression="zstd")
    return len(kept), len(rows) - len(kept)


def _by_state(values: list[Any], offsets: list[int]) -> list[list[Any]]:
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def _correct(grade: Row) -> bool | None:
    if grade["score"] is None and grade["status"] != GradeStatus.UNFINISHED:
        return None
    return grade["score"] is not None and grade["score"] >= 0.5


def _wide_row(rollout: Mapping[str, Any], index: int, prompt: Mapping[str, Any]) -> Row:
    before, after = rollout["prompt_token_ids"], rollout["response_token_ids"]
    return {
        "prompt_idx": index,
        "prompt": "\n\n".join(message["content"] for message in prompt["messages"] if message["role"] == "user"),
        "answer": prompt["answer"],
        "response": rollout["response_text"],
        "prompt_token_ids": before,
        "output_token_ids": after,
        **_derived(before, after),
        "finished": rollout["finish_reason"] == FinishReason.STOP,
        "reasoning_enabled": rollout["thinking"],
        "model_id": rollout["policy"],
    }


def _derived(before: list[int], after: list[int]) -> Row:
    """The columns that follow from the tokens of prompt and response."""
    positions = list(range(len(before), len(before) + len(after)))
    return {"input_ids": before + after, "label_positions": positions, "length": len(after)}


# --- in ----------------------------------------------------------------------------------------------------------


def import_wide(source: Path, layout: Layout, name: str) -> int:
    """Write the tables of `name` from a wide file; the number of rollouts.

    Raises UserError naming file, column and row before anything is written.
    """
    if name not in ("train", "test"):
        raise UserError(f"A wide table is imported as 'train' or 'test', found '{name}'.")
    targets = {kind: layout.table(kind, name) for kind in SCHEMAS}
    for path in targets.values():
        if path.exists():
            raise UserError(f"{path} exists and tables are never edited. Import into a new experiment, or delete it.")
    rows = _read_wide(source)
    prompt_ids = [prompt_id(TASK, TASK, json.dumps([row["prompt"], row["answer"]])) for row in rows]
    rollouts = list(_rollout_rows(rows, prompt_ids))
    names = [row["rollout_id"] for row in rollouts]
    tables = {"prompts": _prompt_rows(rows, prompt_ids, name), "rollouts": rollouts}
    if rows and "correct" in rows[0]:
        tables["grades"] = [_grade_row(i, row) for i, row in zip(names, rows, strict=True)]
    if any(row.get("value") is not None for row in rows):
        tables["values"] = [
            {"rollout_id": i, "critic": TASK, "fold": 0, "value": row["value"]}
            for i, row in zip(names, rows, strict=True)
            if row["value"] is not None
        ]
    if any(row.get("candidate_ids") is not None for row in rows):
        tables["qvalues"] = [
            _labels_row(i, row) for i, row in zip(names, rows, strict=True) if row["candidate_ids"] is not None
        ]
    alone = all(len(of) == 1 for row in rows for of in row.get("candidate_ids") or ())
    said = {"qvalues": {"kind": json.dumps("taken" if alone else "candidates")}}
    params, parents = {"imported": digest_file(source)}, {"prompts": [], "rollouts": ["prompts"]}
    for kind, content in tables.items():
        with output_lock(targets[kind]):
            SCHEMAS[kind].write(targets[kind], SCHEMAS[kind].make(content), said.get(kind))
            write_manifest(targets[kind], params, {p: targets[p] for p in parents.get(kind, ["rollouts"])})
    return len(rows)


def _prompt_rows(rows: Sequence[Row], prompt_ids: Sequence[str], split: str) -> list[Row]:
    """Each prompt once, where it first occurs."""
    found: dict[str, Row] = {}
    fixed = {"task": TASK, "source": TASK, "difficulty": TASK, "extra": "{}"}
    for key, row in zip(prompt_ids, rows, strict=True):
        messages = [{"role": "user", "content": row["prompt"]}]
        own = {"prompt_id": key, "split": split, "messages": messages, "answer": row["answer"]}
        found.setdefault(key, {**own, **fixed})
    return list(found.values())


def _rollout_rows(rows: Sequence[Row], prompt_ids: Sequence[str]) -> Iterator[Row]:
    samples: Counter[str] = Counter()
    for key, row in zip(prompt_ids, rows, strict=True):
        index = samples[key]
        samples[key] += 1
        yield {
            "rollout_id": digest_json([key, index, row["output_token_ids"]])[:24],
            "prompt_id": key,
            "sample_index": index,
            "seed": 0,
            "prompt_token_ids": row["prompt_token_ids"],
            "response_token_ids": row["output_token_ids"],
            "response_text": row["response"],
            "finish_reason": (FinishReason.STOP if row["finished"] else FinishReason.LENGTH).value,
            "thinking": row["reasoning_enabled"],
            "policy": row.get("model_id") or TASK,
        }


def _grade_row(rollout_id: str, row: Row) -> Row:
    status = GradeStatus.GRADED if row["finished"] else GradeStatus.UNFINISHED
    if row["finished"] and row["correct"] is None:
        status = GradeStatus.ERROR
    score = float(row["correct"]) if status is GradeStatus.GRADED else None
    nothing = {"extracted_answer": None, "rationale": None}
    return {"rollout_id": rollout_id, "grader": TASK, "score": score, "status": status.value, **nothing}


def _labels_row(rollout_id: str, row: Row) -> Row:
    """Labels of one rollout; the value of a state is that of the token that led to it."""
    found = {key: list(itertools.chain(*row[field.name])) for key, field in CANDIDATES.items()}
    mass = [math.exp(of) for of in row["candidate_ref_logprobs"][0]]
    start = sum(p * q for p, q in zip(mass, row["candidate_q_values"][0], strict=True)) / sum(mass)
    steps = zip(row["output_token_ids"], row["candidate_ids"], row["candidate_q_values"], strict=True)
    values = [start, *(q[ids.index(token)] for token, ids, q in steps)]
    offsets = [0, *itertools.accumulate(map(len, row["candidate_ids"]))]
    known = {"rollout_id": rollout_id, "source": TASK, "siblings": 0, "cells": []}
    return {**known, **found, "offsets": offsets, "values": values}


def _read_wide(source: Path) -> list[Row]:
    """The checked rows of a wide file."""
    if not source.exists():
        raise UserError(f"{source} does not exist.")
    try:
        table = pq.read_table(source)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source} cannot be read as parquet ({error}).") from None
    fields = [f for f in (*WIDE, CORRECT, VALUE, *CANDIDATES.values()) if f.name in table.column_names]
    for field in WIDE:
        if field.name not in table.column_names and field.name not in DERIVED:
            raise UserError(f"{source}: column '{field.name}' is missing (found: {', '.join(table.column_names)}).")
    columns = {field.name: _cast(table[field.name], field, source) for field in fields}
    rows = pa.table(columns).to_pylist()
    for number, row in enumerate(rows):
        if problem := _problem(row):
            raise UserError(f"{source}: column '{problem[0]}', row {number}: {problem[1]}.")
    return rows


def _cast(column: pa.ChunkedArray, field: pa.Field, source: Path) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except pa.ArrowException:
        raise UserError(f"{source}: column '{field.name}' has type {column.type}, expected {field.type}.") from None


def _problem(row: Row) -> tuple[str, str] | None:
    """Column and reason of the first thing that is wrong with a row."""
    for field in WIDE:
        if not field.nullable and field.name in row and row[field.name] is None:
            return field.name, "null is not allowed here"
    before, after = row["prompt_token_ids"], row["output_token_ids"]
    for name in ("prompt_token_ids", "output_token_ids"):
        if any(i is None or not 0 <= i < 2**31 for i in row[name]):
            return name, "a token id must be a number from 0 to 2147483647"
    if not after:
        return "output_token_ids", "a response has at least one token"
    for name, expected in _derived(before, after).items():
        if name in row and row[name] != expected:
            return name, "does not agree with prompt_token_ids and output_token_ids"
    if (value := row.get("value")) is not None and not 0 <= value <= 1:
        return "value", f"found {value}, expected a number in [0, 1]"
    if row.get("candidate_ids") is not None:
        return _problem_of_labels(row)
    return None


def _problem_of_labels(row: Row) -> tuple[str, str] | None:
    """Column and reason of the first thing that is wrong with a row's labels."""
    after, ids = row["output_token_ids"], row["candidate_ids"]
    for field in CANDIDATES.values():
        own = row.get(field.name)
        if own is None or [len(of) for of in own] != [len(of) for of in ids] or len(own) != len(after):
            return field.name, "one list for every response token, as long as that of candidate_ids"
    if any(token not in of for token, of in zip(after, ids, strict=True)):
        return "candidate_ids", "the token taken has to be among the candidates of its state"
    if all(p == 0 for of in row["candidate_ref_logprobs"] for p in of):
        return "candidate_ref_logprobs", (
            "zeros throughout are placeholders of the trajectory-only labeller, not log-probabilities; label the rollouts here "
            "(qvalues.candidates=false keeps the tokens taken, with true ones)"
        )
    return None

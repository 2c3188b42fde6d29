"""Tables made in pieces: finished pieces survive a kill, stale and damaged ones are never read, the whole is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.doubles import World, tiny_experiment, tiny_fitted
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.reading.states import token_pairs, token_ranges
from ziprc.sampling.live import bench
from ziprc.stages import grades, introspection, qvalues, samples, values
from ziprc.store.digests import digest_file
from ziprc.store.files import write_json
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import write_manifest
from ziprc.tables import pieces as module
from ziprc.tables.pieces import Pieces, cut
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.samples import SAMPLES
from ziprc.tables.values import VALUES
from ziprc.training.data import sequences_from_table


def some_values(start: int, stop: int) -> pa.Table:
    return VALUES.make(
        [{"rollout_id": f"r{i}", "critic": "c", "fold": 0, "value": i / 100} for i in range(start, stop)]
    )


def made(folder: Path, recipe: str = "a", but: tuple[int, ...] = ()) -> Pieces:
    """Ten rows in four pieces, some of which were not made."""
    pieces = Pieces(folder, VALUES, recipe, cut(10, 3))
    for number in pieces.missing():
        if number not in but:
            pieces.write(number, some_values(*pieces.parts[number]))
    return pieces


def test_what_is_finished_survives_and_what_is_stale_unfinished_or_damaged_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = made(tmp_path, but=(2,))
    assert pieces.missing() == [2]
    manifest_of(pieces.path(0)).unlink()  # killed between the two files
    data = bytearray(pieces.path(1).read_bytes())
    data[len(data) // 2] ^= 8
    pieces.path(1).write_bytes(data)
    assert pieces.missing() == [0, 1, 2]
    assert f"{pieces.path(1)} is damaged and is made again" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in (pieces.path(3), manifest_of(pieces.path(3)))}
    assert replace(pieces, recipe="b").missing() == [0, 1, 2, 3] and not list(tmp_path.iterdir())


def test_a_piece_is_named_for_the_recipe_and_for_its_part() -> None:
    one = Pieces(Path(), VALUES, "a", cut(10, 3))
    names = {one.path(0), one.path(1), replace(one, recipe="b").path(0), replace(one, parts=cut(10, 4)).path(0)}
    assert len(names) == 4 and one.path(0) == Pieces(Path(), VALUES, "a", [[0, 3]]).path(0)


def test_the_whole_does_not_depend_on_the_order_in_which_pieces_were_made(tmp_path: Path) -> None:
    target = tmp_path / "values.parquet"
    made(tmp_path / "at once").merge(target, {"key": "value"})
    whole = digest_file(target)
    made(tmp_path / "in two tries", but=(0, 2))
    again = made(tmp_path / "in two tries")
    assert again.merge(target, {"key": "value"}) == 10 and digest_file(target) == whole
    assert VALUES.read(target).equals(some_values(0, 10)) and pq.read_schema(target).metadata[b"key"] == b"value"


def test_row_groups_are_filled_up_to_their_bound_and_not_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, target = made(tmp_path / "pieces"), tmp_path / "values.parquet"

    def groups(bound: int) -> list[int]:
        monkeypatch.setattr(module, "GROUP_BYTES", bound)
        pieces.merge(target)
        metadata = pq.ParquetFile(target).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    assert groups(1 << 20) == [10]
    assert groups(int(2.5 * some_values(0, 3).nbytes)) == [6, 4]
    assert groups(1) == [3, 3, 3, 1]


def test_a_group_that_breaks_a_rule_is_never_put_under_the_final_name(tmp_path: Path) -> None:
    pieces, target = made(tmp_path / "pieces"), tmp_path / "values.parquet"

    def spoilt(table: pa.Table) -> pa.Table:
        return table.set_column(3, "value", pa.array([2.0] * len(table), pa.float32()))

    with pytest.raises(UserError, match=r"values\.parquet: column 'value', rows 0"):
        pieces.merge(target, change=spoilt)
    assert not target.exists()


# --- stages killed in the middle ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny experiment with random heads, and what live runs start from; some of its live answers end in 14 tokens."""
    layout = Layout(tmp_path_factory.mktemp("results"), "tiny")
    tiny_experiment(layout)
    own: dict[str, Any] = {"engine": "hf", "max_model_len": 256, "max_new_tokens": 14}
    live = {"prompts": 6, "majority_budgets": [1, 2], "branches": 2, "in_flight": 1}
    config = Config.model_validate({"rollouts": own, "values": {"last_k": 4}, "samples": live})
    folder = layout.checkpoint("ziprc")
    stops = [*range(0, 256, 12), 258]
    write_json(folder / "generation_config.json", {"eos_token_id": stops, "pad_token_id": 256})
    write_json(folder / "calibration.json", tiny_fitted().to_dict())
    write_json(layout.home / "frontier.json", {})
    for file in (folder / "calibration.json", layout.home / "frontier.json"):
        write_manifest(file, {}, {})
    return World(config, layout)


def small_pieces(stage: ModuleType) -> Callable[[pytest.MonkeyPatch], None]:
    """Cut the work of a stage into a few pieces."""
    name, size = {
        values: ("token_ranges", partial(token_ranges, tokens=400)),
        introspection: ("token_ranges", partial(token_ranges, tokens=400)),
        qvalues: ("PIECE_TOKENS", 400),
        grades: ("parts_of", lambda answers: [sorted(set(answers))[i::4] for i in range(4)]),
        samples: ("FLIGHTS_PER_PIECE", 3),
    }[stage]
    return lambda monkeypatch: monkeypatch.setattr(stage, name, size)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (values, "train"),
        (values, "test-many"),
        (introspection, "ziprc"),
        (grades, "train"),
        (samples, "majority"),
        (qvalues, "train-trie"),
    ],
)
def test_a_stage_that_was_killed_makes_the_rest_and_ends_in_the_same_bytes(
    world: World, stage: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(stage)(monkeypatch)
    context = world.context(stage.__name__.rpartition(".")[2], name)
    written: list[Path] = []
    write = Pieces.write

    def watched(self: Pieces, number: int, *rest: Any) -> None:
        if len(written) == 2 and killing:
            raise KeyboardInterrupt
        write(self, number, *rest)
        written.append(self.path(number))

    monkeypatch.setattr(Pieces, "write", watched)
    killing = False
    stage.run(context)
    whole, names = digest_file(context.target), list(written)
    assert len(names) > 3
    context.target.unlink()
    written.clear()
    killing = True
    with pytest.raises(KeyboardInterrupt):
        stage.run(context)
    killing = False
    assert not context.target.exists()
    stage.run(context)
    assert sorted(written) == sorted(names), "every piece was made once, in two tries"
    assert digest_file(context.target) == whole
    assert not (context.target.parent / f".{name}.pieces").exists()


# --- live samples are graded as recorded ones are ---------------------------------------------------------------------


def live(world: World, **own: Any) -> list[dict[str, Any]]:
    settings = world.config.grades.model_validate(own)
    context = replace(world, config=world.config.model_copy(update={"grades": settings})).context("samples", "majority")
    samples.run(context)
    return SAMPLES.read(context.target).to_pylist()


def test_live_answers_that_the_judge_cannot_grade_have_no_score_and_say_why(world: World) -> None:
    judge = {"model": str(world.layout.checkpoint("base")), "max_model_len": 300, "max_new_tokens": 4}
    ended = [row for row in live(world, rule="none", judge=judge) if row["action"] == "stop"]
    finished = [row for row in ended if row["answer"]]
    assert finished and {(row["score"], row["grade_status"]) for row in finished} == {(None, "error")}
    unfinished = [row for row in ended if row["answer"] is None]
    assert unfinished and {(row["score"], row["grade_status"]) for row in unfinished} == {(None, "unfinished")}


def test_nobody_to_grade_live_answers_is_said_before_the_engine_starts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "start", lambda *_: pytest.fail("started"))
    with pytest.raises(UserError, match="nobody is left to grade"):
        live(world, rule="none")


# --- more than 2³¹ tokens ---------------------------------------------------------------------------------------------


def far(folder: Path, lists: list[list[int]]) -> pa.Array:
    """Lists of ids whose offsets start above 2³¹, over a sparse file."""
    before, flat = 1 << 31, np.concatenate(lists).astype(np.int32)
    file = np.memmap(folder / "ids", np.int32, "w+", shape=before + len(flat))
    file[before:] = flat
    offsets = before + np.cumsum([0, *map(len, lists)]).astype(np.int64)
    child = pa.Array.from_buffers(pa.int32(), len(file), [None, pa.py_buffer(file)])
    kind = pa.large_list(pa.int32())
    return pa.Array.from_buffers(kind, len(lists), [None, pa.py_buffer(offsets)], children=[child])


def test_offsets_beyond_two_to_the_31_are_read_right(tmp_path: Path) -> None:
    prompts, responses = [[1], [2, 3], [4]], [[5, 6], [7], [8, 9, 10]]
    rows = [
        {"rollout_id": f"r{i}", "prompt_id": "p", "sample_index": i, "seed": 0, "prompt_token_ids": prompt,
         "response_token_ids": [0], "response_text": "", "finish_reason": "stop", "thinking": True, "policy": "base"}
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    near = ROLLOUTS.make(rows)
    column = far(tmp_path, responses)
    assert column.offsets[0].as_py() == 1 << 31
    table = near.set_column(near.column_names.index("response_token_ids"), ROLLOUTS.columns.field(5), column)
    ROLLOUTS.check(table, "here")
    found = sequences_from_table(table)
    assert [found.tokens[a:b].tolist() for a, b in zip(found.offsets, found.offsets[1:], strict=False)] == [
        p + r for p, r in zip(prompts, responses, strict=True)
    ]
    assert [list(pair.response) for pair in token_pairs(table)] == responses
    assert token_ranges(table, tokens=3) == [(0, 2), (2, 3)]
    ROLLOUTS.write(tmp_path / "far.parquet", table)
    assert ROLLOUTS.read(tmp_path / "far.parquet")["response_token_ids"].to_pylist() == responses

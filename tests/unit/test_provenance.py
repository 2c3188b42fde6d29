"""Seals, digests and recipes: one flipped bit is found, what is current is left alone, the record says how it came to be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doubles import World, tiny_checkpoint
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.plan import graph, provenance
from ziprc.plan.provenance import REVISION_VARIABLE, hand_on_revision, revision
from ziprc.plan.stage import Ref
from ziprc.plan.verify import verify
from ziprc.stages import prompts
from ziprc.stages.context import Context, perform, refuse_shared_prompts
from ziprc.store.digests import digest_file
from ziprc.store.files import disk_errors_explained, output_lock, write_json, write_text
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import read_sealed, require_intact, write_manifest, write_sealed
from ziprc.tables.prompts import PROMPTS

CONFIG = {"prompts": {"train": 3, "validation": 2, "test": 2}}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Three prompts, made by the real stage."""
    made = World(Config.model_validate(CONFIG), Layout(tmp_path / "results", "tiny")).context("prompts", "train")
    perform(prompts.run, made)
    return made


def table(context: Context) -> Path:
    return context.target


def with_config(config: Config, context: Context) -> Context:
    return World(config, context.graph.layout).context(context.ref.stage, context.ref.name)


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


# --- seals and digests ---


@pytest.mark.parametrize("at", [i / 40 for i in range(40)])
def test_a_flipped_bit_in_a_manifest_is_found(tmp_path: Path, at: float) -> None:
    write_text(tmp_path / "x.html", "content")
    write_manifest(tmp_path / "x.html", {"seed": 1, "words": ["é", None, 0.1]}, {})
    flip(tmp_path / "x.manifest.json", at)
    with pytest.raises(UserError, match=r"x\.manifest\.json"):
        require_intact(tmp_path / "x.html")


def test_a_seal_covers_what_json_changes(tmp_path: Path) -> None:
    write_sealed(tmp_path / "m.json", {"tuple": (1, 2), "numbers": {10: "a", 9: "b"}, "none": None})
    assert read_sealed(tmp_path / "m.json") == {"tuple": [1, 2], "numbers": {"10": "a", "9": "b"}, "none": None}


def test_a_manifest_without_a_seal_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"sha256": "0"})
    with pytest.raises(UserError, match="damaged or edited"):
        read_sealed(tmp_path / "m.json")


def test_a_damaged_a_short_and_a_missing_table_are_told_apart(context: Context) -> None:
    path = table(context)
    whole = path.read_bytes()
    require_intact(path)
    for damaged in (whole[:-1], whole[:50] + bytes([whole[50] ^ 4]) + whole[51:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is not what train\.manifest\.json describes.*build it again: `make"):
            require_intact(path)
    path.unlink()
    with pytest.raises(UserError, match=r"train\.parquet is gone, but .*train\.manifest\.json describes it"):
        require_intact(path)
    manifest_of(path).unlink()
    with pytest.raises(UserError, match=r"does not exist\. Build it first: `make .*train\.parquet`"):
        require_intact(path)


def test_every_file_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "ziprc")
    require_intact(folder)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "ziprc.json"):
        before = (folder / name).read_bytes()
        flip(folder / name, 0.6)
        with pytest.raises(UserError, match=name):
            require_intact(folder)
        (folder / name).write_bytes(before)


# --- nothing to do ---


def test_what_the_same_recipe_made_is_left_alone(context: Context) -> None:
    before = os.stat(table(context)).st_ino
    assert "nothing to do" in perform(prompts.run, context)
    assert os.stat(table(context)).st_ino == before


def test_it_is_made_younger_than_its_inputs(context: Context) -> None:
    for path in (table(context), manifest_of(table(context))):
        os.utime(path, (0, 0))
    perform(prompts.run, context)
    assert all(os.stat(path).st_mtime > 1e9 for path in (table(context), manifest_of(table(context))))


def test_another_setting_is_another_recipe(context: Context) -> None:
    other = with_config(Config.model_validate({**CONFIG, "seed": 1}), context)
    before = digest_file(table(context))
    assert "nothing to do" not in perform(prompts.run, other)
    assert digest_file(table(context)) != before


@pytest.mark.parametrize("what", ["packages", "code"])
def test_other_packages_or_code_are_another_recipe(
    context: Context, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "packages":
        monkeypatch.setattr(provenance, "versions", lambda: {"torch": "1.0"})
    else:
        monkeypatch.setattr(graph, "code_digest", lambda stage, chosen: "other")
    assert "nothing to do" not in perform(prompts.run, context)


def test_a_damaged_artifact_or_record_is_made_again(context: Context) -> None:
    before = digest_file(table(context))
    for path in (table(context), manifest_of(table(context)), context.graph.layout.provenance("prompts", "train")):
        flip(path)
        assert "nothing to do" not in perform(prompts.run, context)
        assert digest_file(table(context)) == before
        assert not verify(context.graph.layout.home).problems


# --- the record ---


def test_the_record_says_how_the_artifact_came_to_be(context: Context) -> None:
    record = read_sealed(context.graph.layout.provenance("prompts", "train"))
    assert record["config"]["prompts"]["train"] == 3 and record["seed"] == 0
    assert record["recipe"]["packages"]["torch"].count(".") == 2
    assert record["manifest"] == digest_file(manifest_of(table(context)))
    assert record["peak_memory_mib"]["process"] > 10 and record["seconds"] >= 0
    assert record["machine"]["cpus"] >= 1 and record["started"].endswith("+00:00")


def git(root: Path, *command: str) -> str:
    line = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(root), *command]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_and_what_differs_from_it_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, layout = tmp_path / "checkout", Layout(tmp_path / "results", "tiny")
    (root / "ziprc").mkdir(parents=True)
    (root / "ziprc" / "a.py").write_text("x = 1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    monkeypatch.setattr(provenance, "PACKAGE", root / "ziprc")
    assert revision(layout) == {"commit": git(root, "rev-parse", "HEAD"), "diff": None}
    (root / "ziprc" / "a.py").write_text("x = 2\n")
    (root / "ziprc" / "new.py").write_text("y = 3\n")
    found = revision(layout)
    text = (layout.home / "provenance" / str(found["diff"])).read_text()
    assert "+x = 2" in text and "y = 3" in text


def test_without_git_the_revision_is_unknown_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(REVISION_VARIABLE, raising=False)
    assert revision(Layout(tmp_path, "x")) == {"commit": None, "diff": None}


def test_a_stage_without_git_knows_what_was_found_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path, "x")
    monkeypatch.setenv(REVISION_VARIABLE, "")  # so that it is put back
    hand_on_revision(layout)
    outside = revision(layout)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision(layout) == outside


# --- verify ---


def test_verify_counts_what_agrees(context: Context) -> None:
    assert (
        verify(context.graph.layout.home)
        .text()
        .endswith("1 artifacts of 1 files, 1 provenance records: every digest agrees")
    )


def test_verify_names_each_problem(context: Context) -> None:
    home = context.graph.layout.home
    write_text(home / "metrics.json", "{}")
    write_manifest(home / "metrics.json", {}, {"prompts/train": table(context)})
    perform(prompts.run, with_config(Config.model_validate({**CONFIG, "seed": 5}), context))
    flip(home / "metrics.json")
    (home / "values").mkdir()
    (home / "values" / "train.parquet").write_bytes(b"half")
    flip(context.graph.layout.provenance("prompts", "train"))
    problems = "\n".join(verify(home).problems)
    for found in (
        "metrics.json is not what metrics.manifest.json describes",
        "was made from another prompts/train than there is now",
        "values/train.parquet has no manifest",
        "prompts-train.json",
    ):
        assert found in problems


def test_verify_of_an_empty_folder_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no manifest"):
        verify(tmp_path)


def test_the_command_exits_with_1_when_something_is_wrong(context: Context) -> None:
    command = [sys.executable, "-m", "ziprc.cli", "verify", str(context.graph.layout.home)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    flip(table(context))
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and "1 problems" in failed.stdout


# --- what stands in the way ---


def test_a_second_writer_computes_nothing(context: Context) -> None:
    other = with_config(Config.model_validate({**CONFIG, "seed": 1}), context)
    code = (
        "import sys; from pathlib import Path; from ziprc.store.files import output_lock\n"
        "with output_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(table(context))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"being written by another process .pid {holder.pid}"):
        perform(prompts.run, other)
    holder.communicate()
    perform(prompts.run, other)


def test_a_missing_input_is_named_before_anything_is_computed(context: Context) -> None:
    with pytest.raises(UserError, match=r"checkpoints/base/ziprc\.json does not exist\. Build it first"):
        perform(lambda _: pytest.fail("ran"), Context(context.graph, Ref("rollouts", "train")))


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EROFS, "Make it"), (errno.EACCES, "Make it")],
)
def test_a_disk_that_refuses_is_explained(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(UserError, match=words), disk_errors_explained(tmp_path):
        raise OSError(number, os.strerror(number))


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk_errors_explained(tmp_path):
        raise KeyError("bug")
    with output_lock(tmp_path / "x"), pytest.raises(json.JSONDecodeError), disk_errors_explained(tmp_path):
        json.loads("{")


def test_splits_that_share_a_prompt_are_refused_by_what_trains_or_judges(context: Context) -> None:
    graph = context.graph
    assert {name for name, stage in graph.stages.items() if stage.held_out} == {
        "train_joint", "baselines", "calibration", "frontier", "train_critic", "train_policy", "train_online",
        "warm_up", "train_grader", "evaluate",
    }  # fmt: skip
    other = Context(graph, Ref("prompts", "test"))
    perform(prompts.run, other)
    refuse_shared_prompts(graph)
    PROMPTS.write(other.target, PROMPTS.read(table(context)))
    with pytest.raises(UserError, match=r"train.*test.*3"):
        refuse_shared_prompts(graph)

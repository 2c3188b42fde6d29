"""No half artifact under a final name, one writer at a time, manifests that hold nothing but content."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ziprc.errors import UserError
from ziprc.store.digests import derived_seed
from ziprc.store.files import atomic_folder, atomic_path, output_lock, read_json, require_space, write_json, write_text
from ziprc.store.manifest import write_manifest
from ziprc.workflow.build import lock_experiment
from ziprc.workflow.why import explain_plan


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as private:
        private.write_text("half")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_checkpoint_has_no_manifest_until_all_its_files_are_there(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as private:
        (private / "weights").write_text("1")
        (private / "ziprc.json").write_text("{}")
    with pytest.raises(RuntimeError), atomic_folder(target) as private:
        (private / "weights").write_text("2")
        raise RuntimeError
    assert (target / "weights").read_text() == "1" and (target / "ziprc.json").exists()
    with atomic_folder(target) as private:
        (private / "other").write_text("3")
        (private / "ziprc.json").write_text("{}")
    assert sorted(p.name for p in target.iterdir()) == ["other", "ziprc.json"]


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    target = tmp_path / "t.parquet"
    code = f"from pathlib import Path; from ziprc.store.files import output_lock; output_lock(Path({str(target)!r})).__enter__()"
    with output_lock(target):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode != 0 and "is being written by another process" in second.stderr


def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    child = 0
    try:
        with output_lock(tmp_path / "t.parquet"):
            child = os.fork()
            if not child:
                signal.pause()  # as between fork and exec, with a copy of every open file
        with output_lock(tmp_path / "t.parquet"):
            pass
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_the_same_content_gives_the_same_manifest(tmp_path: Path) -> None:
    texts = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_text(folder / "x.html", "same")
        write_manifest(folder / "x.html", {"seed": 1}, {})
        texts.append((folder / "x.manifest.json").read_text())
    assert texts[0] == texts[1]


def test_a_full_disk_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MiB free, but this stage needs"):
        require_space(tmp_path, 10**18)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match=r"m\.json is not valid JSON"):
        read_json(tmp_path / "m.json")


def test_two_builds_of_one_experiment_exclude_each_other(tmp_path: Path) -> None:
    lock_experiment(tmp_path / "toy")
    with pytest.raises(UserError, match=rf"is being built by process {os.getpid()} .*stop it \(`kill {os.getpid()}`\)"):
        lock_experiment(tmp_path / "toy")


def test_seeds_depend_on_every_part_and_fit_an_int64() -> None:
    seeds = {derived_seed(run, prompt, i) for run in range(3) for prompt in "ab" for i in range(50)}
    assert len(seeds) == 300 and max(seeds) < 2**63


PLAN = """
Job 3: grades: is the answer right? train of smoke
Reason: Missing output files: results/smoke/grades/train.parquet
Job 4: grades: is the answer right? test of smoke
Reason: Updated input files: results/smoke/rollouts/test.manifest.json
Job 5: report: the page, smoke
Reason: Input files updated by another job: results/smoke/metrics.json
"""


def test_a_plan_is_told_in_a_line_a_stage_and_then_in_sentences() -> None:
    told = explain_plan(PLAN)
    summary, _, details = told.partition("* ")
    first, _, grades, report, *_ = summary.split("\n")
    assert first == "3 jobs would run:"
    assert grades.split() == ["grades", "2", "not", "there", "(1),", "its", "input", "has", "changed", "(1)"]
    assert report.split() == ["report", "1", "its", "input", "is", "made", "anew"]
    assert "grades: is the answer right? train of smoke\n    not there: grades/train.parquet" in details
    assert explain_plan("Nothing to be done.") == "Nothing would rerun: everything is up to date."

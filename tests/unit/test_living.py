"""What counts as alive: jobs of SLURM in this folder, and locks that somebody holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ziprc.cli import parser
from ziprc.errors import UserError
from ziprc.store.files import output_lock
from ziprc.workflow import build, living
from ziprc.workflow.launch import root_of

LISTING = """13|RUNNING|{here}|rule_rollouts_wildcards_toy_train
14|PENDING|{here}|rule_train_joint_wildcards_toy-seed1_ziprc
15|RUNNING|/elsewhere|rule_base_wildcards_toy
"""


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for squeue, a shell script to be written by the test."""
    script = tmp_path / "bin" / "squeue"
    script.parent.mkdir()
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    return script


def answer(script: Path, body: str) -> None:
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)


def test_jobs_are_those_of_this_folder_and_say_what_they_make(squeue: Path, tmp_path: Path) -> None:
    answer(squeue, f"cat <<'END'\n{LISTING.format(here=tmp_path)}END")
    jobs = living.slurm_jobs(tmp_path)
    assert [(job.number, job.task) for job in jobs] == [
        ("13", "rollouts toy_train"),
        ("14", "train_joint toy-seed1_ziprc"),
    ]
    assert str(jobs[0].living()) == "SLURM job 13, RUNNING: rollouts toy_train (stop it: `scancel 13`)"


def test_an_experiment_has_its_own_jobs_only(squeue: Path, tmp_path: Path) -> None:
    answer(squeue, f"cat <<'END'\n{LISTING.format(here=tmp_path)}END")
    assert [job.number for job in living.slurm_jobs(tmp_path, "toy")] == ["13"]
    assert [job.number for job in living.slurm_jobs(tmp_path, "toy-seed1")] == ["14"]


def test_commands_without_a_cluster_mean_no_jobs(squeue: Path, tmp_path: Path) -> None:
    answer(squeue, f"echo 'squeue: fatal: {living.NO_CLUSTER}' >&2; exit 1")
    assert living.slurm_jobs(tmp_path) == []


def test_a_cluster_that_does_not_answer_is_no_empty_answer(squeue: Path, tmp_path: Path) -> None:
    answer(squeue, "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        living.slurm_jobs(tmp_path)


def test_waiting_ends_with_the_last_job_and_says_once_in_a_while_for_what(
    squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(living, "SECONDS_BETWEEN_LOOKS", 0)
    line = f"7|RUNNING|{tmp_path}|rule_base_wildcards_toy"
    looks = tmp_path / "looks"
    answer(squeue, f"echo x >> {looks}; case $(wc -l < {looks}) in 1|3) echo '{line}';; 2) exit 1;; esac")
    said: list[str] = []
    living.wait_for_jobs(tmp_path, "toy", said.append)
    assert len(looks.read_text().split()) == 4, "an answer that fails is not the end of the jobs"
    assert len(said) == 1 and "7 (base toy, running)" in said[0] and "scancel 7" in said[0]


def test_ctrl_c_while_waiting_starts_nothing(squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(living.time, "sleep", interrupt)
    answer(squeue, f"echo '7|RUNNING|{tmp_path}|rule_base_wildcards_smoke'")
    config_file = root_of(Path(__file__)) / "config.yaml"
    options = parser().parse_args(["build", "--experiment", "smoke", "--config-file", str(config_file)])
    assert build.build(options) == 130
    assert not (tmp_path / ".snakemake").exists()


def test_the_job_that_snakemake_runs_in_is_not_waited_for(
    squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(squeue, f"cat <<'END'\n{LISTING.format(here=tmp_path)}END")
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert [job.number for job in living.slurm_jobs(tmp_path)] == ["14"]


@pytest.mark.parametrize(
    "output, command",
    [
        ("echo 'AccountingStorageType   = accounting_storage/slurmdbd'", "sacct"),
        ("echo 'AccountingStorageType   = accounting_storage/none'", "squeue"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "squeue"),
    ],
)
def test_accounting_decides_how_the_end_of_jobs_is_known(squeue: Path, output: str, command: str) -> None:
    answer(squeue.with_name("scontrol"), output)
    answer(squeue.with_name("sacct"), "exit 0")
    assert living.status_command() == command


def test_a_lock_is_alive_while_somebody_holds_it(tmp_path: Path) -> None:
    target = tmp_path / "toy" / "grades" / "train.parquet"
    with output_lock(target):
        assert list(living.locks(tmp_path)) == [target.parent / ".train.parquet.lock"]
        holder = living.everything(tmp_path, tmp_path)
    assert [one.stop for one in holder] == [f"kill {os.getpid()}"]
    assert list(living.locks(tmp_path)) == []


def unlock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    config = root_of(Path(__file__)) / "config.yaml"
    return build.unlock(parser().parse_args(["unlock", "--experiment", "smoke", "--config-file", str(config)]))


def test_unlock_refuses_while_a_lock_is_held_and_names_every_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock of an experiment is inherited, so a stage that outlived its build is as much a holder as the build."""
    handle = build.lock_experiment(tmp_path / "results" / "smoke")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[handle])
    try:
        with pytest.raises(UserError) as refused:
            unlock(tmp_path, monkeypatch)
        both = sorted([os.getpid(), child.pid])
        assert f"stop it: `kill {both[0]} {both[1]}`" in str(refused.value)
        os.close(handle)
        with pytest.raises(UserError, match=rf"process {child.pid} \(-c import time.*stop it: `kill {child.pid}`"):
            unlock(tmp_path, monkeypatch)
    finally:
        child.kill()
        child.wait()
    assert "nothing was locked" in unlock(tmp_path, monkeypatch)


def test_unlock_removes_a_lock_that_nobody_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".snakemake" / "locks" / "0.output.lock"
    left.parent.mkdir(parents=True)
    left.write_text("results/smoke/prompts/train.parquet\n")
    assert "lock was removed" in unlock(tmp_path, monkeypatch)
    assert not left.exists()
    assert "nothing was locked" in unlock(tmp_path, monkeypatch)

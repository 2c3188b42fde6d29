"""Only what changed reruns. Every expectation is Snakemake's own plan over a really built experiment."""

from __future__ import annotations

import re

import pytest

from tests.workflow.conftest import Workplace
from ziprc.store.digests import digest_file

pytestmark = pytest.mark.slow

SAMPLERS = {"calibration", "frontier", "samples", "report"}  # what is made of the pools
BELOW_ZIPRC = {"introspection", "rollouts", "grades", "evaluate", "train_joint"} | SAMPLERS


def stages(jobs: list[str]) -> set[str]:
    return {job.partition(":")[0] for job in jobs}


def test_a_finished_experiment_is_up_to_date(built: Workplace) -> None:
    assert built.planned() == []


def test_runtime_keys_rerun_nothing(built: Workplace) -> None:
    assert built.planned("runtime.max_num_seqs=7", "runtime.rollouts_per_device=4", "runtime.mem_mb=1234") == []
    assert built.planned("runtime.gpus=8", "runtime.nodes=2", "runtime.accelerate=ddp") == []


def test_kl_of_the_final_head_reruns_that_head_and_what_depends_on_it(built: Workplace) -> None:
    jobs = built.planned("train_joint.ziprc.kl=25")
    assert stages(jobs) == BELOW_ZIPRC
    assert [job for job in jobs if job.startswith("train_joint")] == ["train_joint: the joint head ziprc of micro"]
    assert not any("for train " in job or "for test of" in job for job in jobs if job.startswith("rollouts"))


def test_a_grader_change_reruns_grades_and_below(built: Workplace) -> None:
    jobs = built.planned("grades.rule=countdown")
    assert stages(jobs) == {
        "grades", "train_joint", "values", "introspection", "rollouts", "baselines", "train_critic", "qvalues",
        "train_policy", "guided", "train_online", "warm_up", "assessments", "gradings", "train_grader",
        "evaluate", *SAMPLERS,
    }  # fmt: skip
    assert not any(job.startswith("rollouts: responses for train") for job in jobs)


def test_more_test_prompts_leave_the_training_side_alone(built: Workplace) -> None:
    jobs = built.planned("prompts.test=30")
    assert not any(job.startswith(("base:", "train_", "rollouts: responses for train")) for job in jobs)


def test_the_validation_side_is_the_pool_alone(built: Workplace) -> None:
    jobs = built.planned("prompts.validation=20")
    recorded = {"prompts", "rollouts", "grades", "introspection"}
    online = {"train_online", "assessments", "evaluate"}  # which is judged on them while it learns
    assert stages(jobs) == recorded | SAMPLERS | online
    own = [job for job in jobs if job.partition(":")[0] in recorded and "online" not in job]
    assert len(own) >= 4 and all("validation" in job for job in own)


def test_a_larger_pool_reruns_the_pools_and_what_is_read_from_them(built: Workplace) -> None:
    jobs = built.planned("rollouts.pool_samples=4")
    recorded = {"rollouts", "grades", "introspection"}
    assert stages(jobs) == recorded | SAMPLERS | {"evaluate"}
    pools = [job for job in jobs if job.partition(":")[0] in recorded]
    assert all("validation-ziprc" in job or "test-ziprc" in job for job in pools)


def test_sampling_keys_leave_everything_before_them_alone(built: Workplace) -> None:
    assert stages(built.planned("samples.prompts=3")) == {"samples", "report"}
    assert stages(built.planned("frontier.orders=3")) == {"frontier", "samples", "report"}


def test_a_deleted_artifact_is_rebuilt_alone_and_comes_out_the_same(workplace: Workplace) -> None:
    victim = workplace.home / "grades" / "train.parquet"
    before = digest_file(victim)
    victim.unlink()
    done = workplace.run("build")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert digest_file(victim) == before
    assert set(re.findall(r"^Job \d+: (\w+):", done.stdout + done.stderr, re.M)) == {"grades"}
    assert workplace.planned() == []


def test_a_failed_stage_leaves_the_old_artifact_in_place(workplace: Workplace) -> None:
    prompts, grades = workplace.home / "prompts" / "train.parquet", workplace.home / "grades" / "train.parquet"
    before = digest_file(grades)
    prompts.write_bytes(prompts.read_bytes()[:-200])
    done = workplace.run("build", str(grades.relative_to(workplace.folder)), "--set", "grades.rule=math")
    assert done.returncode != 0
    assert "prompts/train.parquet is not what train.manifest.json describes" in done.stdout + done.stderr
    assert digest_file(grades) == before

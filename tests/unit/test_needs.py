"""What a rule asks of a cluster, by its class, its experiment and its site."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ziprc.config.base import Runtime
from ziprc.errors import UserError
from ziprc.workflow.launch import root_of
from ziprc.workflow.needs import check_sites, resource_names, resources, threads

ROOT = root_of(Path(__file__))
SITES = {
    "cpu": {"slurm_partition": "small", "threads": 4},
    "gpu": {
        "slurm_partition": "a100",
        "threads": 8,
        "gres": "gpu:a100",
        "qos": "high",
        "max_mem_mb": 250,
        "max_runtime": 60,
    },
    "big-gpu": {"slurm_partition": "a100", "threads": 32},
}
GPUS = Runtime(gpus=8, mem_mb=100, cpu_mem_mb=10, runtime_min=90)


def test_without_gpus_everything_goes_where_the_cpus_are() -> None:
    runtime = Runtime(gpus=0, mem_mb=100)
    for kind in SITES:
        asked = resources(kind, runtime, SITES, attempt=1)
        assert (asked["slurm_partition"], asked["gpus"], asked["gres"], asked["mem_mb"]) == ("small", 0, None, 100)
        assert threads(kind, runtime, SITES) == 4


def test_gpus_are_asked_for_on_every_node_of_the_class_that_uses_them() -> None:
    asked = resources("gpu", GPUS, SITES, attempt=1)
    assert asked["gres"] == "gpu:a100:8" and asked["gpus"] == 8 and asked["qos"] == "high"
    assert "gpus" not in SITES["cpu"] and resources("cpu", GPUS, SITES, attempt=1)["gres"] is None


def test_memory_grows_with_the_attempt_up_to_what_a_node_has_and_time_is_cut() -> None:
    asked = [resources("gpu", GPUS, SITES, attempt)["mem_mb"] for attempt in (1, 2, 3)]
    assert asked == [100, 200, 250]
    assert [resources("cpu", GPUS, SITES, attempt)["mem_mb"] for attempt in (1, 2)] == [10, 20]
    assert resources("gpu", GPUS, SITES, 1)["runtime"] == 60 and resources("cpu", GPUS, SITES, 1)["runtime"] == 90


def test_only_training_takes_several_nodes_with_one_task_each() -> None:
    runtime = Runtime(gpus=8, nodes=3)
    asked = resources("big-gpu", runtime, SITES, attempt=1)
    assert (asked["nodes"], asked["tasks"], asked["tasks_per_gpu"], asked["mpi"]) == (3, 3, 0, "srun")
    alone = resources("gpu", runtime, SITES, attempt=1)
    assert alone["nodes"] == 1 and "mpi" not in alone and "tasks" not in alone


def test_a_site_adds_whatever_resource_the_executor_knows() -> None:
    assert {"qos", "slurm_partition", "mem_mb"} <= set(resource_names(SITES))
    assert not {"threads", "max_mem_mb"} & set(resource_names(SITES))


def test_no_profile_means_no_partition_and_one_thread() -> None:
    assert "slurm_partition" not in resource_names({}) and threads("gpu", GPUS, {}) == 1


def test_a_misspelt_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"'bigGpu' \(did you mean 'big-gpu'\?\)"):
        check_sites({"bigGpu": {}})


def test_the_profile_says_everything_a_site_edits_before_anything_else() -> None:
    text = (ROOT / "profiles" / "slurm" / "config.yaml").read_text()
    keys = [line.partition(":")[0] for line in text.splitlines() if line[:1].strip(" #")]
    assert keys[0] == "classes" and not [key for key in keys[1:] if "partition" in key or "account" in key]
    assert set(yaml.safe_load(text)["classes"]) == {"cpu", "gpu", "big-gpu"}

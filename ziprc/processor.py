"""Whether the processor computes in bfloat16. One that does not emulates it, many times slower than float32 would be.

So float32 is used wherever the choice is ours. Reads /proc/cpuinfo; a system without that file counts as one that cannot.
"""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last is Arm's name


def instructions(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The names of the instruction sets, as Linux writes them; empty where nobody says."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = (line.partition(":") for line in lines)
    return frozenset(next((names.split() for key, _, names in found if key.strip() in ("flags", "Features")), ()))


def native_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    return bool(instructions(cpuinfo) & BFLOAT16)

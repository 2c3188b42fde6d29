"""Which processors are taken to compute in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest

from ziprc.processor import instructions, native_bfloat16


@pytest.mark.parametrize(
    ("line", "native"),
    [("flags\t\t: fpu avx2 avx512f avx512_bf16", True), ("flags\t\t: fpu avx512f amx_bf16", True),
     ("Features\t: asimd bf16", True), ("flags\t\t: fpu avx2", False), ("vmx flags\t: avx512_bf16", False)],
)  # fmt: skip
def test_a_processor_computes_in_bfloat16_when_it_names_the_instructions(
    tmp_path: Path, line: str, native: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert native_bfloat16(cpuinfo) == native


def test_where_nobody_says_there_are_none(tmp_path: Path) -> None:
    assert instructions(tmp_path / "none") == frozenset()

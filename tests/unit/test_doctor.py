"""`ziprc doctor` names each problem and what to do about it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ziprc.workflow import doctor


def test_a_version_that_differs_from_the_lock_is_a_problem_with_a_remedy() -> None:
    check = doctor.package_check("pyarrow", ("pyarrow",), {"pyarrow": "1.0"}, optional=False)
    assert "the lock pins 1.0" in check.problem and "make install" in check.problem


def test_a_local_build_of_the_pinned_version_agrees() -> None:
    found = doctor.installed("torch")
    assert found is not None
    assert not doctor.package_check("torch", ("torch",), {"torch": found.partition("+")[0]}, optional=False).problem


def test_a_missing_package_is_a_problem_unless_it_is_optional() -> None:
    assert doctor.package_check("x", ("no-such-distribution",), {}, optional=False).problem
    assert not doctor.package_check("x", ("no-such-distribution",), {}, optional=True).problem


def test_the_table_has_a_row_for_every_check_and_counts_problems() -> None:
    checks = [doctor.Check("a", "1"), doctor.Check("b", "2", "mend it")]
    text = doctor.format_table(checks)
    assert "! mend it" in text and text.endswith("1 problems")


def test_the_installed_environment_matches_its_lock() -> None:
    problems = [c for c in doctor.diagnose() if c.problem and c.what not in ("memory", "disk", "devices")]
    assert problems == []


def test_the_processor_is_named_and_never_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "native_bfloat16", lambda: False)
    check = doctor.processor_check()
    assert check.found.endswith("bf16 instructions: no; float32 is used") and not check.problem
    assert "processor" in [one.what for one in doctor.diagnose("cpu")]


def test_before_anything_is_installed_it_runs_and_says_so() -> None:
    """With a bare Python, which has none of our packages and none of theirs."""
    root = Path(doctor.__file__).parents[2]
    command = [sys.executable, "-S", "-E", "-m", "ziprc.workflow.doctor", "--accelerator", "cpu"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(r"packages +not installed +! run `make install`", done.stdout), (
        done.stderr
    )

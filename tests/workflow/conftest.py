"""A real workflow run, small enough for tests: built once, copied where a test wants to spoil it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MICRO = Path(__file__).parent / "micro.yaml"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of fault trials, when there were any."""
    from tests.workflow.faults import LEDGER

    if LEDGER.trials:
        terminalreporter.section("trials that went as they must, by stage and fault")
        terminalreporter.write_line(LEDGER.table())


class Workplace:
    """A folder with `results/` in it, and the command line to work there."""

    def __init__(self, folder: Path, config_file: Path = MICRO, experiment: str = "micro") -> None:
        self.folder, self.config_file, self.experiment = folder, config_file, experiment

    @property
    def home(self) -> Path:
        return self.folder / "results" / self.experiment

    def command(self, verb: str, *more: str) -> list[str]:
        options = ["--config-file", str(self.config_file), "--experiment", self.experiment]
        return [sys.executable, "-m", "ziprc.cli", verb, *options, *more]

    def run(self, verb: str, *more: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(verb, *more),
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def planned(self, *overrides: str, targets: tuple[str, ...] = ()) -> list[str]:
        """First words of the messages of the jobs that would run, e.g. `grades` or `train_joint ziprc`."""
        answer = self.run("why", *targets, *(["--set", *overrides] if overrides else []))
        assert answer.returncode == 0, answer.stderr
        return [line.removeprefix("* ") for line in answer.stdout.splitlines() if line.startswith("* ")]

    def tables(self) -> dict[str, str]:
        """sha256 of every table by name."""
        from ziprc.store.digests import digest_file

        return {str(p.relative_to(self.home)): digest_file(p) for p in sorted(self.home.rglob("*.parquet"))}


def environment() -> dict[str, str]:
    """The test's environment with this checkout's package and the interpreter's scripts in front."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The micro experiment, built once from nothing.

    In the folder ZIPRC_BUILT if that is set: there it stays for the next layer, whose build finds that nothing would rerun,
    as does that of another half of this layer, which waits until this one is done.
    """
    place = Workplace(Path(os.environ.get("ZIPRC_BUILT") or tmp_path_factory.mktemp("built")))
    folder = os.open(place.folder, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        done = place.run("build", timeout=900)
    finally:
        os.close(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place


@pytest.fixture
def workplace(built: Workplace, tmp_path: Path) -> Workplace:
    """A copy of the built experiment, with Snakemake's memory, for a test to spoil."""
    shutil.copytree(built.folder, tmp_path / "place", copy_function=shutil.copy2)
    return Workplace(tmp_path / "place")

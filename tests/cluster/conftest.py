"""A real SLURM for the session, brought up on loopback by slurm.sh and taken down again; named skips where it cannot be."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from tests.workflow.conftest import MICRO, ROOT, Workplace, environment

SCRIPT = Path(__file__).with_name("slurm.sh")
PROFILE = ROOT / "profiles" / "slurm" / "config.yaml"

DAEMONS = re.compile(r"\bslurm(ctld|d|stepd|scriptd)\b")

GRADES = "results/micro/grades/train.parquet"
BASE = "results/micro/checkpoints/base/ziprc.json"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "OUT_OF_MEMORY", "TIMEOUT")
STARTED: list[subprocess.Popen[bytes]] = []
NOTES: list[str] = []  # what the closing paragraph says besides

# What the tests change in the profile that users get: a small machine, where waiting for polls would take longest.
CHANGES = {
    "classes": {
        "cpu": {"slurm_partition": "cpu", "threads": 1},
        "gpu": {"slurm_partition": "gpu", "threads": 1},
        "big-gpu": {"slurm_partition": "gpu", "threads": 1},
    },
    "slurm-init-seconds-before-status-checks": 5,
    "slurm-keep-successful-logs": True,
    "latency-wait": 10,
}


@dataclass(frozen=True)
class Job:
    """A job as squeue remembers it: state, comment, partition, nodes, memory, GPUs of a node."""

    number: str
    state: str
    comment: str
    partition: str
    nodes: str
    memory: str
    gres: str

    @property
    def rule(self) -> str:
        return self.comment.removeprefix("rule_").partition("_wildcards_")[0]


@dataclass(frozen=True)
class Cluster:
    """The running cluster, and the profile to build on it with."""

    folder: Path
    profile: Path

    def jobs(self, place: Workplace) -> list[Job]:
        """Every job that was ever submitted from a folder, in order."""
        command = ["squeue", "--noheader", "--states=all", "--sort=i", "--format=%i|%T|%k|%P|%N|%m|%b|%Z"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        rows = [line.split("|") for line in lines]
        return [Job(*row[:7]) for row in rows if row[7] == str(place.folder)]

    def start(self, place: Workplace, *more: str) -> subprocess.Popen[bytes]:
        """`ziprc build` in a session of its own, for a test to disturb; what it prints goes to `build.log`."""
        return started(place.command("build", "--profile", str(self.profile), *more), place)

    def build(self, place: Workplace, *more: str) -> str:
        """`ziprc build` to a good end; what it printed."""
        done = place.run("build", "--profile", str(self.profile), *more, timeout=300)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def ended_jobs(self, place: Workplace) -> list[Job]:
        """The same, once they have all ended: a cancelled job takes some seconds to."""
        wait_until(lambda: all(job.state in ENDED for job in self.jobs(place)))
        return self.jobs(place)

    def running_stage(self, place: Workplace, process: subprocess.Popen[bytes]) -> Job:
        """The one job of a folder, as soon as its stage has begun."""

        def begun() -> bool:
            jobs = self.jobs(place)
            return bool(jobs) and jobs[-1].state == "RUNNING" and any(place.home.glob("logs/*.log"))

        wait_until(begun, process)
        return self.jobs(place)[-1]


def started(command: list[str], place: Workplace) -> subprocess.Popen[bytes]:
    """A command in a session of its own, which ends with the test at the latest."""
    with open(place.folder / "build.log", "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=place.folder,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` ignores it
        )
    STARTED.append(process)
    return process


def wait_until(
    happens: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = 120
) -> None:
    limit = time.monotonic() + seconds
    while not happens():
        assert process is None or process.poll() is None, "the build ended before the moment came"
        assert time.monotonic() < limit, "the moment never came"
        time.sleep(0.2)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    """An empty folder to build the micro experiment in; what a failed test left running there is ended."""
    yield Workplace(tmp_path, MICRO, "micro")
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="snakemake-executor-plugin-slurm is not installed")
    check = subprocess.run([SCRIPT, "check"], capture_output=True, text=True)
    if check.returncode:
        pytest.skip(f"no SLURM can be brought up: {check.stdout.strip()}")
    folder = tmp_path_factory.mktemp("slurm")
    profile = folder / "profile"
    profile.mkdir()
    (profile / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(PROFILE.read_text()) | CHANGES))
    up = subprocess.run([SCRIPT, "up", folder, str(os.getpid())], capture_output=True, text=True, timeout=60)
    assert up.returncode == 0, up.stdout + up.stderr
    try:
        yield Cluster(folder, profile)
    finally:
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=60)
        assert left_behind(folder) == [], "the cluster was not taken down cleanly"


def left_behind(folder: Path) -> list[str]:
    """Daemons, links, device nodes and cgroups of a cluster that should be gone."""
    listing = subprocess.run(["ps", "-eww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    daemons = [line for line in listing.splitlines() if str(folder) in line or DAEMONS.search(line)]
    links = [str(p) for p in Path("/etc/slurm").glob("*.conf") if p.is_symlink() and str(folder) in os.readlink(p)]
    devices = [str(p) for p in folder.rglob("*") if p.is_char_device() or p.is_socket()]
    cgroups = [str(p) for p in Path("/sys/fs/cgroup").glob("*/slurm*")]
    return [*daemons, *links, *devices, *cgroups]


@dataclass(frozen=True)
class Builds:
    """Builds that run side by side, since each of them mostly waits for the next poll."""

    cancelled: Workplace  # `base`, whose first job is cancelled from outside
    forced: Workplace  # `base`, started again past all guards while a job of a killed Snakemake makes it
    cluster: Workplace  # the first four stages, with two GPUs
    local: Workplace  # the same on this machine, without SLURM
    hungry: Workplace  # `base` with too little memory
    spread: Workplace  # `base` on two nodes
    pair: Workplace  # `base` by two processes of this machine


@pytest.fixture(scope="session")
def builds(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    made = Builds(*(Workplace(tmp_path_factory.mktemp(field.name), MICRO, "micro") for field in fields(Builds)))
    running = [
        cancel_first_job(cluster, made.cancelled),
        start_beside_living_job(cluster, made.forced),
        cluster.start(made.cluster, GRADES, "--set", "runtime.gpus=2"),
        cluster.start(made.hungry, BASE, "--set", "runtime.mem_mb=500"),
        cluster.start(made.spread, BASE, "--set", "runtime.accelerate=cpus", "runtime.nodes=2", "runtime.gpus=1"),
        started(made.local.command("build", GRADES), made.local),
        started(made.pair.command("run", "base", "--name", "base", "--set", "runtime.accelerate=cpus"), made.pair),
    ]
    codes = [process.wait(timeout=400) for process in running]
    assert not any(codes), (codes, *(said(place)[-2000:] for place in vars(made).values()))
    return made


def cancel_first_job(cluster: Cluster, place: Workplace) -> subprocess.Popen[bytes]:
    build = cluster.start(place, BASE)
    subprocess.run(["scancel", cluster.running_stage(place, build).number], check=True)
    return build


def start_beside_living_job(cluster: Cluster, place: Workplace) -> subprocess.Popen[bytes]:
    """As after `snakemake --unlock` by somebody who does not look whether anything is alive."""
    command = [*plain_snakemake(cluster, place, "--nolock", BASE), "set=base.tokens=200000"]
    killed = started(command, place)
    cluster.running_stage(place, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    return started(command, place)


def plain_snakemake(cluster: Cluster, place: Workplace, *more: str) -> list[str]:
    """The command line of somebody who uses neither make nor `ziprc build`."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--workflow-profile", str(cluster.profile), *more]
    return [*command, "--config", "experiment=micro", f"config_file={place.config_file}"]


def said(place: Workplace) -> str:
    """What a build printed."""
    return (place.folder / "build.log").read_text()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One closing paragraph: how many tests ran on a real SLURM, how long, and which did not and why."""
    here = str(Path(__file__).parent.relative_to(ROOT))
    found = {
        outcome: [r for r in terminalreporter.stats.get(outcome, []) if getattr(r, "nodeid", "").startswith(here)]
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if not any(found.values()):
        return
    seconds = sum(r.duration for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration"))
    counts = ", ".join(f"{len(reports)} {outcome}" for outcome, reports in found.items() if reports)
    which = shutil.which("slurmd")
    version = subprocess.run([which, "-V"], capture_output=True, text=True).stdout.strip() if which else "no SLURM"
    terminalreporter.write_line(f"cluster: {counts} in {seconds:.0f} s, on {version}")
    for note in NOTES:
        terminalreporter.write_line(f"  {note}")
    for report in found["skipped"]:
        terminalreporter.write_line(f"  not run: {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")

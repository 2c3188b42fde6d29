"""What goes wrong, done for real to one stage of a built experiment: signals, full disks, flipped bits, jumping clocks.

A `Bench` is a copy of the built experiment in which one artifact is to be made again. After every fault the artifact is
either absent or whole, and when the cause is gone the same command ends in the bytes of the undisturbed run. `Ledger`
counts the trials for the table that is printed at the end.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.workflow.conftest import MICRO, Workplace, environment
from ziprc.config.load import load
from ziprc.errors import UserError
from ziprc.plan.stage import Ref
from ziprc.stages.context import Context
from ziprc.store.digests import digest_file
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import described_files
from ziprc.systems import graph_of

STAGES = {
    "prompts": "train",
    "base": "base",
    "rollouts": "train",
    "grades": "train",
    "train_joint": "ziprc",
    "values": "train",
    "introspection": "ziprc",
    "baselines": "test",
    "calibration": "ziprc",
    "frontier": "frontier",
    "samples": "zip-rc-plus-branching",
    "train_critic": "critic",
    "qvalues": "train",
    "guided": "test-guided-exp",
    "train_policy": "policy-kl",
    "train_online": "online-adaptive",
    "expand": "expanded-signs",
    "warm_up": "warmed-dialect",
    "rubrics": "test",
    "assessments": "train",
    "gradings": "train",
    "train_grader": "grader-main",
    "evaluate": "zip-rc",
    "report": "report",
}
PATIENCE_S = 300
TRIES = 5  # at striking before the stage is done
ENDS_WITHIN_S = 60  # after SIGTERM, or after its main process died
PAGE = 4096  # of a tmpfs
DAY_S = 86400
CLOCK = Path(__file__).parent / "clock.c"


SECONDS: dict[tuple[str, tuple[str, ...]], float] = {}  # of an undisturbed run


class Ledger:
    """How many trials of a fault a stage has come through."""

    def __init__(self) -> None:
        self.trials: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, fault: str, stage: str, count: int = 1) -> None:
        self.trials[fault][stage] += count

    def table(self) -> str:
        """Markdown: stages down, faults across, trials that went as they must."""
        faults = list(self.trials)
        rows = [f"| stage | {' | '.join(faults)} |", "|---" * (len(faults) + 1) + "|"]
        stages = [s for s in STAGES if any(s in self.trials[f] for f in faults)]
        stages += sorted({s for f in faults for s in self.trials[f]} - set(stages))
        for stage in stages:
            counts = [str(self.trials[fault].get(stage, "")) for fault in faults]
            rows.append(f"| {stage} | {' | '.join(counts)} |")
        sums = [str(sum(self.trials[fault].values())) for fault in faults]
        return "\n".join([*rows, f"| **all** | {' | '.join(sums)} |"])


LEDGER = Ledger()


class Bench:
    """A copy of a built experiment in which the artifact of one stage is to be made again."""

    def __init__(
        self, built: Workplace, folder: Path, stage: str, overrides: tuple[str, ...] = (), name: str | None = None
    ) -> None:
        shutil.copytree(built.home, folder / "results" / built.experiment, copy_function=shutil.copy2)
        self.folder, self.stage, self.name, self.overrides = folder, stage, name or STAGES[stage], overrides
        self.config = load(MICRO, built.experiment, overrides)
        self.layout = Layout(folder / "results", built.experiment)
        self.context = Context(graph_of(self.config, self.layout), Ref(stage, self.name))
        self.target = self.context.target
        # The report shows times, so what is wanted of it, as of another setting, is what the first undisturbed run makes.
        self.wanted = {} if overrides or stage == "report" else self.found()
        self.bytes = sum(path.stat().st_size for path in described_files(self.manifest))
        self.forget()

    @property
    def manifest(self) -> Path:
        return manifest_of(self.target)

    @property
    def parents(self) -> dict[str, Path]:
        return self.context.reads

    def found(self) -> dict[str, str]:
        """Digests of the artifact and of its manifest, after a check of one against the other."""
        found = {self.manifest.name: digest_file(self.manifest)}
        for path, digest in described_files(self.manifest).items():
            assert digest_file(path) == digest, f"{path} is not what its manifest describes"
            found[path.name] = digest
        return found

    def forget(self) -> None:
        """Remove the artifact and all that is kept for making it."""
        if not self.target.suffix:
            shutil.rmtree(self.target, ignore_errors=True)
        for path in (self.target, self.manifest, self.layout.provenance(self.stage, self.name)):
            if path.is_file():
                path.unlink()
        for kept in (f".{self.target.name}.training", f".{self.target.stem}.pieces"):
            shutil.rmtree(self.target.parent / kept, ignore_errors=True)

    def check_partial(self) -> None:
        """Nothing wrong or half under the final name: absent, or to the bit what an undisturbed run makes."""
        if self.manifest.exists():
            self.check_same()
        elif self.target.suffix and self.target.exists():
            assert digest_file(self.target) == self.wanted[self.target.name]

    def check_final(self) -> None:
        """The artifact of the undisturbed run, to the bit."""
        self.wanted = self.wanted or self.found()
        self.check_same()

    def check_same(self) -> None:
        found = self.found()
        assert found == self.wanted, (
            f"other bytes in {[name for name in found if found[name] != self.wanted.get(name)]}"
        )

    # --- processes ---

    def command(self, *more: str) -> list[str]:
        """`ziprc run` of the stage, as Snakemake calls it."""
        options = ["--config-file", str(MICRO), "--experiment", self.layout.experiment, "--name", self.name]
        changed = [*self.overrides, *more]
        sets = ["--set", *changed] if changed else []
        return [sys.executable, "-m", "ziprc.cli", "run", self.stage, *options, *sets]

    def start(self, *more: str, command: list[str] | None = None, env: dict[str, str] | None = None) -> Running:
        return Running(command or self.command(*more), self.folder, {**environment(), **(env or {})})

    def finish(self, *more: str) -> str:
        """Run to the end; the log. The result must be that of the undisturbed run."""
        running = self.start(*more)
        code = running.wait(PATIENCE_S)
        assert code == 0, running.log()
        self.check_final()
        return running.log()

    def timed(self) -> float:
        """Seconds of an undisturbed run, measured once; the artifact is to be made again afterwards."""
        key = (self.stage, self.overrides)
        if key not in SECONDS or not self.wanted:
            started = time.monotonic()
            self.finish()
            SECONDS[key] = time.monotonic() - started
        self.forget()
        return SECONDS[key]


class Running:
    """A stage in a session of its own, children included."""

    count = 0

    def __init__(self, command: list[str], folder: Path, env: dict[str, str]) -> None:
        Running.count += 1
        self.file = folder / f"run-{Running.count}.log"
        with open(self.file, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def log(self) -> str:
        return self.file.read_text(errors="replace")

    def wait(self, seconds: float) -> int | None:
        """The exit code; None when it still runs after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def members(self) -> list[psutil.Process]:
        """Every living process of the session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and not _is_gone(process):
                    found.append(process)
        return found

    def signal_all(self, number: int) -> None:
        """At once to the stage's process group, which all of the session are in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill_all(self) -> None:
        """SIGKILL to the whole session, until nothing of it is left."""
        self.signal_all(signal.SIGKILL)
        self.process.wait()
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.ends()

    def ends(self, seconds: float = ENDS_WITHIN_S) -> None:
        """Wait until nothing of the session lives."""
        limit = time.monotonic() + seconds
        while self.members():
            assert time.monotonic() < limit, f"still alive after {seconds} s: {self.members()}\n{self.log()}"
            self.process.poll()
            time.sleep(0.05)
        self.process.wait()

    def until(self, happens: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
        """Wait for a moment; False when the process ended before it came."""
        limit = time.monotonic() + seconds
        while not happens():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < limit, f"the moment never came\n{self.log()}"
            time.sleep(0.002)
        return True


def moment(rng: random.Random, seconds: float) -> float:
    """When to strike: mostly while the stage works, now and then while it starts."""
    return rng.uniform(0.55 if rng.random() < 0.75 else 0.05, 1.0) * seconds


# --- faults that need processes: each returns when the stage has come through ---


def kill(bench: Bench, rng: random.Random, kills: int, chains: int) -> None:
    """`kill -9` of everything at random moments, some in a row, then the same command again."""
    seconds = bench.timed()
    for chain in range(chains):
        done = 0
        while done < kills // chains:
            running = bench.start()
            if running.wait(moment(rng, seconds)) is not None:
                assert running.process.returncode == 0, running.log()
                bench.check_final()
                bench.forget()
                seconds *= 0.95  # too late: the machine is less busy than it was
                continue
            running.kill_all()
            bench.check_partial()
            done += 1
            LEDGER.add("kill -9", bench.stage)
        bench.finish()
        if chain < chains - 1:
            bench.forget()


def kill_main(bench: Bench, rng: random.Random) -> None:
    """SIGKILL to the stage's own process alone: what it has started must not go on by itself."""
    seconds = bench.timed()
    with_workers = ["runtime.workers=2"] if bench.stage == "rollouts" else []
    running = bench.start(*with_workers)
    running.wait(moment(rng, seconds))
    running.process.kill()
    running.ends()
    bench.check_partial()
    bench.finish(*with_workers)
    LEDGER.add("main killed", bench.stage)


def terminate(bench: Bench, rng: random.Random) -> None:
    """SIGTERM to every process, as a scheduler does that preempts; training saves its state and goes on from it."""
    seconds = bench.timed()
    trains = not bench.target.suffix and bench.stage != "expand"  # a checkpoint that is made in one go
    states = bench.target.parent / f".{bench.target.name}.training"
    for _ in range(TRIES):
        running = bench.start()
        if trains:
            running.until(lambda: any(states.glob("*/checkpoint-*/complete.json")))
        else:
            running.wait(moment(rng, seconds))
        running.signal_all(signal.SIGTERM)
        running.ends()
        bench.check_partial()
        if "the training state is saved" in running.log() if trains else not bench.manifest.exists():
            break
        bench.forget()  # it was done before the signal came
    log = bench.finish()
    if trains:
        assert "the training state is saved" in running.log() and "resuming from step" in log
    LEDGER.add("SIGTERM", bench.stage)


def two_at_once(bench: Bench, rng: random.Random) -> None:
    """The same stage twice: one writes, the other is told who does, or finds it done."""
    bench.forget()
    first = bench.start()
    time.sleep(rng.uniform(0, 0.5))
    second = bench.start()
    codes = [running.wait(PATIENCE_S) for running in (first, second)]
    logs = first.log() + second.log()
    assert "is being written by another process" in logs or "nothing to do" in logs, logs
    assert 0 in codes and None not in codes, logs
    bench.check_final()
    LEDGER.add("two at once", bench.stage)


def clock_jump(bench: Bench, rng: random.Random) -> None:
    """The clock falls back by 400 days, or leaps ahead, while the stage runs."""
    seconds = bench.timed()
    shift, library = bench.folder / "shift", bench.folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(CLOCK)], check=True)
    shift.write_text("0")
    running = bench.start(env={"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(shift)})
    running.wait(moment(rng, seconds))
    shift.write_text(str(rng.choice([-400, 400]) * DAY_S))
    assert running.wait(PATIENCE_S) == 0, running.log()
    bench.check_final()
    LEDGER.add("clock jump", bench.stage)


def lose_workers(bench: Bench, rng: random.Random, times: int) -> None:
    """One of two engine processes dies; the stage says so, keeps what is finished, and leaves no process behind."""
    done = 0
    while done < times:
        bench.forget()
        done += lose_worker(bench, rng)


def lose_worker(bench: Bench, rng: random.Random) -> bool:
    """One such trial; False when the stage was done before its worker could die."""
    running = bench.start("runtime.workers=2")
    workers: list[psutil.Process] = []

    def both_work() -> bool:
        workers[:] = [p for p in running.members() if "spawn_main" in " ".join(_cmdline(p))]
        return len(workers) == 2

    assert running.until(both_work), running.log()
    running.wait(rng.uniform(0, 4))
    rng.choice(workers).kill()
    code = running.wait(PATIENCE_S)
    if code == 0:
        return False
    running.ends()
    assert "died with exit code -9" in running.log() and "run the command again" in running.log()
    bench.check_partial()
    bench.finish("runtime.workers=2")
    LEDGER.add("worker lost", bench.stage)
    return True


def _is_gone(process: psutil.Process) -> bool:
    """A zombie holds nothing any more, unless threads of it are still on their way out: they hold its locks."""
    return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1


def _cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


HANG = """
import runpy, sys, time
import ziprc.engines.{module} as module
{patch}
sys.argv = ["stage", *sys.argv[1:]]
runpy.run_module("ziprc.stages.{stage}", run_name="__main__")
"""
COUNTED = """
calls = 0
def hang(*args, **kwargs):
    global calls
    calls += 1
    if calls > 20:
        time.sleep(3600)
    return before(*args, **kwargs)
"""
PATCHES = {
    "hf": COUNTED + "from transformers import Qwen3ForCausalLM as model\nbefore, model.forward = model.forward, hang\n",
    "vllm": COUNTED + "before, module.ApplyTaps.apply = module.ApplyTaps.apply, hang\n",
}


def hang(bench: Bench, engine: str, limit_s: float = 3) -> None:
    """A forward pass never comes back: the watchdog ends the stage and states its limit."""
    bench.forget()
    program = HANG.format(module=engine, stage=bench.stage, patch=PATCHES[engine])
    options = bench.command(f"runtime.stall_limit_s={limit_s}")[5:]
    running = bench.start(command=[sys.executable, "-c", program, *options])
    code = running.wait(PATIENCE_S)
    running.ends()
    assert code == 70 and f"more than {limit_s:g} s (runtime.stall_limit_s)" in running.log(), running.log()
    bench.check_partial()
    bench.finish()
    LEDGER.add(f"{engine} hangs", bench.stage)


# --- faults of disks and files ---


@contextlib.contextmanager
def mounted(folder: Path, *command: str) -> Iterator[None]:
    """Something mounted over `folder` while open."""
    subprocess.run(["mount", *command, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(bench: Bench) -> Iterator[Path]:
    """The results on a small tmpfs; yields a file that fills it."""
    results = bench.layout.root
    kept = results.with_name("kept")
    shutil.copytree(results, kept)
    size = sum(-(-p.stat().st_size // PAGE) * PAGE for p in kept.rglob("*")) + (4 << 20)
    with mounted(results, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        shutil.copytree(kept, results, dirs_exist_ok=True)
        yield results / "filler"


def fill(filler: Path, leave: int) -> None:
    """Write to the disk until `leave` bytes are free, in whole pages."""
    stat = os.statvfs(filler.parent)
    filler.write_bytes(b"\0" * max(0, stat.f_bavail * stat.f_frsize - leave // PAGE * PAGE))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that even root cannot write."""
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield


def damages(bench: Bench, rng: random.Random) -> Iterator[tuple[str, Path]]:
    """Every input damaged in turn: a bit flipped or the end cut off, in a file, its weights or its manifest."""
    for parent in bench.parents.values():
        manifest = manifest_of(parent)
        described = sorted(described_files(manifest))
        largest = max(described, key=lambda path: path.stat().st_size)
        for path in (largest, manifest):
            whole, times = path.read_bytes(), (path.stat().st_atime, path.stat().st_mtime)
            at = rng.randrange(len(whole))
            flipped = whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
            for what, content in (("flipped", flipped), ("cut", whole[: rng.randrange(len(whole))])):
                path.write_bytes(content)
                yield what, path
            path.write_bytes(whole)
            os.utime(path, times)


def refused(action: Callable[[], object], *words: str) -> None:
    """The action ends with a UserError that holds the words."""
    try:
        action()
    except UserError as error:
        assert all(word in str(error) for word in words), str(error)
        return
    raise AssertionError(f"was not refused, expected: {words}")

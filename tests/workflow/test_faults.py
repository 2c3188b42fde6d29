"""Every stage through every fault: never a wrong or half artifact, a word on what happened, the same bytes afterwards.

Trials that need processes run in the background, as many at a time as there are cores; each test waits for its own.
`make test-faults` prints the table of trials at the end. ZIPRC_FAULT_SEED (0) is the seed of the random moments,
ZIPRC_FAULT_KILLS (8) how often each stage is killed. Below 4, as in .ci/run, what no stage has code of its own for is tried
on one stage of each KIND alone.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.workflow import faults
from tests.workflow.conftest import Workplace
from tests.workflow.faults import LEDGER, STAGES, Bench
from ziprc.stages.context import perform
from ziprc.store.digests import digest_file
from ziprc.systems import STAGES as ALL_STAGES

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SEED = os.environ.get("ZIPRC_FAULT_SEED", "0")
KILLS = int(os.environ.get("ZIPRC_FAULT_KILLS", "8"))
CHAINS = 2 if KILLS >= 4 else 1  # so that there are always some in a row
# A table, a table in pieces, a training, a checkpoint in one go, a page. Which of two processes writes is settled by the lock
# that `perform` takes before the code of a stage is reached; and that nothing goes on alone is another trial than kill -9 only
# where a stage starts processes.
KINDS = ("grades", "rollouts", "train_joint", "expand", "report")
SHARED = STAGES if KILLS >= 4 else KINDS
VLLM_KILLS = min(KILLS, 4)
VLLM = ("rollouts.engine=vllm",)
ENGINES = ("rollouts", "samples")  # stages that generate
LOST_WORKERS = min(KILLS, 3)
Fault = Callable[[Bench, random.Random], None]
FAULTS: dict[str, Fault] = {
    "kill": lambda bench, rng: faults.kill(bench, rng, KILLS, CHAINS),
    "kill-main": faults.kill_main,
    "terminate": faults.terminate,
    "two-at-once": faults.two_at_once,
    "clock-jump": faults.clock_jump,
    "lose-workers": lambda bench, rng: faults.lose_workers(bench, rng, LOST_WORKERS),
    "hang": lambda bench, rng: faults.hang(bench, "hf"),
    "vllm-kill": lambda bench, rng: faults.kill(bench, rng, VLLM_KILLS, 1),
    "vllm-hang": lambda bench, rng: faults.hang(bench, "vllm"),
}


def can_mount() -> bool:
    """Whether a tmpfs can be mounted here, tried in a mount namespace of its own."""
    trial = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(trial, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="full and read-only disks need root and the right to mount")
needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="a clock that jumps needs a C compiler (cc)")

Trials = dict[tuple[str, str], "Future[None]"]


@pytest.fixture(scope="session")
def trials(
    built: Workplace, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Trials]:
    """Every trial with processes that a selected test will ask for, started in the background."""
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    futures: Trials = {}
    for item in request.session.items:
        wanted = getattr(item, "callspec", None)
        if wanted is None or "trial" not in wanted.params or any(m.args[0] for m in item.iter_markers("skipif")):
            continue
        key = wanted.params["trial"]
        futures[key] = pool.submit(run_trial, built, tmp_path_factory.mktemp("-".join(key)), *key)
    yield futures
    pool.shutdown(wait=True, cancel_futures=True)


def run_trial(built: Workplace, folder: Path, fault: str, stage: str) -> None:
    """One fault on one stage."""
    bench = Bench(built, folder, stage, VLLM if fault.startswith("vllm") else ())
    FAULTS[fault](bench, random.Random(f"{SEED}/{fault}/{stage}"))
    shutil.rmtree(folder)


def every(fault: str, stages: Iterable[str] = STAGES) -> pytest.MarkDecorator:
    names = list(stages)
    return pytest.mark.parametrize("trial", [(fault, stage) for stage in names], ids=names)


@pytest.fixture
def bench(built: Workplace, tmp_path: Path, stage: str, trials: Trials) -> Bench:
    """A bench whose stage runs in this process."""
    return Bench(built, tmp_path, stage)


def make(bench: Bench) -> str:
    module = importlib.import_module(f"ziprc.stages.{bench.stage}")
    return perform(module.run, bench.context)


def begin(bench: Bench) -> str:
    """As `make`, but the stage must not get as far as computing anything."""
    return perform(lambda _: pytest.fail("computed"), bench.context)


# --- disks and files, in this process ---


@needs_mount
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_leaves_nothing_half_and_says_so(bench: Bench) -> None:
    with faults.small_disk(bench) as filler:
        if not bench.wanted:
            make(bench)
            bench.check_final()
        for leave in (0, bench.bytes // 2):
            bench.forget()
            faults.fill(filler, leave)
            faults.refused(lambda: make(bench), "MiB free", "Free some space")
            bench.check_partial()
            filler.unlink()
            make(bench)
            bench.check_final()
            LEDGER.add("full disk", bench.stage)


@needs_mount
@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_folder_is_refused_before_anything_is_computed(bench: Bench) -> None:
    with faults.read_only(bench.layout.root):
        faults.refused(lambda: begin(bench), "Make it readable and writable")
    bench.check_partial()
    make(bench)
    bench.check_final()
    LEDGER.add("read-only", bench.stage)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("prompts", "base")])
def test_a_damaged_input_is_named_and_nothing_is_made_from_it(bench: Bench) -> None:
    rng = random.Random(f"{SEED}/damage/{bench.stage}")
    for what, path in faults.damages(bench, rng):
        faults.refused(lambda: begin(bench), path.name, "build it again")
        assert not bench.manifest.exists()
        LEDGER.add(f"input {what}", bench.stage)
    make(bench)
    bench.check_final()


@pytest.mark.parametrize("stage", ["rollouts"])
def test_a_damaged_piece_of_an_earlier_try_is_made_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = bench.target.parent / f".{bench.target.stem}.pieces"
    for _ in range(faults.TRIES):
        running = bench.start()
        running.until(lambda: any(pieces.glob("*.manifest.json")))
        running.kill_all()
        if any(pieces.glob("*.manifest.json")):
            break
        bench.forget()  # it was done before it could be killed
    piece = next(pieces.glob("*.manifest.json")).with_suffix("").with_suffix(".parquet")
    data = bytearray(piece.read_bytes())
    data[random.Random(f"{SEED}/piece").randrange(len(data))] ^= 8
    piece.write_bytes(data)
    make(bench)
    bench.check_final()
    assert f"{piece} is damaged and is made again" in capsys.readouterr().err


# --- processes ---


@every("kill")
def test_kill_9_loses_nothing(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@every("kill-main", SHARED)
def test_what_a_stage_has_started_ends_with_it(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@every("terminate")
def test_a_preempted_stage_saves_exits_and_goes_on(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@every("two-at-once", SHARED)
def test_two_runs_at_once_have_one_writer(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@needs_cc
@every("clock-jump")
def test_a_clock_that_jumps_changes_no_byte(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@every("lose-workers", ["rollouts"])
def test_a_lost_worker_is_named_and_finished_pieces_are_kept(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@every("hang", ENGINES)
def test_an_engine_that_hangs_is_ended_at_the_stated_limit(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@every("vllm-kill", ENGINES)
def test_kill_9_loses_nothing_with_vllm(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


@every("vllm-hang", ["rollouts"])
def test_a_vllm_that_hangs_is_ended_at_the_stated_limit(trial: tuple[str, str], trials: Trials) -> None:
    trials[trial].result()


# --- the whole workflow ---


def test_a_clock_that_jumped_between_stages_reruns_nothing(workplace: Workplace) -> None:
    year = 365 * 86400
    for path in workplace.home.rglob("*"):
        if path.is_file():
            shift = year if "prompts" in path.parts or "base" in path.parts else -year
            os.utime(path, (path.stat().st_atime + shift, path.stat().st_mtime + shift))
    assert workplace.planned() == []


@needs_mount
def test_a_build_on_a_read_only_folder_says_what_to_do(workplace: Workplace) -> None:
    with faults.read_only(workplace.folder / "results"):
        done = workplace.run("build", "--set", "grades.rule=math")
    assert done.returncode == 2 and "Make it readable and writable" in done.stderr


def test_a_killed_snakemake_takes_over_what_was_made_meanwhile(workplace: Workplace) -> None:
    """Without Snakemake's own memory stages are asked again, and find that they have nothing to do."""
    before = {path: (digest_file(path), path.stat().st_ino) for path in workplace.home.rglob("*.parquet")}
    shutil.rmtree(workplace.folder / ".snakemake")
    (workplace.home / "prompts" / "train.manifest.json").touch()
    done = workplace.run("build")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for job in ("rollouts-train", "train_joint-ziprc", "evaluate-zip-rc"):
        assert "nothing to do" in (workplace.home / "logs" / f"{job}.log").read_text()
    assert {path: (digest_file(path), path.stat().st_ino) for path in workplace.home.rglob("*.parquet")} == before


def test_every_stage_has_its_trials() -> None:
    assert set(STAGES) == {stage.name for stage in ALL_STAGES}

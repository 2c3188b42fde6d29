"""Training on several machines: two launchers that meet on loopback end in the same bytes as two processes of one machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.workflow.conftest import MICRO, ROOT, Workplace, environment
from ziprc.store.digests import digest_file
from ziprc.tables.progress import PROGRESS

pytestmark = pytest.mark.slow

WEIGHTS = Path("checkpoints/base/model.safetensors")

# the stage `base`, in which rank 1 comes out of the Trainer late, and rank 0 looks whether it has before it saves
LATE = """
import os, pathlib, time
import torch
from ziprc.stages import base, context
from ziprc.training import trainer

def late(self, *args, **kwargs):
    if os.environ["RANK"] == "1":
        time.sleep(3)
        pathlib.Path("rank 1 has left").touch()

def looks(*args):
    assert pathlib.Path("rank 1 has left").exists(), "rank 0 went on alone"
    assert not torch.distributed.is_initialized(), "they have not parted"
    save(*args)

save, trainer.save_checkpoint, trainer.Shown.on_train_end = trainer.save_checkpoint, looks, late
context.run_stage("base", base.run)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launcher(place: Workplace, *more: str) -> subprocess.Popen[str]:
    """`ziprc run base`, started beside others; on the CPU the processes talk over gloo."""
    command = place.command("run", "base", "--name", "base", *more)
    return subprocess.Popen(
        command, cwd=place.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_machines_train_what_two_processes_train(tmp_path: Path) -> None:
    places = [Workplace(tmp_path / name) for name in ("one", "two")]
    for place in places:
        place.folder.mkdir()
    alone = launcher(places[0], "--set", "runtime.accelerate=cpus")
    assert alone.wait(timeout=120) == 0, alone.communicate()[0]

    meeting = ["--rendezvous", f"127.0.0.1:{free_port()}"]
    keys = ["--set", "runtime.accelerate=cpus", "runtime.nodes=2", "runtime.gpus=1"]  # one process on each "machine"
    nodes = [launcher(places[1], *meeting, "--machine-rank", str(rank), *keys) for rank in (0, 1)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "trained a base model" in said[0] and "trained a base model" not in said[1], "one of them writes"
    assert digest_file(places[0].home / WEIGHTS) == digest_file(places[1].home / WEIGHTS)


def test_no_process_goes_on_while_another_is_still_in_training(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", ROOT / "profiles/accelerate/cpus.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", "--quiet", "late.py"]
    command += ["--config-file", MICRO, "--experiment", "micro", "--name", "base"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "trained a base model" in done.stdout, done.stdout + done.stderr


def test_two_processes_sample_and_learn_what_one_does(workplace: Workplace) -> None:
    """On-policy: seeds are of the responses, not of the process that samples them."""
    found = []
    for profile in ("cpu", "cpus"):
        folder = workplace.home / "checkpoints" / "online-adaptive"
        shutil.rmtree(folder)
        command = workplace.command(
            "run", "train_online", "--name", "online-adaptive", "--set", f"runtime.accelerate={profile}"
        )
        done = subprocess.run(
            command, cwd=workplace.folder, env=environment(), capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append((PROGRESS.read(folder / "progress.parquet").to_pylist(), load_file(folder / "model.safetensors")))
    (one, weights), (two, others) = found
    assert len(one) == 7 and any(row["grad_norm"] for row in one)
    for row, other in zip(one, two, strict=True):
        for name in (
            "window",
            "decision",
            "tokens_total",
            "length_max",
            "reward",
            "success",
            "by_reason",
            "held_out_scores",
        ):
            assert row[name] == other[name], name
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-4

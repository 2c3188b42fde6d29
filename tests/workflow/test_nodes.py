"""Training on several machines: two launchers that meet on loopback end in the same bytes as two processes of one machine."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.workflow.conftest import Workplace, environment
from ziprc.artifacts import digest_file

pytestmark = pytest.mark.slow

WEIGHTS = Path("checkpoints/base/model.safetensors")


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

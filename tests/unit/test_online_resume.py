"""A run of the on-policy trainer that was stopped, or died, goes on to the same bits; its task is that of test_online."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_online import EASY, Run, at_once, one_thread  # noqa: F401, a fixture that every test here uses
from ziprc.config.base import Runtime
from ziprc.config.online import Window
from ziprc.errors import Stopped
from ziprc.rewards.base import Grade, Item


def untimed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def stopping(at: int, how: Callable[[Run], None]) -> Callable[[Path], Run]:
    """A run in which something happens while rollout `at` is graded."""

    def make(folder: Path) -> Run:
        calls = 0

        def grade(items: Sequence[Item]) -> list[Grade]:
            nonlocal calls
            calls += 1
            if calls == at:
                how(run)
            return at_once(items)

        run = Run(folder, ENDED, grader=grade, runtime=Runtime(rollouts_per_device=32, save_steps=4))
        return run

    return make


ENDED = EASY.model_copy(
    update={
        "rollouts": 6,
        "updates": 2,
        "window": Window(rule="adaptive", smallest=4, quantum=2, least=4, probes=0.3, drop=0.3),
    }
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("straight"), ENDED, runtime=Runtime(rollouts_per_device=32, save_steps=4))
    run.train()
    return run


class Died(Exception):
    """What ends a run from within, as a lost engine would."""


def _die(run: Run) -> None:
    raise Died


@pytest.mark.parametrize(("at", "rollouts"), [(2, 2), (4, 4)])
def test_a_stopped_run_ends_its_rollout_and_goes_on_to_the_same_bits(
    straight: Run, tmp_path: Path, at: int, rollouts: int
) -> None:
    run = stopping(at, lambda run: run.trainer.note(signal.SIGTERM, None))(tmp_path)
    with pytest.raises(Stopped, match=f"Step {2 * rollouts} of 12 is done and the training state is saved"):
        run.train()
    _same_end(straight, tmp_path)


@pytest.mark.parametrize("at", [3, 4, 6])
def test_a_run_that_died_in_a_rollout_goes_on_to_the_same_bits(straight: Run, tmp_path: Path, at: int) -> None:
    with pytest.raises(Died):
        stopping(at, _die)(tmp_path).train()
    _same_end(straight, tmp_path)


def _same_end(straight: Run, folder: Path) -> None:
    again = Run(folder, ENDED, runtime=Runtime(rollouts_per_device=32, save_steps=4))
    rows = again.train()
    assert again.trainer.state.global_step == 12
    assert untimed(rows) == untimed(straight.trainer.rows)
    assert again.control.state() == straight.control.state()
    for name, tensor in straight.weights().items():
        assert torch.equal(again.weights()[name], tensor), name
    lines = (folder / ".online-easy.training" / "run" / "progress.jsonl").read_text().splitlines()
    assert untimed([json.loads(line) for line in lines]) == json.loads(json.dumps(untimed(rows)))


def test_states_are_at_the_ends_of_rollouts_alone(straight: Run) -> None:
    (state,) = straight.states.glob("checkpoint-*")
    assert state.name == "checkpoint-8" and (state / "complete.json").exists()
    assert not list(straight.states.rglob("README.md"))


def test_the_window_reaches_the_next_rollout(straight: Run) -> None:
    windows = [row["window"] for row in straight.trainer.rows]
    assert len(set(windows)) > 1
    for row, after in itertools.pairwise(straight.trainer.rows):
        assert row["length_max"] <= row["window"] and after["window"] == row["next_window"]
        assert (row["length_max"] == row["window"]) or not row["truncated"]

"""The window of each response, read from a joint head: who is given up, when, and what training makes of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.doubles import GRID, World, servable_checkpoint, tiny_checkpoint, tiny_tables
from tests.unit.test_online import one_thread  # noqa: F401, a fixture that every test here uses
from ziprc.config.base import Sampling
from ziprc.config.load import Config
from ziprc.config.online import Window
from ziprc.engines.base import EngineSettings, Request, unknown_rows
from ziprc.engines.hf import HFEngine
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.head import read_joint_head
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.stages import train_online
from ziprc.store.layout import Layout
from ziprc.systems.online import check_arms
from ziprc.tables.progress import PROGRESS
from ziprc.tables.rollouts import FinishReason
from ziprc.training.predicted import Predictor

STOPS = tuple(range(0, 260, 32))
RULE = Window(rule="predicted", interval=4, floor=0.3)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("head") / "model")
    banned = unknown_rows(folder, load_tokenizer(folder))
    return EngineSettings(
        folder, Sampling(min_p=0.0), STOPS, banned, 128, joint=read_joint_head(folder), log_probs=True
    )


def requests(count: int, cap: int = 32) -> list[Request]:
    return [Request(str(i), (40 + i % 7, 41), i, cap) for i in range(count)]


def test_the_chance_of_being_right_in_time_counts_what_fits() -> None:
    grid = BinGrid((0.0, 0.5, 1.0), (0, 4, 8, 16))
    joint = np.array([[0.1, 0.0, 0.1, 0.1, 0.1, 0.0, 0.2, 0.3, 0.1]])
    law = JointDistribution(grid, joint)
    for tokens, chance in ((0, 0), (2, 0.15), (4, 0.3), (6, 0.5), (8, 0.7), (16, 0.8), (99, 0.8)):
        assert law.right_within(np.array([tokens]))[0] == pytest.approx(chance), tokens
    assert law.right_within(np.array([99]), least=0.75)[0] == pytest.approx(0.6)
    assert law.right_within(np.array([99]), least=0)[0] == pytest.approx(1)


def test_a_watched_response_is_the_same_until_it_is_given_up(settings: EngineSettings) -> None:
    with contextlib.closing(HFEngine(replace(settings, max_num_seqs=8))) as engine:
        plain = engine.generate(requests(20))
        seen: list[tuple[int, int]] = []

        def watch(which: Sequence[int], positions: Sequence[int], joint: np.ndarray) -> list[int]:
            assert joint.shape == (len(which), GRID.size)
            for i, position, row in zip(which, positions, joint, strict=True):
                np.testing.assert_allclose(row, plain[i].joint[position], atol=1e-5)
                seen.append((i, position))
            return [i for i, position in zip(which, positions, strict=True) if i % 3 == 0 and position >= 5]

        heard: list[int] = []
        watched = engine.generate(requests(20), heard.append, watch)
    given_up = 0
    for i, (before, after) in enumerate(zip(plain, watched, strict=True)):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
        assert len(after.joint) == len(after.log_probs) == len(after.token_ids)
        if i % 3 == 0 and len(before.token_ids) > 6:
            assert (len(after.token_ids), after.finish_reason) == (6, FinishReason.ABORT)
            given_up += 1
        else:
            assert after.token_ids == before.token_ids and after.finish_reason == before.finish_reason
    assert given_up >= 3 and sorted(heard) == sorted(len(one.token_ids) for one in watched)
    assert len(seen) == len(set(seen))  # nobody is asked of twice, or after the end


def test_vllm_gives_up_where_the_reference_does(settings: EngineSettings, tmp_path: Path) -> None:
    pytest.importorskip("vllm")

    from ziprc.engines.vllm import VLLMEngine

    folder = servable_checkpoint(tmp_path / "model", joint=True)
    own = replace(settings, model=folder, joint=read_joint_head(folder))
    found = []
    for kind in (HFEngine, VLLMEngine):
        with contextlib.closing(kind(own)) as engine:
            found.append(Predictor(GRID, 8).sample(engine, requests(24), RULE))
    assert [(one.key, one.token_ids, one.finish_reason) for one in found[0]] == [
        (one.key, one.token_ids, one.finish_reason) for one in found[1]
    ]
    ends = {one.finish_reason for one in found[0]}
    assert FinishReason.ABORT in ends and len(ends) > 1


def test_the_longest_are_begun_first_where_not_all_fit(settings: EngineSettings) -> None:
    with contextlib.closing(HFEngine(settings)) as engine:
        asked = requests(14)
        order = Predictor(GRID, 4).longest_first(engine, asked)
        assert sorted(order) == list(range(14))
        joint = {one.key: one.joint[:1] for one in engine.generate(asked)}
        expected = [float(JointDistribution(GRID, joint[asked[i].key]).median_remaining()[0]) for i in order]
        assert expected == sorted(expected, reverse=True) and expected[0] > expected[-1]
        few, many = (Predictor(GRID, size).sample(engine, asked, RULE) for size in (4, 64))
    assert [one.key for one in few] == [one.key for one in asked]
    assert [one.token_ids for one in few] == [one.token_ids for one in many]  # order changes no response


SETTINGS: dict[str, Any] = {
    "systems": ["countdown-rl"],
    "prompts": {"train": 12, "validation": 4, "test": 6},
    "rollouts": {"engine": "hf", "max_model_len": 160, "max_new_tokens": 24, "test_samples": 4, "sampling": {"min_p": 0}},
    "train_joint": {"lite": {"trainable": "slice"}},
    "train_online": {
        "engine": "hf", "defaults": {"rollouts": 2, "prompts": 2, "samples": 4, "learning_rate": 1e-3, "start": "lite"},
        "arms": {"fixed": {}, "predicted": {"window": {"rule": "predicted", "interval": 4, "floor": 0.5}}},
    },
}  # fmt: skip


def test_an_arm_gives_up_what_it_expects_nothing_of(tmp_path: Path) -> None:
    world = World(Config.model_validate(SETTINGS), Layout(tmp_path, "tiny"))
    check_arms(world.config)
    tiny_checkpoint(world.layout.checkpoint("lite"))
    for split, prompts in (("train", 12), ("validation", 4), ("test", 6)):
        tiny_tables(world.layout, split, prompts=prompts, samples=4)
    rows = {}
    for name in ("fixed", "predicted"):
        train_online.run(world.context("train_online", f"online-{name}"))
        folder = world.layout.checkpoint(f"online-{name}")
        rows[name] = PROGRESS.read(folder / "progress.parquet").to_pylist()
        assert read_joint_head(folder) == read_joint_head(world.layout.checkpoint("lite"))  # it keeps its head
    first = [rows[name][0] for name in ("fixed", "predicted")]
    given_up = json.loads(first[1]["by_reason"]).get("given up", 0)
    assert given_up > 0 and "given up" not in json.loads(first[0]["by_reason"])
    assert first[1]["tokens_response"] < first[0]["tokens_response"]
    assert first[1]["truncated"] >= given_up / 8 and first[1]["window"] == 24
    assert all(row["mismatch_kl"] < 1e-9 for row in rows["predicted"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {"a": {"window": {"rule": "predicted"}}}}, "read from a joint head by our engines.*now base, hf"),
        (
            {"arms": {"a": {"start": "lite", "window": {"rule": "predicted"}}}, "engine": "colocate"},
            "now lite, colocate",
        ),
        ({"arms": {"a": {"start": "lite"}}}, "no checkpoint .lite. to start from"),
    ],
)
def test_what_cannot_be_predicted_is_refused(change: dict[str, Any], words: str) -> None:
    without = {} if "no checkpoint" in words else {"train_joint": SETTINGS["train_joint"]}
    base = {k: v for k, v in SETTINGS.items() if k not in ("train_joint", "train_online")}
    with pytest.raises(UserError, match=words):
        check_arms(Config.model_validate({**base, **without, "train_online": {"engine": "hf", **change}}))

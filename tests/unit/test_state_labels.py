"""Joint heads that learn a reward of every state: labels of ICL-V for the head of ZIP-RC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from tests.doubles import GRID, World, tiny_checkpoint, tiny_tables
from tests.unit.test_training import rollouts_table
from ziprc.config.load import Config
from ziprc.config.zip_rc import Head, TrainJoint
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.head import read_manifest
from ziprc.plan.stage import Ref
from ziprc.stages import qvalues, train_joint
from ziprc.store.layout import Layout
from ziprc.systems.zip_rc import check_rivals
from ziprc.tables.qvalues import QVALUES
from ziprc.training.data import RolloutData, rollout_data
from ziprc.training.objectives.joint import ANY_REWARD

THIRDS = BinGrid((0.0, 0.5, 1.0), (0, 8, 16))


def labels(values: dict[str, list[float]]) -> pa.Table:
    """Rows of which only the values of the states matter here; one candidate a state."""
    rows = []
    for name, of in values.items():
        taken = [0.5] * (len(of) - 1)
        rows.append(
            {"rollout_id": name, "source": "trie", "siblings": 3, "offsets": range(len(of)), "ids": [1] * len(taken),
             "log_prob": [0.0] * len(taken), "q": taken, "cells": [], "values": of}
        )  # fmt: skip
    return QVALUES.make(rows)


def data(finish: tuple[str, str] = ("stop", "stop"), **head: Any) -> RolloutData:
    """Rollout r0 of two tokens and r1 of three; the table of labels has another order, and one that nobody asked for."""
    table = rollouts_table([*finish, "stop"], [[7, 8], [7, 8, 9], [5]])
    known = labels({"x": [1.0, 1.0], "r1": [0.5, 0.9, 0.1, 1.0], "r0": [0.0, 0.6, 1.0]})
    return rollout_data(table, known, Head(label="trie", **head), THIRDS, "train_joint")


def test_every_state_that_emits_a_token_learns_its_own_value() -> None:
    both = data()
    assert both.names == ["r0", "r1"] and both.dropped == {"without a label": 1}
    assert both.batch(np.array([0]))["reward_bin"].tolist() == [0, 1], "the state after the last token is no input"
    assert both.batch(np.array([1, 0]))["reward_bin"].tolist() == [1, 2, 0, 0, 1]
    assert both.batch(np.array([1, 0]))["length_bin"].tolist() == [0] * 5


def test_inputs_that_are_cut_keep_the_labels_of_their_first_states() -> None:
    assert data(max_length=4).batch(np.array([1]))["reward_bin"].tolist() == [1, 2]


def test_a_capped_response_keeps_the_value_of_its_states_unless_it_is_to_teach_its_length_alone() -> None:
    assert data(("stop", "length")).batch(np.array([1]))["reward_bin"].tolist() == [1, 2, 0]
    silent = data(("stop", "length"), unfinished="ignore").batch(np.array([1, 0]))
    assert (
        silent["reward_bin"].tolist() == [ANY_REWARD] * 3 + [0, 1]
        and silent["censored"].tolist() == [True] * 3 + [False] * 2
    )
    assert data(("stop", "length"), unfinished="drop").names == ["r0"]


@pytest.mark.parametrize("name", ["lite", "noisy-fold0", "many", "Big", "critic-fold0", "policy-kl"])
def test_a_rival_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(ValidationError, match=r"is the name of something else|should match pattern"):
        TrainJoint.model_validate({"rivals": {name: {}}})


def test_a_rival_is_not_the_checkpoint_of_the_critic_in_context() -> None:
    rival = {"train_joint": {"rivals": {"critic": {}}}}
    check_rivals(Config.model_validate(rival))
    with pytest.raises(UserError, match="'critic' is the checkpoint of train_critic"):
        check_rivals(Config.model_validate(rival | {"train_critic": {"folds": 1}}))


def test_rivals_have_what_lies_beneath_every_head() -> None:
    own = TrainJoint.model_validate({"defaults": {"epochs": 7}, "rivals": {"a": {"kl": 3}, "b": {"epochs": 1}}})
    assert [(own.rivals[n].epochs, own.rivals[n].kl) for n in "ab"] == [(7, 3), (1, 0)]
    assert own.head("rivals.a") is own.rivals["a"] and own.head("ziprc") is own.ziprc


@pytest.fixture
def world(tmp_path: Path) -> World:
    layout = Layout(tmp_path, "tiny")
    head = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "reward_centres": GRID.reward_centres}
    rivals = {"trie": {**head, "label": "trie"}, "critic": {**head, "label": "critic"}}
    joint = {"length_edges": GRID.length_edges, "ziprc": {**head, "label": "score"}, "rivals": rivals}
    return World(Config.model_validate({"train_joint": joint, "prompts": {"task": "arithmetic"}}), layout)


def test_rivals_are_trained_read_and_judged_beside_the_head(world: World) -> None:
    plan = world.context("train_joint", "trie").graph
    parents = {name: plan.parents(Ref("train_joint", name)) for name in ("ziprc", "trie", "critic")}
    assert parents["ziprc"]["grades"] == Ref("grades", "train") and "qvalues" not in parents["ziprc"]
    assert [parents[name]["qvalues"].name for name in ("trie", "critic")] == ["train-trie", "train"]
    assert plan.params(Ref("train_joint", "trie"))["train_joint.rivals.trie"]["label"] == "trie"
    assert "train_joint.rivals.trie" not in plan.params(Ref("train_joint", "critic"))
    judged = plan.parents(Ref("evaluate", "zip-rc"))
    assert {"introspection/trie", "introspection/critic", "trie", "critic"} <= set(judged)
    assert plan.variant(Ref("rollouts", "test-trie")).policy == Ref("train_joint", "trie")


def test_a_head_is_trained_on_the_labels_of_a_trie(world: World) -> None:
    tiny_checkpoint(world.layout.checkpoint("base"), joint=False)
    tiny_tables(world.layout, "train", prompts=12, samples=4, unfinished=0.2)
    qvalues.run(world.context("qvalues", "train-trie"))
    line = train_joint.run(world.context("train_joint", "trie"))
    assert "trie trained on 48 rollouts, 3 steps" in line
    assert set(read_manifest(world.layout.checkpoint("trie"))["parents"]) == {"base", "rollouts", "qvalues"}

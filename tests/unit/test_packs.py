"""Packs: cut from the chat template, made of the sampled ids, every state labelled with what was still to come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.doubles import World, tiny_checkpoint, tiny_tables, tiny_tokenizer
from ziprc.chat import prompt_token_ids
from ziprc.config.icl_v import FEEDBACK_KINDS, TrainCritic
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import read_manifest
from ziprc.stages import train_critic
from ziprc.store.layout import Layout
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.objectives.joint import JointObjective
from ziprc.training.order import MicroBatches
from ziprc.training.packs import (
    Graded,
    feedback_text,
    graded_rollouts,
    pack_data,
    pack_kind,
    packs_to_judge,
    require_kind,
    rotated_packs,
    shuffled_packs,
)
from ziprc.training.trainees import JointTrainee

TOKENIZER = tiny_tokenizer()
GRID = BinGrid((0.0, 1.0), (0, 4, 8, 16, 64))
QUESTION = [{"role": "user", "content": "Compute 1+2"}]


def rollout(number: int, text: str, score: float = 1.0, cut: bool = False, thinking: bool = True) -> Graded:
    prompt = prompt_token_ids(TOKENIZER, QUESTION, thinking)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"] + ([] if cut else [TOKENIZER.eos_token_id])
    return Graded(
        f"r{number}", "p", np.array(prompt, np.int32), np.array(ids, np.int32), score, text[-1:], cut, thinking
    )


THREE = [rollout(0, "1+2=3"), rollout(1, "12", 0.0), rollout(2, "1+2=1+1+1=3")]


@pytest.mark.parametrize("kind", FEEDBACK_KINDS)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_pack_is_the_conversation_that_the_chat_template_renders(kind: str, thinking: bool) -> None:
    rollouts = [replace(r, thinking=thinking, prompt=rollout(0, "", thinking=thinking).prompt) for r in THREE]
    data = pack_data(rollouts, [[0, 1, 2]], TOKENIZER, TrainCritic(feedback=kind), GRID)
    texts = [TOKENIZER.decode(r.response[:-1]) for r in rollouts]
    said = [feedback_text(kind, r, n, right) for r, n, right in zip(rollouts, (1, 2), (1, 1), strict=False)]
    silent = "" if thinking else "<think>\n\n</think>\n\n"  # the template opens a response that does not think with it
    turns = [*QUESTION]
    for text, feedback in zip(texts, [*said, None], strict=True):
        turns.append({"role": "assistant", "content": silent + text})
        turns += [{"role": "user", "content": feedback}] if feedback else []
    whole = TOKENIZER.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    assert data.tokens.tolist() == TOKENIZER(whole, add_special_tokens=False)["input_ids"]


def test_what_is_said_about_a_rollout() -> None:
    right, cut = THREE[0], rollout(3, "1+2", 0.0, cut=True)
    assert feedback_text("full", right, 1, 1) == "Reward: 1\nLength: 6 tokens"
    assert feedback_text("full", cut, 2, 1) == "Reward: 0\nLength: 3 tokens, cut off"
    assert feedback_text("full", replace(right, score=0.25), 1, 0).startswith("Reward: 0.25\n")
    assert feedback_text("no_rewards", right, 1, 1) == "Length: 6 tokens"
    assert feedback_text("first_reward_only", right, 1, 1) == "Reward: 1\nLength: 6 tokens"
    assert feedback_text("first_reward_only", right, 2, 2) == "Length: 6 tokens"
    assert feedback_text("so_far", cut, 3, 2) == "Reward: 0\nLength: 3 tokens, cut off\nSo far: 2 of 3 right"
    assert feedback_text("answer", right, 1, 1) == "Answer: 3+\nLength: 6 tokens"
    assert feedback_text("answer", replace(right, score=0.5), 1, 1).startswith("Answer: 3+")
    assert feedback_text("answer", replace(cut, answer=""), 1, 0) == "Answer: none-\nLength: 3 tokens, cut off"


def test_every_state_is_labelled_from_before_the_first_token_to_after_the_stop_token() -> None:
    data = pack_data(THREE, [[2, 0], [1, 0, 2]], TOKENIZER, TrainCritic(end_weight=0), GRID)
    batch = {name: value.numpy() for name, value in data.batch(np.array([0, 1])).items()}
    ids, width = batch["input_ids"].ravel(), batch["input_ids"].shape[1]
    states = iter(zip(batch["positions"], batch["reward_bin"], batch["length_bin"], strict=True))
    seen = 0
    for row, pack in enumerate(([2, 0], [1, 0, 2])):
        for i in pack:
            own = THREE[i]
            for j in range(len(own.response) + 1):
                position, reward, length = next(states)
                assert position // width == row
                assert (ids[position - j + 1 : position + 1] == own.response[:j]).all()
                assert reward == own.score and length == GRID.length_bin(len(own.response) - j)
                seen += 1
            header = TOKENIZER("assistant\n", add_special_tokens=False)["input_ids"]
            start = position - len(own.response)
            assert ids[start - len(header) + 1 : start + 1].tolist() == header
    assert next(states, None) is None and seen == batch["count"] == len(batch["positions"])
    assert (batch["attention_mask"].sum(1) == data.input_lengths()).all() and not batch["censored"].any()


def test_a_response_that_was_cut_is_closed_and_its_length_is_a_lower_bound() -> None:
    cut = rollout(3, "1+2", 0.0, cut=True)
    data = pack_data([cut, THREE[0]], [[0, 1]], TOKENIZER, TrainCritic(end_weight=0), GRID)
    end = len(cut.prompt) + len(cut.response)
    assert data.tokens[end] == TOKENIZER.eos_token_id and "cut off" in TOKENIZER.decode(data.tokens)
    batch = data.batch(np.array([0]))
    states = len(cut.response) + 1
    assert batch["censored"].tolist() == [True] * states + [False] * (len(batch["censored"]) - states)
    assert batch["positions"][states - 1] == end - 1, "the stop token that closes it is not the model's"


def test_units_beyond_the_packs_teach_the_reward_alone_and_ends_weigh_more() -> None:
    data = pack_data(THREE, [[0, 1], [2, 1]], TOKENIZER, TrainCritic(end_weight=1), GRID)
    whole, reward, end = (data.batch(np.array([i])) for i in (1, 3, 5))
    assert (whole["input_ids"] == reward["input_ids"]).all() and (whole["reward_bin"] == reward["reward_bin"]).all()
    assert reward["censored"].all() and not reward["length_bin"].any() and not whole["censored"].any()
    sizes = [len(THREE[i].response) + 1 for i in (2, 1)]
    assert whole["count"] == whole["weight"].sum() == pytest.approx(2 * sum(sizes), abs=2)
    first = whole["weight"][: sizes[0]]
    assert (first[:-2] == 1).all() and (first[-2:] == 1 + round(sizes[0] / 2)).all()
    assert all((end[name] == reward[name]).all() for name in reward if name not in ("weight", "count"))
    assert end["weight"].tolist() == [i for size in sizes for i in [0] * (size - 2) + [1, 1]] and end["count"] == 4


def test_training_counts_a_state_by_its_weight(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "tiny")
    tiny_checkpoint(layout.checkpoint("base"), joint=False)
    model = load_model(layout.checkpoint("base"))
    trainee = JointTrainee(model, JointObjective(GRID.R, GRID.L, slice(len(TOKENIZER), len(TOKENIZER) + GRID.size)))
    batch = pack_data(THREE, [[0, 1]], TOKENIZER, TrainCritic(end_weight=3), GRID).batch(np.array([0]))
    once = {**batch, "weight": torch.ones_like(batch["weight"])}
    twice = {**batch, "weight": batch["weight"] - 1}
    assert twice["weight"].any()
    parts = [trainee.loss(of).total.item() for of in (batch, once, twice)]
    assert parts[0] == pytest.approx(parts[1] + parts[2], rel=1e-5) and parts[0] > 1.5 * parts[1]


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    one = len(THREE[0].prompt) + len(THREE[0].response)
    whole = pack_data(THREE, [[0, 1, 2]], TOKENIZER, TrainCritic(), GRID)
    data = pack_data(THREE, [[0, 1, 2]], TOKENIZER, TrainCritic(max_length=int(whole.offsets[-1]) - 1), GRID)
    assert data.left_out == 1 and data.members.tolist() == [1, 2], "the last ones stay, which have siblings"
    assert data.tokens.tolist() == pack_data(THREE, [[1, 2]], TOKENIZER, TrainCritic(), GRID).tokens.tolist()
    first = TrainCritic(feedback="first_reward_only")
    whole = pack_data(THREE, [[0, 1, 2]], TOKENIZER, first, GRID)
    cut = pack_data(
        THREE, [[0, 1, 2]], TOKENIZER, first.model_copy(update={"max_length": int(whole.offsets[-1]) - 1}), GRID
    )
    assert TOKENIZER.decode(cut.tokens).count("Reward: 0") == 1, "the first that is left is the first"
    with pytest.raises(UserError, match=r"Not one of 1 packs holds two .* \(3 rollouts did not fit .*max_length=\d+"):
        pack_data(THREE, [[0, 1, 2]], TOKENIZER, TrainCritic(max_length=one), GRID)
    with pytest.raises(UserError, match="thinking_samples"):
        pack_data(THREE[:1], [[0]], TOKENIZER, TrainCritic(), GRID)


def test_packs_hold_every_rollout_once_a_pass() -> None:
    rollouts = [replace(THREE[0], rollout_id=str(i), prompt_id=str(i % 3)) for i in range(17)]
    packs = shuffled_packs(rollouts, 4, 2, seed=1)
    assert sorted(i for pack in packs for i in pack) == sorted([*range(17)] * 2)
    assert all(len({rollouts[i].prompt_id for i in pack}) == 1 and len(pack) <= 4 for pack in packs)
    assert packs == shuffled_packs(rollouts, 4, 2, seed=1) != shuffled_packs(rollouts, 4, 2, seed=2)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_in_rotated_packs_every_rollout_is_valued_once_behind_half_a_pack(count: int, size: int) -> None:
    rollouts = [replace(THREE[0], rollout_id=str(i), prompt_id=str(i % 2)) for i in range(2 * count)]
    packs, last = rotated_packs(rollouts, size, seed=1)
    valued = [i for pack, targets in zip(packs, last, strict=True) for i in pack[len(pack) - targets :]]
    assert sorted(valued) == ([*range(2 * count)] if count > 1 else [])
    for pack, targets in zip(packs, last, strict=True):
        assert len(set(pack)) == len(pack) == min(size, count) and len({i % 2 for i in pack}) == 1
        assert len(pack) - targets >= len(pack) // 2 >= 1
    assert (packs, last) == rotated_packs(rollouts, size, seed=1)
    assert count < 7 or packs != rotated_packs(rollouts, size, seed=2)[0]


def test_all_that_are_judged_have_the_same_siblings_and_are_nobodys_sibling() -> None:
    rollouts = [replace(THREE[0], rollout_id=str(i), prompt_id=str(i % 3)) for i in range(17)]
    packs, fewer = packs_to_judge(rollouts, 6, (0, 1, 5))
    assert fewer == 1 and packs == [[15], [0, 15], [0, 3, 6, 9, 12, 15], [16], [1, 16], [1, 4, 7, 10, 13, 16]]


def test_other_scores_can_be_shown_than_those_that_are_learned() -> None:
    own = TrainCritic(feedback="full")
    data = pack_data(THREE, [[0, 1, 2]], TOKENIZER, own, GRID, [[0.0, 1.0, 0.0]])
    text = TOKENIZER.decode(data.tokens)
    assert text.index("Reward: 0") < text.index("Reward: 1") and data.reward_bin.tolist() == [1, 0, 1]


def test_a_template_that_closes_turns_otherwise_is_refused() -> None:
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_end|>", "<|endoftext|>")
    with pytest.raises(UserError, match=r"goes on after a response with token .* expected the stop token"):
        pack_data(THREE, [[0, 1]], other, TrainCritic(), GRID)


SETTINGS = {
    "systems": ["icl-v"],
    "rollouts": {"thinking_samples": 4},
    "train_critic": {"length_edges": [0, 8, 16, 32, 64], "pack_rollouts": 4, "batch_size": 4, "learning_rate": 1e-3},
}


def test_a_critic_sees_no_prompt_of_its_fold_and_says_which_packs_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(Config.model_validate(SETTINGS), Layout(tmp_path, "tiny"))
    tiny_checkpoint(world.layout.checkpoint("base"), joint=False)
    tiny_tables(world.layout, "train", prompts=12, samples=4)
    said = train_critic.run(world.context("train_critic", "critic-fold1"))
    folder, own = world.layout.checkpoint("critic-fold1"), world.config.train_critic
    assert said.startswith("critic-fold1 trained on ") and str(folder) in said
    record = read_manifest(folder)
    assert record["objective"] == "in_context" and record["pack"]["rollouts"] == 4
    rollouts = ROLLOUTS.read(world.layout.table("rollouts", "train"))
    seen = int(capsys.readouterr().err.split(" rollouts in ")[0].rpartition(" ")[2])
    assert 0 < seen < rollouts.num_rows
    first = (folder / "model.safetensors").read_bytes()
    train_critic.run(world.context("train_critic", "critic-fold1"))
    assert (folder / "model.safetensors").read_bytes() == first

    require_kind(folder, pack_kind(own, TOKENIZER))
    with pytest.raises(UserError, match="another kind: feedback 'answer', here 'full'; rollouts 4, here 5"):
        other = own.model_copy(update={"feedback": "full", "pack_rollouts": 5})
        require_kind(folder, pack_kind(other, TOKENIZER))
    with pytest.raises(UserError, match="is no critic in context"):
        require_kind(world.layout.checkpoint("base"), pack_kind(own, TOKENIZER))


def test_rollouts_without_a_score_are_counted_and_cut_ones_score_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path, "tiny")
    tiny_tables(layout, "train", prompts=4, samples=4, unfinished=0.5)
    rollouts, grades = (schema.read(layout.table(schema.name, "train")) for schema in (ROLLOUTS, GRADES))
    found, without = graded_rollouts(rollouts, grades, "grades")
    assert without == 0 and len(found) == 16 and any(r.cut for r in found)
    assert all(r.score == 0 for r in found if r.cut)
    rows = grades.to_pylist()
    finished = next(i for i, row in enumerate(rows) if row["status"] == "graded")
    rows[finished] |= {"score": None, "status": "timeout"}
    found, without = graded_rollouts(rollouts, GRADES.make(rows), "grades")
    assert without == 1 and len(found) == 15 and rows[finished]["rollout_id"] not in {r.rollout_id for r in found}


def test_the_first_steps_learn_the_reward_at_the_end_and_the_last_ones_the_length_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**SETTINGS["train_critic"], "folds": 1, "batch_size": 2, "epochs": 2}
    own |= {"end_share": 0.25, "joint_share": 0.5}
    world = World(Config.model_validate({**SETTINGS, "train_critic": own}), Layout(tmp_path, "tiny"))
    tiny_checkpoint(world.layout.checkpoint("base"), joint=False)
    tiny_tables(world.layout, "train", prompts=12, samples=4, unfinished=0)
    given: list[MicroBatches] = []
    monkeypatch.setattr(train_critic, "train", lambda *arguments: given.append(arguments[4]) or "done")
    train_critic.run(world.context("train_critic", "critic"))
    (batches,) = given
    steps = [batches[i * batches.order.slots] for i in range(batches.order.steps)]
    assert [bool(step["censored"].all()) for step in steps] == [True] * 6 + [False] * 6
    assert [bool((step["weight"] == 0).any()) for step in steps] == [True] * 3 + [False] * 9


def test_every_unit_has_the_name_of_a_rollout_for_errors() -> None:
    data = pack_data(THREE, [[1, 0], [2, 0]], TOKENIZER, TrainCritic(), GRID)
    assert data.names == ["r1", "r2"] * 3 and len(data) == 2

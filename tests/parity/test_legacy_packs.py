"""The published layout, labels and loss of the critic in context, made again from their description, on the same rollouts.

Sequence: a user turn, then every response behind a bare header of the assistant, closed by the stop token and followed by a
user turn with its reward and length, but for the last. Labels: at every token of the supervised responses, the stop token
included, reward bin and length bin of the tokens still to come; cross-entropy over the slice alone, the mean over all of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.doubles import tiny_checkpoint, tiny_tokenizer
from ziprc.chat import prompt_token_ids
from ziprc.config.icl_v import TrainCritic
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import read_joint_head
from ziprc.training.objectives.joint import JointObjective
from ziprc.training.packs import Graded, feedback_text, pack_data, supervised
from ziprc.training.trainees import JointTrainee

TOKENIZER = tiny_tokenizer()
GRID = BinGrid((0.0, 1.0), (0, 4, 8, 16, 64))
START, END = (TOKENIZER.convert_tokens_to_ids(f"<|im_{word}|>") for word in ("start", "end"))
ANSWERS = (("12=3", 1.0, False), ("1+1+", 0.0, True), ("3", 1.0, False), ("1+2=4!", 0.0, False))


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def message(role: str, text: str) -> list[int]:
    return [START, *ids_of(role), *ids_of("\n"), *ids_of(text), END, *ids_of("\n")]


def rollouts(thinking: bool) -> list[Graded]:
    prompt = prompt_token_ids(TOKENIZER, [{"role": "user", "content": "Compute 1+2"}], thinking)
    found = []
    for number, (text, score, cut) in enumerate(ANSWERS):
        response = np.array([*ids_of(text), *([] if cut else [END])], np.int32)
        found.append(Graded(str(number), "p", np.array(prompt, np.int32), response, score, "", cut, thinking))
    return found


def published(kind: str, supervise_from: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Ids, and (position, reward bin, length bin) of every supervised token."""
    ids, labels = message("user", "Compute 1+2"), []
    for number, (text, score, _) in enumerate(ANSWERS, start=1):
        response = [*ids_of(text), END]
        ids += [START, *ids_of("assistant"), *ids_of("\n")]
        for t in range(len(response)):
            if number >= min(supervise_from, len(ANSWERS)):
                remaining = len(response) - 1 - t
                length = next(b for b in reversed(range(4)) if remaining >= GRID.length_edges[b])
                labels.append((len(ids) + t, int(score >= 0.5), length))
        ids += response
        if number < len(ANSWERS):
            reward = (
                [] if kind == "no_rewards" or (kind == "first_reward_only" and number > 1) else [f"Reward: {score}"]
            )
            ids += message("user", "\n".join([*reward, f"Length: {len(response)} tokens"]))
    return ids, labels


@pytest.mark.parametrize("kind", ["full", "no_rewards", "first_reward_only"])
@pytest.mark.parametrize(("thinking", "supervise_from"), [(True, 1), (False, 3), (True, 9)])
def test_packs_labels_and_loss_are_the_published_ones(
    tmp_path: Path, kind: str, thinking: bool, supervise_from: int
) -> None:
    own = TrainCritic(layout="legacy", feedback=kind, supervise_from=supervise_from, end_weight=0)
    data = supervised(pack_data(rollouts(thinking), [[0, 1, 2, 3]], TOKENIZER, own, GRID), own)
    ids, labels = published(kind, supervise_from)
    assert data.tokens.tolist() == ids and data.left_out == 0
    batch = data.batch(np.array([0]))
    ours = zip(batch["positions"].tolist(), batch["reward_bin"].tolist(), batch["length_bin"].tolist(), strict=True)
    assert list(ours) == labels and not batch["censored"].any() and int(batch["count"]) == len(labels)

    folder = tiny_checkpoint(tmp_path / "critic", grid=GRID)
    model, rows = load_model(folder), read_joint_head(folder).layout.joint_slice
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :, rows]
        at, reward, length = (torch.tensor(column) for column in zip(*labels, strict=True))
        theirs = torch.nn.functional.cross_entropy(logits[at], reward * GRID.L + length)
        mine = JointTrainee(model, JointObjective(GRID.R, GRID.L, rows)).loss(batch).total / batch["count"]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_what_the_published_layout_says_of_a_reward_and_does_not_know() -> None:
    one = rollouts(True)[0]
    assert feedback_text("full", one, 1, 1, legacy=True) == "Reward: 1.0\nLength: 5 tokens"
    with pytest.raises(
        ValueError, match="layout legacy knows the feedback full, no_rewards, first_reward_only, found answer"
    ):
        TrainCritic(layout="legacy")
    other = [Graded("r", "p", np.array([1, 2], np.int32), one.response, 1.0, "", False, True)] * 2
    with pytest.raises(UserError, match="its prompt has no header of the assistant"):
        pack_data(other, [[0, 1]], TOKENIZER, TrainCritic(layout="legacy", feedback="full"), GRID)


def test_short_packs_supervise_their_last_rollout() -> None:
    own = TrainCritic(supervise_from=3)
    data = supervised(pack_data(rollouts(True), [[0, 1, 2, 3], [0, 1], [2]], TOKENIZER, own, GRID), own)
    assert data.learned.tolist() == [False, False, True, True, False, True, True]

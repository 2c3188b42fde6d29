"""Training data: flat arrays of tokens and padded micro-batches.

Tables are read with pyarrow, joined on `rollout_id` and kept as one flat int32 array with offsets; no Python loop runs
over tokens. Labels come from the whole rollout; `max_length` cuts inputs only (the published code cuts first and so
mislabels lengths).

B rollouts of a micro-batch, T time, P labelled states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from ziprc.config.zip_rc import Head
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.store.digests import derived_seed
from ziprc.tables.grades import GradeStatus, one_a_rollout
from ziprc.tables.rollouts import FinishReason
from ziprc.training.objectives.joint import ANY_REWARD


class TrainingData(Protocol):
    """What can be trained on: units (a rollout, a pair, a pack of several), known by their number."""

    names: Sequence[str]  # of the units, for error messages

    def input_lengths(self) -> NDArray[np.int64]:
        """Tokens of each unit that go through the model."""

    def batch(self, picked: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The picked units as what the trainee's `forward` takes, padded.

        Besides, `attention_mask` says what is no padding, and `count`, a scalar, how many supervised positions there are:
        the sums of the loss are divided by the count of the global batch.
        """


def prompt_fold(prompt_id: str, folds: int) -> int:
    """The fold of a prompt for cross-fitting: a stable hash of its id, so that it never depends on row order."""
    return derived_seed("fold", prompt_id) % folds


def outside_fold(rollouts: pa.Table, fold: tuple[int, int] | None) -> pa.Table:
    """The rollouts whose prompt is not in the fold (number, of how many); all where there is none."""
    if fold is None:
        return rollouts
    outside = [prompt_fold(prompt, fold[1]) != fold[0] for prompt in rollouts["prompt_id"].to_pylist()]
    return rollouts.filter(pa.array(outside, pa.bool_()))


def within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 … c−1 for every count c, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def padded(tokens: NDArray[np.int32], starts: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, Any]:
    """Stretches of `counts` tokens from `starts` on as rows of `input_ids` and `attention_mask`, padded on the right."""
    inside = np.arange(counts.max()) < counts[:, None]
    ids = np.zeros(inside.shape, dtype=np.int64)
    ids[inside] = tokens[np.repeat(starts, counts) + within(counts)]
    return {"input_ids": ids, "attention_mask": inside.astype(np.int64)}


@dataclass(frozen=True)
class Sequences:
    """N token sequences, prompt then response, in one flat array; sequence i is tokens[offsets[i]:offsets[i + 1]]."""

    names: Sequence[str]
    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def input_lengths(self) -> NDArray[np.int64]:
        """The last token is not an input: no state after it is labelled."""
        return self.lengths - 1

    def labels(self, picked: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What each of the first `counts` states of the picked sequences is to learn, [P] each."""
        raise NotImplementedError

    def batch(self, picked: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [B, T], padded on the right; the labelled states, as positions in [B·T]; labels."""
        inputs, first = self.input_lengths()[picked], self.prompt_lengths[picked] - 1
        counts = inputs - first  # labelled states: the last of the prompt, and all of the response that are inputs
        batch = {
            **padded(self.tokens, self.offsets[picked], inputs),
            "positions": np.repeat(np.arange(len(picked)) * inputs.max() + first, counts) + within(counts),
            "count": counts.sum(),
        }
        return {name: torch.as_tensor(value) for name, value in (batch | self.labels(picked, counts)).items()}


def sequences_from_table(rollouts: pa.Table) -> Sequences:
    """Flatten the two id columns of a rollouts table into prompt-then-response order."""
    pair = [rollouts[name].combine_chunks() for name in ("prompt_token_ids", "response_token_ids")]
    lengths = np.stack([pc.list_value_length(column).to_numpy() for column in pair]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(0))])
    tokens = np.empty(offsets[-1], dtype=np.int32)
    for column, own, starts in zip(pair, lengths, (offsets[:-1], offsets[:-1] + lengths[0]), strict=True):
        tokens[np.repeat(starts, own) + within(own)] = pc.list_flatten(column).to_numpy()
    return Sequences(rollouts["rollout_id"].to_pylist(), tokens, offsets, lengths[0])


class TextData(Sequences):
    """For language modelling: every response token is a target."""

    def labels(self, picked: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        starts = self.offsets[picked] + self.prompt_lengths[picked]
        return {"targets": self.tokens[np.repeat(starts, counts) + within(counts)].astype(np.int64)}


@dataclass(frozen=True)
class RolloutData(Sequences):
    """For the joint head: at every labelled state a reward bin, a length bin, and whether the length is censored.

    `reward_bin` is one a rollout [N], or, where `first` says at which the states of each begin, one a state.
    """

    reward_bin: NDArray[np.int64]
    first: NDArray[np.int64] | None
    censored: NDArray[np.bool_]
    grid: BinGrid
    head: Head
    dropped: dict[str, int]  # rollouts that were left out, by reason

    def input_lengths(self) -> NDArray[np.int64]:
        return np.minimum(self.lengths - 1, self.head.max_length)

    def labels(self, picked: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        responses = (self.lengths - self.prompt_lengths)[picked]
        remaining = np.repeat(responses, counts) - within(counts) - int(self.head.legacy_off_by_one)
        censored, row = np.repeat(self.censored[picked], counts), np.repeat(picked, counts)
        reward_bin = self.reward_bin[row if self.first is None else self.first[row] + within(counts)]
        return {"reward_bin": reward_bin, "length_bin": self.grid.length_bin(remaining), "censored": censored}


def rollout_data(
    rollouts: pa.Table, labels: pa.Table, head: Head, grid: BinGrid, section: str, thinking_only: bool = False
) -> RolloutData:
    """Join rollouts with grades (label=score), values (label=value) or qvalues and say what each rollout teaches.

    A label of every state knows itself what became of capped rollouts, so `unfinished: zero` changes it nowhere.
    Left out and counted: rollouts without a label, aborted ones, ungraded ones, those without thinking when only
    thinking is wanted, those whose prompt alone fills `max_length`, and capped ones when `unfinished` is drop.
    Raises UserError when a rollout has several labels, and, naming the section of the configuration, when nothing is left.
    """
    one_a_rollout(labels, "The labels")
    row = pc.index_in(rollouts["rollout_id"], value_set=labels["rollout_id"].combine_chunks())
    by_state = head.label in ("critic", "trie")
    finish = rollouts["finish_reason"].to_numpy()
    capped = unfinished = finish == FinishReason.LENGTH
    ungraded = np.zeros(len(rollouts), dtype=bool)
    if head.label == "score":
        status = labels["status"].take(row).to_numpy()
        unfinished = capped | (status == GradeStatus.UNFINISHED)
        ungraded = ~unfinished & (status != GradeStatus.GRADED)
    reasons = {
        "without thinking": ~rollouts["thinking"].to_numpy() & thinking_only,
        "without a label": row.is_null().to_numpy(),
        "aborted": finish == FinishReason.ABORT,
        "ungraded": ungraded,
        "unfinished": unfinished & (head.unfinished == "drop"),
        "prompt beyond max_length": pc.list_value_length(rollouts["prompt_token_ids"]).to_numpy() > head.max_length,
    }
    kept, dropped = np.ones(len(rollouts), dtype=bool), {}
    for why, out in reasons.items():
        if count := int((kept & out).sum()):
            dropped[why] = count
        kept &= ~out
    if not kept.any():
        raise UserError(
            f"No rollout is left to train on: of {len(rollouts)}, left out {dropped or 'none'}. Check "
            f"{section}'s thinking_only, unfinished and max_length, and the grades."
        )
    label = labels["values" if by_state else head.label].take(row.filter(pa.array(kept)))
    capped, unfinished = capped[kept], unfinished[kept]
    first, value, without = None, label, unfinished
    if by_state:
        states = pc.list_value_length(label).to_numpy()
        first, value, without = np.cumsum(states) - states, pc.list_flatten(label), np.repeat(unfinished, states)
    value = value.fill_null(0.0).to_numpy()
    if not by_state:
        value = np.where(unfinished, 0.0, value)
    reward = grid.reward_bin(value)
    if head.unfinished == "ignore":
        reward = np.where(without, ANY_REWARD, reward)
    own = sequences_from_table(rollouts.filter(pa.array(kept)))
    return RolloutData(
        **vars(own), reward_bin=reward, first=first, censored=capped & (head.censored == "survival"), grid=grid, head=head,
        dropped=dropped,
    )  # fmt: skip

"""Training data: flat arrays of tokens and padded micro-batches.

Tables are read with pyarrow, joined on `rollout_id` and kept as one flat int32 array with offsets; no Python loop runs
over tokens. Labels come from the whole rollout; `max_length` cuts inputs only (the published code cuts first and so
mislabels lengths).

B rollouts of a micro-batch, T time, P labelled states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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

    @property
    def names(self) -> Sequence[str]:
        """What the units are called in error messages."""
        ...

    def input_lengths(self) -> NDArray[np.int64]:
        """Tokens of each unit that go through the model."""
        ...

    def batch(self, picked: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The picked units as what the trainee's `forward` takes, padded.

        Besides, `attention_mask` says what is no padding, and `count`, a scalar, how many supervised positions there are:
        the sums of the loss are divided by the count of the global batch.
        """
        ...


def prompt_fold(prompt_id: str, folds: int) -> int:
    """The fold of a prompt for cross-fitting: a stable hash of its id, so that it never depends on row order."""
    return derived_seed("fold", prompt_id) % folds


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

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        return self.lengths - self.prompt_lengths


def sequences_from_lists(
    names: Sequence[str], prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Sequences:
    """Flatten Python lists of ids."""
    whole = [np.asarray([*p, *r], dtype=np.int32) for p, r in zip(prompts, responses, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(w) for w in whole], dtype=np.int64)])
    return Sequences(names, np.concatenate(whole), offsets, np.asarray([len(p) for p in prompts], dtype=np.int64))


def sequences_from_table(rollouts: pa.Table) -> Sequences:
    """Flatten the two id columns of a rollouts table into prompt-then-response order."""
    pair = [rollouts[name].combine_chunks() for name in ("prompt_token_ids", "response_token_ids")]
    lengths = np.stack([pc.list_value_length(column).to_numpy() for column in pair]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(0))])
    tokens = np.empty(offsets[-1], dtype=np.int32)
    for column, own, starts in zip(pair, lengths, (offsets[:-1], offsets[:-1] + lengths[0]), strict=True):
        tokens[np.repeat(starts, own) + within(own)] = pc.list_flatten(column).to_numpy()
    return Sequences(rollouts["rollout_id"].to_pylist(), tokens, offsets, lengths[0])


def within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 … c−1 for every count c, one after the other."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)


def padded(
    sequences: Sequences, picked: NDArray[np.int64], lengths: NDArray[np.int64], pad_id: int
) -> dict[str, torch.Tensor]:
    """The first `lengths` tokens of the picked sequences, right-padded: input_ids and attention_mask, [B, T]."""
    ids = np.full((len(picked), int(lengths.max())), pad_id, dtype=np.int64)
    rows, columns = np.repeat(np.arange(len(picked)), lengths), within(lengths)
    ids[rows, columns] = sequences.tokens[np.repeat(sequences.offsets[picked], lengths) + columns]
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


@dataclass(frozen=True)
class TextData:
    """For language modelling: every response token is a target."""

    sequences: Sequences
    pad_id: int

    @property
    def names(self) -> Sequence[str]:
        return self.sequences.names

    def batch(self, picked: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        own = self.sequences
        inputs = own.lengths[picked] - 1
        counts = own.response_lengths[picked]
        first = own.prompt_lengths[picked] - 1
        batch = padded(own, picked, inputs, self.pad_id)
        columns = np.repeat(first, counts) + within(counts)
        targets = own.tokens[np.repeat(own.offsets[picked], counts) + columns + 1].astype(np.int64)
        return batch | {
            "positions": torch.from_numpy(np.repeat(np.arange(len(picked)), counts) * int(inputs.max()) + columns),
            "targets": torch.from_numpy(targets),
            "count": torch.tensor(len(targets)),
        }

    def input_lengths(self) -> NDArray[np.int64]:
        return self.sequences.lengths - 1


@dataclass(frozen=True)
class RolloutData:
    """For the joint head: at every labelled state a reward bin, a length bin, and whether the length is censored."""

    sequences: Sequences
    reward_bin: NDArray[np.int64]
    censored: NDArray[np.bool_]
    grid: BinGrid
    max_length: int
    legacy_off_by_one: bool = False
    pad_id: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> Sequence[str]:
        return self.sequences.names

    def input_lengths(self) -> NDArray[np.int64]:
        """The last token is not an input: no state after it is labelled."""
        return np.minimum(self.sequences.lengths - 1, self.max_length)

    def batch(self, picked: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        own = self.sequences
        inputs = self.input_lengths()[picked]
        first = own.prompt_lengths[picked] - 1
        counts = np.minimum(own.response_lengths[picked], inputs - first)  # states left after the cut
        j = within(counts)
        remaining = np.repeat(own.response_lengths[picked], counts) - j - int(self.legacy_off_by_one)
        batch = padded(own, picked, inputs, self.pad_id)
        return batch | {
            "positions": torch.from_numpy(np.repeat(np.arange(len(picked)) * int(inputs.max()) + first, counts) + j),
            "reward_bin": torch.from_numpy(np.repeat(self.reward_bin[picked], counts)),
            "length_bin": torch.from_numpy(self.grid.length_bin(remaining)),
            "censored": torch.from_numpy(np.repeat(self.censored[picked], counts)),
            "count": torch.tensor(counts.sum()),
        }


def rollout_data(
    rollouts: pa.Table, labels: pa.Table, head: Head, grid: BinGrid, section: str, thinking_only: bool = False
) -> RolloutData:
    """Join rollouts with grades (label=score) or values (label=value) and say what each rollout teaches.

    Left out and counted: rollouts without a label, aborted ones, ungraded ones, those without thinking when only
    thinking is wanted, those whose prompt alone fills `max_length`, and capped ones when `unfinished` is drop.
    Raises UserError when a rollout has several labels, and, naming the section of the configuration, when nothing is left.
    """
    one_a_rollout(labels, "The labels")
    row = pc.index_in(rollouts["rollout_id"], value_set=labels["rollout_id"].combine_chunks())
    labelled = row.is_valid().to_numpy()
    row = row.fill_null(0).to_numpy() if len(labels) else np.zeros(len(rollouts), dtype=np.int64)
    finish = rollouts["finish_reason"].to_numpy()
    capped = finish == FinishReason.LENGTH
    if head.label == "score":
        status = _taken(labels["status"], row)
        unfinished = capped | (status == GradeStatus.UNFINISHED)
        ungraded = ~unfinished & (status != GradeStatus.GRADED)
        label = _taken(labels["score"].fill_null(0.0), row)
    else:
        unfinished, ungraded = capped, np.zeros(len(rollouts), dtype=bool)
        label = _taken(labels["value"], row)
    prompt_lengths = pc.list_value_length(rollouts["prompt_token_ids"]).to_numpy()
    reasons = {
        "without thinking": ~rollouts["thinking"].to_numpy() & thinking_only,
        "without a label": ~labelled,
        "aborted": finish == FinishReason.ABORT,
        "ungraded": ungraded,
        "unfinished": unfinished & (head.unfinished == "drop"),
        "prompt beyond max_length": prompt_lengths > head.max_length,
    }
    kept, dropped = np.ones(len(rollouts), dtype=bool), Counter[str]()
    for why, out in reasons.items():
        dropped[why] = int((kept & out).sum())
        kept &= ~out
    counted = {why: n for why, n in dropped.items() if n}
    if not kept.any():
        raise UserError(
            f"No rollout is left to train on: of {len(rollouts)}, left out {counted or 'none'}. Check "
            f"{section}'s thinking_only, unfinished and max_length, and the grades."
        )
    reward = grid.reward_bin(np.where(unfinished & (head.unfinished != "drop"), 0.0, label)[kept])
    if head.unfinished == "ignore":
        reward = np.where(unfinished[kept], ANY_REWARD, reward)
    censored = capped[kept] & (head.censored == "survival")
    sequences = sequences_from_table(rollouts.filter(pa.array(kept)))
    return RolloutData(sequences, reward, censored, grid, head.max_length, head.legacy_off_by_one, dropped=counted)


def _taken(column: pa.ChunkedArray, row: NDArray[np.int64]) -> NDArray[Any]:
    return column.to_numpy()[row] if len(column) else np.zeros(len(row))

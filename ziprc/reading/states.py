"""A model's states on recorded rollouts, and the introspection table made of them: one row per labelled state.

The state at position j emits response token j: its row holds the joint before that token, the token's log-probability
and the entropy of the distribution it was drawn from (untempered, text rows only), rollout by rollout in the order of the
rollouts table, whatever the batching. Expectations are computed from float32 before the joint is stored as float16.
recorded.py reads the table, without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.head import JointHead, read_joint_head
from ziprc.joint.readout import TokenPair, read_joint
from ziprc.reading.logits import Reading, read_everything
from ziprc.tables.introspection import INTROSPECTION

PIECE_TOKENS = 1 << 18  # response tokens per piece: about 120 MiB of joints at 112 cells


def load_for_reading(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """A checkpoint on the accelerator if there is one."""
    model = load_model(folder, getattr(torch, dtype))
    return model.to("cuda") if torch.cuda.is_available() else model


@dataclass(frozen=True)
class JointReader:
    """A loaded checkpoint with a joint head."""

    model: PreTrainedModel
    joint: JointHead

    @classmethod
    def open(cls, folder: Path, dtype: str = "float32") -> JointReader:
        return cls(load_for_reading(folder, dtype), read_joint_head(folder))

    def joints(self, pairs: Sequence[TokenPair], token_budget: int) -> list[NDArray[np.float32]]:
        """Joint [m, R·L] of every labelled state, in the order of `pairs`."""
        found = dict(read_joint(self.model, self.joint, pairs, token_budget))
        return [found[i] for i in range(len(pairs))]

    def readings(self, pairs: Sequence[TokenPair], token_budget: int, chunk: int) -> list[Reading]:
        """Joint, log-probability and entropy of every labelled state, in the order of `pairs`."""
        found = dict(read_everything(self.model, self.joint, pairs, token_budget, chunk))
        return [found[i] for i in range(len(pairs))]


def token_pairs(rollouts: pa.Table) -> list[TokenPair]:
    """Prompt and response ids of every row, as views of flat arrays."""
    columns = []
    for name in ("prompt_token_ids", "response_token_ids"):
        ids = rollouts[name].combine_chunks()
        ends = np.cumsum(pc.list_value_length(ids).to_numpy())
        columns.append(np.split(ids.flatten().to_numpy(), ends[:-1]))
    return [TokenPair(prompt, response) for prompt, response in zip(*columns, strict=True)]


def token_ranges(rollouts: pa.Table, tokens: int = PIECE_TOKENS) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive rows of the rollouts table with about `tokens` response tokens each."""
    return ranges(pc.list_value_length(rollouts["response_token_ids"]).to_numpy(), tokens)


def ranges(counts: NDArray[np.int64], tokens: int = PIECE_TOKENS) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive things that have `counts` tokens, about `tokens` each, or one thing that has more."""
    ends = np.cumsum(counts)
    found, start = [], 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + tokens, side="right")), start + 1)
        found.append((start, stop))
        start = stop
    return found


def states_table(rollout_ids: pa.Array, readings: Sequence[Reading], grid: BinGrid) -> pa.Table:
    """Rows of the introspection table for some rollouts."""
    lengths = np.array([len(reading.joint) for reading in readings])
    flat = np.concatenate([reading.joint for reading in readings])
    distribution = JointDistribution(grid, flat)
    row = np.repeat(np.arange(len(readings)), lengths)
    offsets = pa.array(np.arange(len(flat) + 1, dtype=np.int64) * grid.size)
    return pa.table(
        {
            "rollout_id": rollout_ids.take(pa.array(row)),
            "position": (np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32),
            "expected_reward": distribution.expected_reward().astype(np.float32),
            "expected_remaining": distribution.expected_remaining().astype(np.float32),
            "log_prob": np.concatenate([reading.log_prob for reading in readings]),
            "entropy": np.concatenate([reading.entropy for reading in readings]),
            "joint": pa.LargeListArray.from_arrays(offsets, pa.array(flat.astype(np.float16).ravel())),
        },
        schema=INTROSPECTION.columns,
    )

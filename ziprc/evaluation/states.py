"""The introspection table, written and read in pieces: one row per labelled state, which is millions of rows.

Written rollout by rollout in the order of the rollouts table, whatever the batching, one row group per piece. Read
without trusting that order: each row is put where its rollout and position say. Every piece is checked against the
schema on write and on read. Expectations and quantiles are computed from float32 before the joint is stored as float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ziprc.artifacts import atomic_path
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import JointHead, load_model, read_joint_head
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.readout import TokenPair, read_joint
from ziprc.progress import progress
from ziprc.schemas import SCHEMAS, check_table

PIECE_TOKENS = 1 << 18  # response tokens per piece: about 120 MiB of joints at 112 cells
SCHEMA = SCHEMAS["introspection"]


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


def token_pairs(rollouts: pa.Table) -> list[TokenPair]:
    """Prompt and response ids of every row."""
    columns = (rollouts[name].to_pylist() for name in ("prompt_token_ids", "response_token_ids"))
    return [TokenPair(prompt, response) for prompt, response in zip(*columns, strict=True)]


def pieces(rollouts: pa.Table, tokens: int = PIECE_TOKENS) -> Iterator[pa.Table]:
    """Consecutive rows of the rollouts table with about `tokens` response tokens each."""
    ends = np.cumsum(pc.list_value_length(rollouts["response_token_ids"]).to_numpy())
    start = 0
    while start < rollouts.num_rows:
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + tokens, side="right")), start + 1)
        yield rollouts.slice(start, stop - start)
        start = stop


def states_table(rollout_ids: pa.Array, joints: Sequence[NDArray[np.float32]], grid: BinGrid) -> pa.Table:
    """Rows of the introspection table for some rollouts."""
    lengths = np.array([len(joint) for joint in joints])
    flat = np.concatenate(joints)
    distribution = JointDistribution(grid, flat)
    row = np.repeat(np.arange(len(joints)), lengths)
    offsets = pa.array(np.arange(len(flat) + 1, dtype=np.int32) * np.int32(grid.size))
    return pa.table(
        {
            "rollout_id": rollout_ids.take(pa.array(row)),
            "position": (np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32),
            "expected_reward": distribution.expected_reward().astype(np.float32),
            "expected_remaining": distribution.expected_remaining().astype(np.float32),
            "joint": pa.ListArray.from_arrays(offsets, pa.array(flat.astype(np.float16).ravel())),
        },
        schema=SCHEMA.columns,
    )


def write_states(target: Path, rollouts: pa.Table, reader: JointReader, token_budget: int) -> int:
    """Read the joint at every labelled state and write the table atomically; returns the number of states."""
    count = 0
    with (
        atomic_path(target) as private,
        pq.ParquetWriter(private, SCHEMA.columns, compression="zstd") as writer,
        progress(rollouts.num_rows, f"introspection {target.stem}", "rollouts") as bar,
    ):
        for piece in pieces(rollouts):
            joints = reader.joints(token_pairs(piece), token_budget)
            table = states_table(piece["rollout_id"].combine_chunks(), joints, reader.joint.grid)
            check_table(table, SCHEMA, str(target))
            writer.write_table(table)
            count += table.num_rows
            bar.update(piece.num_rows)
    return count


@dataclass(frozen=True)
class States:
    """What a head said about n rollouts.

    `expected_reward` holds all states, rollout after rollout (state j of rollout i at `start[i] + j`); `at` the joints
    [n, M, R·L] at the wanted positions.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    expected_reward: NDArray[np.float32]
    at: NDArray[np.float32]

    def last_mean(self, last_k: int) -> NDArray[np.float64]:
        """[n] mean expected reward over the last `last_k` labelled states (all, when there are fewer)."""
        sums = np.concatenate([[0.0], np.cumsum(self.expected_reward, dtype=np.float64)])
        stop = self.start + self.length
        first = np.maximum(stop - last_k, self.start)
        return np.clip((sums[stop] - sums[first]) / (stop - first), 0.0, 1.0)


def _checked_batches(path: Path) -> Iterator[pa.Table]:
    if not path.exists():
        raise UserError(f"{path} does not exist. Build it first: `make {path}`.")
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=PIECE_TOKENS):
            table = pa.Table.from_batches([batch])
            check_table(table, SCHEMA, str(path))
            yield table
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({error}). Delete it and build it again: `make {path}`."
        ) from None


def read_states(
    path: Path, rollout_ids: pa.Array, length: NDArray[np.int64], positions: NDArray[np.int64], cells: int
) -> States:
    """Expected rewards of all states of the given rollouts, and the joints at `positions` [n, M]."""
    start = np.cumsum(length) - length
    wanted, slot_of = np.unique(start[:, None] + positions, return_inverse=True)
    expected = np.full(int(length.sum()), np.nan, dtype=np.float32)
    joints = np.zeros((len(wanted), cells), dtype=np.float32)
    for table in _checked_batches(path):
        rollout = pc.index_in(table["rollout_id"].combine_chunks(), value_set=rollout_ids)
        mine = np.asarray(pc.is_valid(rollout))
        rollout = rollout.fill_null(0).to_numpy()
        position = table["position"].to_numpy()
        mine &= position < length[rollout]
        flat = start[rollout] + position
        expected[flat[mine]] = table["expected_reward"].to_numpy()[mine]
        slot = np.minimum(np.searchsorted(wanted, flat), len(wanted) - 1)
        hit = np.flatnonzero(mine & (wanted[slot] == flat))
        joints[slot[hit]] = _joint_rows(table, cells, path)[hit]
    if np.isnan(expected).any():
        lost = int(np.searchsorted(start, np.flatnonzero(np.isnan(expected))[0], side="right")) - 1
        raise UserError(
            f"{path} does not hold every state of rollout {rollout_ids[lost].as_py()} ({length[lost]} tokens). It "
            f"belongs to other rollouts: build it again with `make {path}`."
        )
    joints /= joints.sum(-1, keepdims=True)  # float16 rounds every cell
    return States(start, length, expected, joints[slot_of.reshape(positions.shape)])


def _joint_rows(table: pa.Table, cells: int, path: Path) -> NDArray[np.float16]:
    flat = table["joint"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if len(flat) != table.num_rows * cells:
        raise UserError(f"{path}: column 'joint': every row must have {cells} cells, as the checkpoint's grid says.")
    return flat.reshape(-1, cells)

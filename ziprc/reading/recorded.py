"""The introspection table, read in pieces without a model, and so without torch.

`read_states` keeps the joints of a few moments, `read_all` everything, for samplers that are replayed. The order of the rows
is not trusted: each is put where its rollout and position say, and every piece is checked against the schema.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ziprc.errors import UserError
from ziprc.tables.introspection import INTROSPECTION

READ_STATES = 1 << 16  # rows decoded at a time; more take memory and no less time


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
        for batch in pq.ParquetFile(path, page_checksum_verification=True).iter_batches(batch_size=READ_STATES):
            table = pa.Table.from_batches([batch])
            INTROSPECTION.check(table, str(path))
            yield table
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet ({error}). Delete it and build it again: `make {path}`."
        ) from None


def _wanted_rows(
    path: Path, rollout_ids: pa.Array, length: NDArray[np.int64]
) -> Iterator[tuple[pa.Table, NDArray[np.int64], NDArray[np.int64]]]:
    """Pieces of the table, each with the rows of the given rollouts and the numbers of these states.

    State j of rollout i has the number `sum(length[:i]) + j`. UserError, after the last piece, unless all were there.
    """
    start = np.cumsum(length) - length
    seen = np.zeros(int(length.sum()), dtype=bool)
    for table in _checked_batches(path):
        rollout = pc.index_in(table["rollout_id"].combine_chunks(), value_set=rollout_ids)
        mine = np.asarray(pc.is_valid(rollout))
        rollout = rollout.fill_null(0).to_numpy()
        position = table["position"].to_numpy()
        rows = np.flatnonzero(mine & (position >= 0) & (position < length[rollout]))
        state = (start[rollout] + position)[rows]
        seen[state] = True
        yield table, rows, state
    if not seen.all():
        lost = int(np.searchsorted(start, np.flatnonzero(~seen)[0], side="right")) - 1
        raise UserError(
            f"{path} does not hold every state of rollout {rollout_ids[lost].as_py()} ({length[lost]} tokens). It "
            f"belongs to other rollouts: build it again with `make {path}`."
        )


def read_states(
    path: Path, rollout_ids: pa.Array, length: NDArray[np.int64], positions: NDArray[np.int64], cells: int
) -> States:
    """Expected rewards of all states of the given rollouts, and the joints at `positions` [n, M]."""
    start = np.cumsum(length) - length
    wanted, slot_of = np.unique(start[:, None] + positions, return_inverse=True)
    expected = np.zeros(int(length.sum()), dtype=np.float32)
    joints = np.zeros((len(wanted), cells), dtype=np.float32)
    for table, rows, state in _wanted_rows(path, rollout_ids, length):
        expected[state] = table["expected_reward"].to_numpy()[rows]
        slot = np.minimum(np.searchsorted(wanted, state), len(wanted) - 1)
        hit = wanted[slot] == state
        joints[slot[hit]] = _joint_rows(table, cells, path)[rows[hit]]
    joints /= joints.sum(-1, keepdims=True)  # float16 rounds every cell
    return States(start, length, expected, joints[slot_of.reshape(positions.shape)])


@dataclass(frozen=True)
class Readings:
    """All labelled states of n rollouts, in the order of the ids: rollout i has rows `start[i] : start[i] + length[i]`.

    Row `start[i] + j` is the state that emits response token j. `joint` [T, R·L] is float16 as it is stored, so a row sums
    to one only up to rounding: cast it to float32 and divide by its sum. `log_prob` [T] of the emitted token and `entropy`
    [T] in nats belong to the untempered distribution over the text rows.
    """

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    joint: NDArray[np.float16]
    log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]


def read_all(path: Path, rollout_ids: pa.Array, length: NDArray[np.int64], cells: int) -> Readings:
    """Everything about the given rollouts, `length` [n] response tokens each; takes little more memory than the result."""
    states = int(length.sum())
    joint = np.empty((states, cells), dtype=np.float16)
    log_prob, entropy = np.empty(states, dtype=np.float32), np.empty(states, dtype=np.float32)
    for table, rows, state in _wanted_rows(path, rollout_ids, length):
        joint[state] = _joint_rows(table, cells, path)[rows]
        log_prob[state] = table["log_prob"].to_numpy()[rows]
        entropy[state] = table["entropy"].to_numpy()[rows]
    return Readings(np.cumsum(length) - length, length, joint, log_prob, entropy)


def _joint_rows(table: pa.Table, cells: int, path: Path) -> NDArray[np.float16]:
    flat = table["joint"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if len(flat) != table.num_rows * cells:
        raise UserError(f"{path}: column 'joint': every row must have {cells} cells, as the checkpoint's grid says.")
    return flat.reshape(-1, cells)

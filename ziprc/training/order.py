"""The order in which training data is seen, fixed beforehand from the seed as a list of micro-batches.

A resumed or distributed run therefore sees what an uninterrupted single process sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ziprc.errors import UserError
from ziprc.store.digests import derived_seed
from ziprc.training.data import TrainingData

SORTED_TOGETHER = 128  # sequences at least among which those of like length are put together; devices play no part
TOKEN_BATCHES_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class BatchOrder:
    """Every micro-batch of a run: step s, slot k is micro_batches[s * slots + k]; slot k goes to rank k % world."""

    micro_batches: list[NDArray[np.int64]]
    slots: int

    @property
    def steps(self) -> int:
        return len(self.micro_batches) // self.slots


def shuffled_passes(count: int, total: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The first `total` items of as many permutations of 0 … count−1 as are needed."""
    passes = [rng.permutation(count) for _ in range(-(-total // count))]
    return np.concatenate(passes)[:total]


def order_by_count(
    lengths: NDArray[np.int64], batch_size: int, micro: int, world: int, epochs: float, max_steps: int, seed: int,
    section: str,
) -> BatchOrder:  # fmt: skip
    """`batch_size` sequences per step, each step cut into equal micro-batches of at most `micro`, of like lengths.

    A set smaller than `batch_size` is one batch. There is at least one step; every step has the same size. Which
    sequences a step holds depends on neither `micro` nor `world`. UserError, which names the section of the
    configuration, when there are more processes than sequences in a step.
    """
    if batch_size < world:
        raise UserError(
            f"batch_size is {batch_size}, but {world} processes train: each needs at least one rollout per step. Raise "
            f"{section}'s batch_size or start fewer processes (runtime.accelerate)."
        )
    size = max(min(batch_size, len(lengths)), world)
    steps = max(1, round(epochs * len(lengths) / size))
    steps = min(steps, max_steps) if max_steps > 0 else steps
    rng = np.random.default_rng(derived_seed("order", seed))
    order = shuffled_passes(len(lengths), steps * size, rng)
    slots = -(-size // (micro * world)) * world
    group = -(-SORTED_TOGETHER // size) * size
    epoch = -(-len(lengths) // size) * size
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), epoch):
        passed = order[start : start + epoch]
        groups = [_by_length(passed[i : i + group], lengths) for i in range(0, len(passed), group)]
        own = [like[i : i + size] for like in groups for i in range(0, len(like), size)]
        batches += [own[i] for i in rng.permutation(len(own))]
    return BatchOrder([piece for batch in batches for piece in np.array_split(batch, slots)], slots)


def order_by_tokens(
    lengths: NDArray[np.int64], batch_tokens: int, total_tokens: int, world: int, seed: int
) -> BatchOrder:
    """About `batch_tokens` tokens per step, of like lengths, `total_tokens` in all; one micro-batch per process."""
    rng = np.random.default_rng(derived_seed("order", seed))
    needed = max(1, int(np.ceil(total_tokens / lengths.sum() * len(lengths))))
    order = shuffled_passes(len(lengths), max(needed, world), rng)
    group = max(world, int(TOKEN_BATCHES_SORTED_TOGETHER * batch_tokens / lengths.mean()))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), group):
        like = _by_length(order[start : start + group], lengths)
        parts = min(max(1, round(lengths[like].sum() / batch_tokens)), max(1, len(like) // world))
        ends = np.cumsum(lengths[like])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, parts) / parts, side="left") + 1
        batches += [piece for piece in np.split(like, cuts) if len(piece) >= world]
    batches = [batches[i] for i in rng.permutation(len(batches))]
    return BatchOrder([piece for batch in batches for piece in np.array_split(batch, world)], world)


def _by_length(picked: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return picked[np.argsort(lengths[picked], kind="stable")]


class MicroBatches(Dataset[dict[str, torch.Tensor]]):
    """Data in an order: item i is micro-batch i, already padded. Read it in sequence, one item at a time."""

    def __init__(self, data: TrainingData, order: BatchOrder) -> None:
        self.data, self.order = data, order

    def __len__(self) -> int:
        return len(self.order.micro_batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picked = self.order.micro_batches[index]
        return self.data.batch(picked) | {"picked": torch.from_numpy(picked)}

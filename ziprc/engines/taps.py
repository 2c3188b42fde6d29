"""What is kept of the logits while tokens are sampled: the joint head always, the text rows where a session wants them.

A reading is filed under (request, position): position is the number of output tokens so far, so it names the state that
emits the next one. `Readout` gathers the joint of a whole `generate` call and crosses from the device once in
`STEPS_PER_COPY` steps. `LiveReadout` hands one step over at a time and adds entropy and log-probability, which cost a
softmax over all text rows. The log-probability of a token can only be gathered once the token has been drawn, after the
logits are gone; so the rows of log-probabilities wait for it on the device.
Shapes: B rows of a batch, V rows of the output matrix, K of them not banned, n outputs of a step, R·L cells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ziprc.engines.base import Rows

STEPS_PER_COPY = 64

Place = tuple[int, int]  # number of the request, position


class TextRows:
    """The rows of the output matrix that can be sampled, and the model's own distribution over them."""

    def __init__(self, banned: Sequence[Rows], vocab_size: int) -> None:
        allowed = np.ones(vocab_size, dtype=bool)
        for first, last in banned:
            allowed[first:last] = False
        edges = np.flatnonzero(np.diff(allowed, prepend=False, append=False)).tolist()
        self.kept = [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        self.columns = np.where(allowed, np.cumsum(allowed) - 1, -1)  # [V] column of a row among the K

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """[B, K] log-softmax in float32, untempered; leaving rows out beats -inf, which makes 0·inf of an entropy."""
        parts = [logits[:, rows].float() for rows in self.kept]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).log_softmax(-1)


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """[B] nats, from [B, K]."""
    return -(log_probs.exp() * log_probs).sum(-1)


class Readout:
    """Readings of one `generate` call: for every step, which place each row of a tensor belongs to."""

    def __init__(self, joint: slice) -> None:
        self.joint = joint
        self.clear()

    def clear(self) -> None:
        self.places: list[Place] = []
        self._waiting: list[torch.Tensor] = []
        self._host: list[NDArray[np.float32]] = []

    def read(self, places: Sequence[Place], logits: torch.Tensor) -> None:
        """Row i of `logits` [B, V] is the state of `places[i]`."""
        self.add(places, logits[:, self.joint].float().softmax(-1))  # not a view: the slice itself is overwritten next

    def add(self, places: Sequence[Place], probabilities: torch.Tensor) -> None:
        """Row i of `probabilities` [B, R·L] is the reading of `places[i]`."""
        assert len(places) == len(probabilities), "every row of a batch belongs to a request"
        self.places.extend(places)
        self._waiting.append(probabilities)
        if len(self._waiting) >= STEPS_PER_COPY:
            self._copy()

    def _copy(self) -> None:
        if self._waiting:
            self._host.append(torch.cat(self._waiting).cpu().numpy())
            self._waiting.clear()

    def by_request(self, lengths: Sequence[int]) -> list[NDArray[np.float32]]:
        """[m, R·L] for every request, given the m of each. The last reading of a position counts."""
        self._copy()
        request, position = np.asarray(self.places, dtype=np.int64).T
        wanted = position < np.asarray(lengths)[request]  # a step may already be under way when a response stops
        starts = np.concatenate([[0], np.cumsum(lengths)])
        readings = np.concatenate(self._host)
        rows = np.full((starts[-1], readings.shape[1]), np.nan, dtype=np.float32)
        rows[starts[request[wanted]] + position[wanted]] = readings[wanted]
        assert not np.isnan(rows).any(), "a position was never read"
        return np.split(rows, starts[1:-1])


class Taken(NamedTuple):
    """What the states of a step say, in the order of its outputs."""

    joint: NDArray[np.float32]  # [n, R·L]
    entropy: NDArray[np.float32]  # [n]
    log_prob: NDArray[np.float32]  # [n] of the tokens that were drawn from these states


@dataclass(frozen=True)
class _Reading:
    """One forward pass, on its device."""

    row_of: dict[Place, int]
    joint: torch.Tensor  # [B, R·L]
    log_probs: torch.Tensor  # [B, K]

    def taken(self, rows: Sequence[int], columns: NDArray[np.int64]) -> Taken:
        """Rows and columns of the drawn tokens, [n] each; one copy from the device."""
        wanted = torch.zeros(len(self.log_probs), 1, dtype=torch.int64)
        wanted[rows, 0] = torch.from_numpy(columns)
        chosen = self.log_probs.gather(-1, wanted.to(self.log_probs.device))
        parts = torch.cat([entropy(self.log_probs)[:, None], chosen, self.joint], -1).cpu().numpy()[rows]
        return Taken(parts[:, 2:], parts[:, 0], parts[:, 1])


class LiveReadout:
    """Readings of a session, oldest first: usually one, two where a step starts before the last one's tokens are out."""

    def __init__(self, joint: slice, text: TextRows) -> None:
        self.joint, self.text = joint, text
        self._waiting: deque[_Reading] = deque()

    def read(self, places: Sequence[Place], logits: torch.Tensor) -> None:
        """Row i of `logits` [B, V] is the state of `places[i]`."""
        assert len(places) == len(logits), "every row of a batch belongs to a request"
        row_of = {place: row for row, place in enumerate(places)}
        joint = logits[:, self.joint].float().softmax(-1)
        self._waiting.append(_Reading(row_of, joint, self.text.log_probs(logits)))

    def take(self, places: Sequence[Place], tokens: NDArray[np.int32]) -> Taken:
        """What was read where `tokens` [n] were drawn: the outputs of one step, which all come from one forward pass.

        Older passes, which emitted nothing (a part of a prefill), are dropped.
        """
        while self._waiting and places[0] not in self._waiting[0].row_of:
            self._waiting.popleft()
        assert self._waiting, f"{places[0]} emitted a token but was never read"
        reading = self._waiting.popleft()
        return reading.taken([reading.row_of[place] for place in places], self.text.columns[tokens])

"""Taps: what reads the logits of a step, or changes them, before a token is drawn. Both engines apply the same ones.

A tap is given the logits of the requests that are ours, and for each row its place, (request, position): position is the
number of output tokens so far, so it names the state that emits the next one. Taps are applied in order: reading first,
banning last. `ReadJoint` gathers the joint of a whole `generate` call and crosses from the device once in `STEPS_PER_COPY`
steps. `ReadStates` hands one step over at a time and adds entropy and log-probability, which cost a softmax over all text
rows. The log-probability of a token can only be gathered once the token has been drawn, after the logits are gone; so
the rows of log-probabilities wait for it on the device. `Region` comes before both, so that what is read is the model's own law.
Shapes: B rows of a batch, V rows of the output matrix, K of them not banned, n outputs of a step, R·L cells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ziprc.engines.base import EngineSettings, IdRange, Watch
from ziprc.joint.reasoning import INSIDE, NEVER, ReasoningVocabulary

STEPS_PER_COPY = 64

Place = tuple[int, int]  # number of the request, position


class Text(NamedTuple):
    """What a row's request holds before its place."""

    begin: int  # where in the assistant's turn its prompt ends (joint/reasoning.py)
    temperature: float
    tokens: Callable[[int, int], Sequence[int]]  # output tokens [a, b)


class LogitsTap(Protocol):
    def apply(self, places: Sequence[Place], logits: torch.Tensor, texts: Sequence[Text]) -> None:
        """Row i of `logits` [B, V] is the state of `places[i]` after `texts[i]`; it may be changed, in place."""


class Region:
    """Copies of a reasoning vocabulary: in the thinking block as likely as their sources, elsewhere never sampled.

    A step looks at the newest token of each row. A row that was away (preempted, or a part of a prompt) is read anew.
    """

    def __init__(self, reasoning: ReasoningVocabulary) -> None:
        self.reasoning = reasoning
        self.known: dict[int, tuple[int, int]] = {}  # request → tokens that have been read, where in the turn they lead
        self.inside: torch.Tensor | None = None

    def apply(self, places: Sequence[Place], logits: torch.Tensor, texts: Sequence[Text]) -> None:
        """As `LogitsTap.apply`: rows in the block get its bias, the others no copies."""
        known = {}
        for (request, position), text in zip(places, texts, strict=True):
            read, state = self.known.get(request, (0, text.begin))
            if position < read:
                read, state = 0, text.begin
            if position > read:
                read, state = position, self.reasoning.after(state, text.tokens(read, position))
            known[request] = read, state
        self.known = known
        inside = [row for row, (request, _) in enumerate(places) if known[request][1] == INSIDE]
        if inside:
            if self.inside is None:
                self.inside = torch.from_numpy(self.reasoning.bias(logits.shape[-1])).to(logits.device, logits.dtype)
            # logits are divided by the temperature afterwards; at 0 the likeliest token is that of the base
            temperatures = [texts[row].temperature for row in inside]
            scale = logits.new_tensor(temperatures[:1] if len(set(temperatures)) == 1 else temperatures)[:, None]
            law = torch.where(self.inside.isneginf(), self.inside, self.inside.clamp(min=NEVER) * scale)
            if len(inside) == len(logits):
                logits += law
            else:
                logits[inside] += law
        if len(inside) < len(logits):
            within = set(inside)
            outside = [row for row in range(len(logits)) if row not in within] if within else slice(None)
            logits[outside, self.reasoning.rows] = -torch.inf


class Ban:
    """Rows of the output matrix that are never sampled."""

    def __init__(self, banned: Sequence[IdRange]) -> None:
        self.banned = [slice(*rows) for rows in banned]

    def apply(self, places: Sequence[Place], logits: torch.Tensor, texts: Sequence[Text]) -> None:
        for rows in self.banned:
            logits[:, rows] = -torch.inf


def taps_of(settings: EngineSettings, reader: LogitsTap | None) -> list[LogitsTap]:
    """What is applied at every step of an engine, in order."""
    first = [] if settings.reasoning is None else [Region(settings.reasoning)]
    return [*first, *([] if reader is None else [reader]), Ban(settings.banned)]


class TextRows:
    """The rows of the output matrix that can be sampled, and the model's own distribution over them."""

    def __init__(self, banned: Sequence[IdRange], vocab_size: int) -> None:
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
    """[B] nats, from [B, K], which may hold -inf."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


class ReadJoint:
    """The joint at every place of one `generate` call."""

    def __init__(self, joint: slice) -> None:
        self.joint = joint
        self.places: list[Place] = []
        self._waiting: list[torch.Tensor] = []
        self._host: list[NDArray[np.float32]] = []
        self.latest: tuple[Sequence[Place], torch.Tensor] = ((), torch.empty(0))  # of the last step

    def apply(self, places: Sequence[Place], logits: torch.Tensor, texts: Sequence[Text]) -> None:
        self.places.extend(places)
        self._waiting.append(logits[:, self.joint].float().softmax(-1))  # no view: the rows are banned next
        self.latest = places, self._waiting[-1]
        if len(self._waiting) >= STEPS_PER_COPY:
            self._copy()

    def _copy(self) -> None:
        if self._waiting:
            self._host.append(torch.cat(self._waiting).cpu().numpy())
            self._waiting.clear()

    def stopped(self, watch: Watch, live: Collection[int]) -> set[int]:
        """Which of the `live` requests of the last step a watch ends."""
        places, joint = self.latest
        rows = [row for row, (request, position) in enumerate(places) if request in live and position >= 0]
        if not rows:
            return set()
        requests, positions = zip(*(places[row] for row in rows), strict=True)
        return set(watch(requests, positions, joint[rows].cpu().numpy()))

    def by_request(self, lengths: Sequence[int]) -> list[NDArray[np.float32]]:
        """[m, R·L] for every request, given the m of each. The last reading of a position counts."""
        self._copy()
        request, position = np.asarray(self.places, dtype=np.int64).T
        # A step may already be under way when a response stops, and a part of a prefill may end inside the prompt.
        wanted = (position >= 0) & (position < np.asarray(lengths)[request])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        readings = np.concatenate(self._host)
        rows = np.full((starts[-1], readings.shape[1]), np.nan, dtype=np.float32)
        rows[starts[request[wanted]] + position[wanted]] = readings[wanted]
        assert not np.isnan(rows).any(), "a position was never read"
        return np.split(rows, starts[1:-1])


class StepStates(NamedTuple):
    """What the states of a step say, in the order of its outputs."""

    joint: NDArray[np.float32] | None  # [n, R·L]
    entropy: NDArray[np.float32]  # [n]
    log_prob: NDArray[np.float32]  # [n] of the tokens that were drawn from these states


@dataclass(frozen=True)
class _Pass:
    """What one forward pass said, on its device."""

    row_of: dict[Place, int]
    joint: torch.Tensor | None  # [B, R·L]
    log_probs: torch.Tensor  # [B, K]


class ReadStates:
    """The passes of a session that wait for their tokens, oldest first.

    Usually one; two where a step starts before the last one's tokens are out. `joint` None: there is no head to read.
    """

    def __init__(self, joint: slice | None, text: TextRows) -> None:
        self.joint, self.text = joint, text
        self._waiting: deque[_Pass] = deque()

    def apply(self, places: Sequence[Place], logits: torch.Tensor, texts: Sequence[Text]) -> None:
        row_of = {place: row for row, place in enumerate(places)}
        joint = None if self.joint is None else logits[:, self.joint].float().softmax(-1)
        self._waiting.append(_Pass(row_of, joint, self.text.log_probs(logits)))

    def take(self, places: Sequence[Place], tokens: NDArray[np.int32]) -> StepStates:
        """What was read where `tokens` [n] were drawn: the outputs of one step, which all come from one forward pass.

        That is the last pass that knows them: where only a part of a prompt was computed, an earlier one may bear the
        same name. It and all before it are dropped. One copy from the device.
        """
        known = [i for i, one in enumerate(self._waiting) if places[0] in one.row_of]
        assert known, f"{places[0]} emitted a token but was never read"
        for _ in range(known[-1]):
            self._waiting.popleft()
        found = self._waiting.popleft()
        rows = [found.row_of[place] for place in places]
        wanted = torch.zeros(len(found.log_probs), 1, dtype=torch.int64)
        wanted[rows, 0] = torch.from_numpy(self.text.columns[tokens])
        chosen = found.log_probs.gather(-1, wanted.to(found.log_probs.device))
        parts = [entropy(found.log_probs)[:, None], chosen, *([] if found.joint is None else [found.joint])]
        numbers = torch.cat(parts, -1).cpu().numpy()[rows]
        return StepStates(None if found.joint is None else numbers[:, 2:], numbers[:, 0], numbers[:, 1])

"""A reasoning vocabulary: rows [start, start + R) of the matrices are copies of ordinary rows, for use in the thinking block.

A model that may use both there can give the copies a meaning of their own, while all that it says outside is ordinary text.
Copy k of the n ids that have one are rows start + (k - 1)·n …, in the order of the ids. In the tokenizer a copy is its source's
token behind a mark that the decoder takes away (training/expansion.py), so every way of decoding gives the source's text.

Which law holds where depends on ids alone, and on those of the assistant's turn: what a user's text says of the tags counts
for nothing. Before the block and after it copies are banned. In it a row that has c copies, and each of them, loses
ln(1 + c) after the temperature, so that a token and its copies together are as likely as the token was: plain duplication would
not keep that, since `</think>` has no copy (P(</think>) = p would become p/(2 - p)).
T tokens, V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.errors import UserError
from ziprc.joint.vocabulary import IdRange, Vocabulary, derive_layout
from ziprc.store.files import read_json

NEVER = -1e4  # logit of a banned row in training: its probability is exactly 0, and 0 times it is a number
BEFORE, INSIDE, AFTER = 0, 1, 2  # of the thinking block; there is one, and what comes after it never enters it again


@dataclass(frozen=True)
class ReasoningVocabulary:
    """Which rows are copies of which, and the ids that open and close the block where they may be used.

    `turn` is the id that begins a turn of the chat. `only`: in the block nothing is allowed but copies and `closes`.
    """

    start: int
    sources: tuple[IdRange, ...]
    copies: int
    turn: int
    opens: int
    closes: int
    only: bool = False
    corrected: bool = True

    @cached_property
    def source_ids(self) -> NDArray[np.int64]:
        """[n] ids that have copies, ascending."""
        return np.concatenate([np.arange(a, b) for a, b in self.sources])

    @property
    def size(self) -> int:
        """R."""
        return self.copies * sum(b - a for a, b in self.sources)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)

    @cached_property
    def of_row(self) -> NDArray[np.int64]:
        """[R] source of every copy."""
        return np.tile(self.source_ids, self.copies)

    def is_copy(self, ids: Any) -> NDArray[np.bool_]:
        ids = np.asarray(ids)
        return (ids >= self.start) & (ids < self.start + self.size)

    def plain(self, ids: Any) -> NDArray[np.int64]:
        """The ids, every copy replaced by its source."""
        ids = np.asarray(ids, dtype=np.int64)
        copy = self.is_copy(ids)
        return np.where(copy, self.of_row[np.where(copy, ids - self.start, 0)], ids)

    def after(self, state: int, ids: Iterable[int]) -> int:
        """Where in the turn one is after `ids`, having been at `state`."""
        for one in ids:
            if one == self.closes:
                return AFTER
            if one == self.opens and state == BEFORE:
                state = INSIDE
        return state

    def at_end(self, prompt: Sequence[int]) -> int:
        """Where in the turn the response to a prompt begins; a prompt may hold a part of the response already."""
        ids = np.asarray(prompt)
        begins = np.flatnonzero(ids == self.turn)
        return self.after(BEFORE, ids[begins[-1] + 1 :].tolist()) if len(begins) else BEFORE

    def inside(self, begin: Any, responses: Any) -> NDArray[np.bool_]:
        """[B, T] whether token t is drawn in the block, given where each response begins [B] and their tokens [B, T]."""
        ids, begin = np.asarray(responses), np.asarray(begin)[:, None]
        before = np.zeros(ids.shape, dtype=np.int64)
        opened, closed = before.copy(), before
        opened[:, 1:] = (ids == self.opens).cumsum(-1)[:, :-1]
        closed[:, 1:] = (ids == self.closes).cumsum(-1)[:, :-1]
        return ((begin == INSIDE) | ((begin == BEFORE) & (opened > 0))) & (closed == 0)

    def bias(self, vocab_size: int) -> NDArray[np.float32]:
        """[V] what is added to tempered logits in the block; -inf where a row is not allowed. Outside, `rows` are not."""
        found = np.zeros(vocab_size, dtype=np.float32)
        if self.only:
            found[:] = -np.inf
            found[self.closes] = found[self.rows] = 0
        elif self.corrected:
            found[self.source_ids] = found[self.rows] = -np.log1p(self.copies)
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sources": [list(one) for one in self.sources]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ReasoningVocabulary:
        return cls(**{**record, "sources": tuple((int(a), int(b)) for a, b in record["sources"])})


def of_config(config: Mapping[str, Any]) -> ReasoningVocabulary | None:
    """What a model's config says of it; None where the model has no copies. UserError where it cannot be."""
    record = (config.get("ziprc") or {}).get("reasoning")
    if not record:
        return None
    found = ReasoningVocabulary.from_dict(record)
    if found.start + found.size != config["vocab_size"]:
        raise UserError(
            f"The reasoning vocabulary is rows {found.start} to {found.start + found.size - 1}, but the output matrix has "
            f"{config['vocab_size']} rows: copies are its last ones. The checkpoint's config.json has been changed."
        )
    return found


def copied_rows(config: Any) -> range:
    """The rows of a model, by its config, that are copies; none where it has no reasoning vocabulary."""
    found = of_config(config if isinstance(config, Mapping) else config.to_dict())
    return range(0) if found is None else range(found.rows.start, found.rows.stop)


def text_rows(tokenizer: Vocabulary, model: Any) -> int:
    """The rows of a model's output matrix that are text: the first so many."""
    rows = model.get_output_embeddings().weight.shape[0]
    return derive_layout(tokenizer, rows, 0, copies=copied_rows(model.config)).text_size


def read_reasoning(folder: Path | str) -> ReasoningVocabulary | None:
    """The reasoning vocabulary of a checkpoint; None where it has none."""
    return of_config(read_json(Path(folder) / "config.json"))


def as_ranges(ids: Iterable[int]) -> tuple[IdRange, ...]:
    """Half-open ranges that hold these ids and no other."""
    ordered = np.unique(np.fromiter(ids, dtype=np.int64))
    breaks = np.flatnonzero(np.diff(ordered) > 1)
    firsts, lasts = np.append(0, breaks + 1), np.append(breaks, len(ordered) - 1)
    ends = zip(firsts, lasts, strict=True) if len(ordered) else ()
    return tuple((int(ordered[a]), int(ordered[b]) + 1) for a, b in ends)

"""How the rows of the output matrix are divided: text, the reserved rows of the joint head, extra reasoning rows.

The published code trusts one fixed first row (151669, right for Qwen3 only). Here the first row is derived from
the tokenizer, and a slice that overlaps any id that the tokenizer or the generation config can produce is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from ziprc.errors import UserError

IdRange = tuple[int, int]  # half-open: rows of the output matrix, which are token ids where the tokenizer knows them


class Vocabulary(Protocol):
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class VocabLayout:
    """Rows [0, text_size) can be text; rows [joint_start, joint_start + joint_size) are the joint head.

    Rows [reasoning_start, reasoning_start + reasoning_size) are a second set of tokens, for use inside the thinking
    block (reasoning.py); a record without them means that there are none.
    """

    vocab_size: int
    text_size: int
    joint_start: int
    joint_size: int
    reasoning_start: int = 0
    reasoning_size: int = 0

    @property
    def joint_stop(self) -> int:
        return self.joint_start + self.joint_size

    @property
    def joint_slice(self) -> slice:
        return slice(self.joint_start, self.joint_stop)

    @classmethod
    def from_dict(cls, record: Mapping[str, int]) -> VocabLayout:
        record = {"reasoning_start": 0, "reasoning_size": 0, **record}
        return cls(**{field.name: int(record[field.name]) for field in fields(cls)})


def generation_ids(generation_config: Any) -> set[int]:
    """Ids that a generation config can emit: bos, eos, pad and forced tokens."""
    kinds = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")
    values = (getattr(generation_config, f"{kind}_token_id", None) for kind in kinds)
    return {int(one) for v in values for one in (v if isinstance(v, Iterable) else [v]) if one is not None}


def check_layout(layout: VocabLayout, used_ids: Collection[int]) -> None:
    """Raise UserError when reserved rows do not fit into the matrix, overlap an id in use (both ids are named) or others."""
    if layout.joint_start < 0 or layout.joint_stop > layout.vocab_size:
        raise UserError(
            f"The joint head needs rows {layout.joint_start} to {layout.joint_stop - 1} ({layout.joint_size} rows), but the "
            f"output matrix has {layout.vocab_size} rows. Use fewer bins (train_joint.length_edges, reward_centres) or "
            "a model with more free rows."
        )
    overlap = sorted(i for i in used_ids if layout.joint_start <= i < layout.joint_stop)
    if overlap:
        raise UserError(
            f"The joint head starts at row {layout.joint_start}, but id {overlap[0]} inside its "
            f"{layout.joint_size} rows can be produced by the tokenizer or the generation config. The first free id is "
            f"{max(used_ids) + 1}: leave train_joint.first_row empty to use it."
        )
    reasoning = range(layout.reasoning_start, layout.reasoning_start + layout.reasoning_size)
    taken = {*range(layout.text_size), *used_ids, *range(layout.joint_start, layout.joint_stop)}
    if reasoning and (reasoning.stop > layout.vocab_size or not taken.isdisjoint(reasoning)):
        raise UserError(
            f"The reasoning vocabulary needs rows {reasoning.start} to {reasoning.stop - 1} for itself, but the output matrix "
            f"has {layout.vocab_size} rows, of which text takes 0 to {layout.text_size - 1} and the joint head "
            f"{layout.joint_start} to {layout.joint_stop - 1}."
        )


def derive_layout(
    tokenizer: Vocabulary,
    vocab_size: int,
    joint_size: int,
    generation_config: Any = None,
    first_row: int | None = None,
    copies: range = range(0),
) -> VocabLayout:
    """Place `joint_size` rows right above the highest id in use (or at `first_row`) and check the result.

    `copies` are the rows of a reasoning vocabulary, which the tokenizer knows although they are no text.
    """
    used = (set(tokenizer.get_vocab().values()) | generation_ids(generation_config)) - set(copies)
    text_size = max(used) + 1
    start = text_size if first_row is None else first_row
    layout = VocabLayout(vocab_size, text_size, start, joint_size, copies.start, len(copies))
    check_layout(layout, used)
    return layout

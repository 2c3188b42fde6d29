"""How the rows of the output matrix are divided: text, then the reserved rows of the joint head.

The published code trusts one fixed first row (151669, right for Qwen3 only). Here the first row is derived from
the tokenizer, and a slice that overlaps any id that the tokenizer or the generation config can produce is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ziprc.errors import UserError


class Vocabulary(Protocol):
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class VocabLayout:
    """Rows [0, text_size) can be text; rows [joint_start, joint_start + joint_size) are the joint head."""

    vocab_size: int
    text_size: int
    joint_start: int
    joint_size: int

    @property
    def joint_stop(self) -> int:
        return self.joint_start + self.joint_size

    @property
    def joint_slice(self) -> slice:
        return slice(self.joint_start, self.joint_stop)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, int]) -> VocabLayout:
        return cls(**{name: int(record[name]) for name in ("vocab_size", "text_size", "joint_start", "joint_size")})


def generation_ids(generation_config: Any) -> set[int]:
    """Ids that a generation config can emit: bos, eos, pad and forced tokens."""
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
                 "forced_eos_token_id"):  # fmt: skip
        value = getattr(generation_config, name, None)
        if value is not None:
            found.update(value if isinstance(value, Iterable) else [value])
    return {int(v) for v in found}


def check_layout(layout: VocabLayout, used_ids: Iterable[int]) -> None:
    """Raise UserError when the slice does not fit into the matrix or overlaps an id in use (both ids are named)."""
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


def derive_layout(
    tokenizer: Vocabulary, vocab_size: int, joint_size: int, generation_config: Any = None, first_row: int | None = None
) -> VocabLayout:
    """Place `joint_size` rows right above the highest id in use (or at `first_row`) and check the result."""
    used = set(tokenizer.get_vocab().values()) | generation_ids(generation_config)
    text_size = max(used) + 1
    layout = VocabLayout(vocab_size, text_size, text_size if first_row is None else first_row, joint_size)
    check_layout(layout, used)
    return layout

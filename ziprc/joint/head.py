"""What a checkpoint says of itself, from `ziprc.json` and the tokenizer's file alone.

Imports neither torch nor transformers, which take seconds: what only looks at recorded joints need not wait for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.tokenizer import text_ids
from ziprc.joint.vocabulary import VocabLayout, check_layout
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.store.manifest import read_sealed


@dataclass(frozen=True)
class JointHead:
    """Which rows of the output matrix speak, and what they mean."""

    layout: VocabLayout
    grid: BinGrid

    def to_dict(self) -> dict[str, Any]:
        return {"layout": asdict(self.layout), "grid": self.grid.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> JointHead:
        return cls(VocabLayout.from_dict(record["layout"]), BinGrid.from_dict(record["grid"]))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of `ziprc.json`; UserError when it is missing, damaged or edited."""
    return read_sealed(Path(folder) / CHECKPOINT_MANIFEST)


def read_joint_head(folder: Path) -> JointHead:
    """Layout and grid of a checkpoint; UserError when it has none or when its slice overlaps ids in use."""
    record = read_manifest(folder)
    if "joint" not in record:
        raise UserError(
            f"{folder} has no joint head: its {CHECKPOINT_MANIFEST} names no grid. Train one with train_joint."
        )
    head = JointHead.from_dict(record["joint"])
    if head.layout.joint_size != head.grid.size:
        raise UserError(f"{folder}: the grid has {head.grid.size} cells but the layout {head.layout.joint_size} rows.")
    check_layout(head.layout, text_ids(folder))
    return head

"""A checkpoint that describes itself: a normal Hugging Face folder plus `ziprc.json`.

`ziprc.json` holds the vocabulary layout, the bin grid, the objective, the base model and the parents' digests, and is
written last; the layout and grid are mirrored in `config.json` under `ziprc`, so that vLLM and third parties see
them. Nobody passes a token id or a bin count on a command line. Weights are safetensors; no remote code runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.vocabulary import VocabLayout, check_layout, generation_ids
from ziprc.store.digests import digest_file
from ziprc.store.files import atomic_folder
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.store.manifest import read_sealed, write_sealed

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class JointHead:
    """Which rows of the output matrix speak, and what they mean."""

    layout: VocabLayout
    grid: BinGrid

    def to_dict(self) -> dict[str, Any]:
        return {"layout": self.layout.to_dict(), "grid": self.grid.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> JointHead:
        return cls(VocabLayout.from_dict(record["layout"]), BinGrid.from_dict(record["grid"]))


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a local model folder; UserError when there is none."""
    if not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). Copy the tokenizer files of the "
            "base model into it."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.init_kwargs.pop("local_files_only", None)  # else whether this machine is offline would be saved with it
    return tokenizer


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a local folder, in evaluation mode, safetensors only."""
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json.")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


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
    from transformers import GenerationConfig

    used = set(load_tokenizer(folder).get_vocab().values())
    if (Path(folder) / "generation_config.json").exists():
        used |= generation_ids(GenerationConfig.from_pretrained(folder))
    check_layout(head.layout, used)
    return head


def save_checkpoint(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: Mapping[str, Any],
    joint: JointHead | None = None,
) -> None:
    """Write model, tokenizer and manifest atomically. `record` holds params, parents and the like, JSON only."""
    if joint is not None:
        model.config.ziprc = joint.to_dict()
    with atomic_folder(target) as private:
        model.save_pretrained(private, safe_serialization=True)
        tokenizer.save_pretrained(private)
        files = {p.name: digest_file(p) for p in sorted(private.iterdir()) if p.is_file()}
        manifest = {**record, "files": files} | ({"joint": joint.to_dict()} if joint else {})
        write_sealed(private / CHECKPOINT_MANIFEST, manifest)

"""A checkpoint that describes itself: a normal Hugging Face folder plus `ziprc.json`.

`ziprc.json` holds the vocabulary layout, the bin grid, the objective, the base model and the parents' digests, and is
written last; the layout and grid are mirrored in `config.json` under `ziprc`, so that vLLM and third parties see
them. Nobody passes a token id or a bin count on a command line. Weights are safetensors; no remote code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ziprc.errors import UserError
from ziprc.joint.head import JointHead
from ziprc.store.digests import digest_file
from ziprc.store.files import atomic_folder
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.store.manifest import write_sealed


def load_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a local folder, in evaluation mode, safetensors only."""
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json.")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def save_checkpoint(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: Mapping[str, Any],
    joint: JointHead | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write model, tokenizer and manifest atomically. `record` holds params, parents and the like, JSON only.

    `more` is given the folder, to write what else belongs to the checkpoint.
    """
    if joint is not None:
        model.config.ziprc = {**(getattr(model.config, "ziprc", None) or {}), **joint.to_dict()}  # beside `reasoning`
    with atomic_folder(target) as private:
        model.save_pretrained(private, safe_serialization=True)
        tokenizer.save_pretrained(private)
        if more is not None:
            more(private)
        files = {p.name: digest_file(p) for p in sorted(private.iterdir()) if p.is_file()}
        manifest = {**record, "files": files} | ({"joint": joint.to_dict()} if joint else {})
        write_sealed(private / CHECKPOINT_MANIFEST, manifest)

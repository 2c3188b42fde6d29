"""The only places that generate: token ids in, token ids (and the joint, where it is read) out. `start` makes an engine.

Each engine is imported when it is asked for, so nothing here needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ziprc.errors import UserError, nearest
from ziprc.store.files import read_json

if TYPE_CHECKING:
    from ziprc.engines.base import Engine, EngineSettings

ENGINES = {"vllm": "VLLMEngine", "hf": "HFEngine"}  # module of this room → its class


def start(kind: str, settings: EngineSettings) -> Engine:
    """Start the engine `vllm` or `hf`. UserError when the model cannot hold `max_model_len` tokens."""
    if kind not in ENGINES:
        raise UserError(f"There is no engine '{kind}'{nearest(kind, ENGINES)}.")
    config = read_json(settings.model / "config.json")
    limit = config.get("max_position_embeddings")
    if limit and settings.max_model_len > limit and not config.get("rope_scaling"):
        raise UserError(
            f"max_model_len is {settings.max_model_len}, but the model in {settings.model} has {limit} positions "
            "(max_position_embeddings). Lower max_model_len, or use a model with a longer context."
        )
    return getattr(importlib.import_module(f"ziprc.engines.{kind}"), ENGINES[kind])(settings)

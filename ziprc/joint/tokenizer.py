"""The tokenizer of a model folder, and which ids it and the generation config can produce.

Imports neither torch nor, before it must, transformers.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from ziprc.errors import UserError
from ziprc.joint.reasoning import copied_rows
from ziprc.joint.vocabulary import generation_ids
from ziprc.store.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a local model folder; UserError when there is none."""
    if not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). Copy the tokenizer files of the "
            "base model into it."
        )
    config = Path(folder) / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.exists() else None
    if named in ("PreTrainedTokenizerFast", "TokenizersBackend") and (Path(folder) / "tokenizer.json").exists():
        from transformers import (
            PreTrainedTokenizerFast as Kind,
        )  # our own models': without AutoTokenizer's 5 s of imports
    else:
        from transformers import AutoTokenizer as Kind
    tokenizer = Kind.from_pretrained(folder)
    tokenizer.init_kwargs.pop("local_files_only", None)  # else whether this machine is offline would be saved with it
    return tokenizer


def text_ids(folder: Path) -> set[int]:
    """Every id that the tokenizer or the generation config of a model folder can produce, copies of such apart."""
    if (folder / "tokenizer.json").exists():
        used = set(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True).values())
    else:
        used = set(load_tokenizer(folder).get_vocab().values())
    generation = folder / "generation_config.json"
    used -= set(copied_rows(read_json(folder / "config.json")))
    return used | (generation_ids(SimpleNamespace(**read_json(generation))) if generation.exists() else set())

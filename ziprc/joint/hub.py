"""Models of the Hugging Face Hub as local folders: where one is, which commit it is, whether it can be used.

`base` and `ziprc fetch` may download; every other stage reads the cache that they fill, and so do they themselves where
HF_HUB_OFFLINE=1. A model is used as its folder in the cache, never downloaded into a folder of ours: with `local_dir`,
`snapshot_download` would look for nothing in the cache.
"""

from __future__ import annotations

import json
from pathlib import Path

from ziprc.errors import UserError
from ziprc.joint.tokenizer import load_tokenizer

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges*", "*.model"]


def local_model(name: str, revision: str | None, key: str, download: bool = False) -> Path:
    """The folder of a model: `name` itself where it is one, else its snapshot in the Hugging Face cache.

    UserError that names `key`, the key of the configuration, when there is neither and it may not or cannot be fetched.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        wanted = {"revision": revision, "allow_patterns": MODEL_FILES, "ignore_patterns": "*/*"}
        return Path(snapshot_download(name, local_files_only=not download, **wanted))
    except (OSError, HFValidationError) as error:  # errors of the Hub, of the cache and of the network are OSErrors
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"The model '{name}' ({key}, revision {revision or 'newest'}) is neither a local folder nor in the Hugging Face "
            f"cache, and {'could not be fetched' if download else 'this stage does not use the network'} "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). On a machine with a network, run "
            f"`make fetch EXPERIMENT=<experiment>` beforehand (or `hf download {name}{at}`) and take the cache at HF_HOME "
            f"along; or set {key} to a local folder. A private model needs HF_TOKEN."
        ) from None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hugging Face cache holds, which is its name; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def check_model(folder: Path, name: str, key: str) -> None:
    """Refuse a folder that later stages could not use."""
    found = {path.name for path in folder.iterdir()}
    weights = {file for file in found if file.endswith(".safetensors")}
    index = folder / "model.safetensors.index.json"
    try:
        missing = set(json.loads(index.read_text())["weight_map"].values()) - weights if index.exists() else set()
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{key} '{name}': {index} is damaged ({error}). Fetch or copy the model again.") from None
    if "config.json" not in found or not weights or missing:
        raise UserError(
            f"{key} '{name}' needs config.json and weights in safetensors; {folder} holds: "
            f"{', '.join(sorted(found)) or 'nothing'}{f', and lacks {min(missing)}' if missing else ''}."
        )
    if not load_tokenizer(folder).chat_template:
        raise UserError(
            f"{key} '{name}' has no chat template, so prompts cannot be formatted. Use a chat model, or add "
            f"`chat_template.jinja` to a local copy and set {key} to that folder."
        )

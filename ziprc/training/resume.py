"""Training states on disk: what a run that was ended goes on from.

They lie beside the checkpoint that is being made, in `.<name>.training/<digest>/checkpoint-<step>`; the digest is of
all that determines the run. `owner.json` says which checkpoint a folder is for, and only a folder that says so is ever
removed. A state counts once its `complete.json` is there, which is written last and holds the digests of its files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from ziprc.errors import UserError
from ziprc.store.digests import digest_file, digest_json
from ziprc.store.files import sync_file
from ziprc.store.manifest import read_sealed, write_sealed

OWNER = "owner.json"
COMPLETE = "complete.json"


def world_size() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def state_folder(target: Path, identity: Any) -> Path:
    """Where training states of `target` are kept, by all that determines the run."""
    return target.parent / f".{target.name}.training" / digest_json([identity, world_size()])[:16]


def run_name(folder: Path) -> str:
    """The checkpoint's name, from `.<name>.training/<digest>`."""
    return folder.parent.name.removeprefix(".").removesuffix(".training")


def claim(folder: Path) -> None:
    """Make `folder` and say whose it is; remove what runs with other settings have left of the same checkpoint."""
    _remove_own(folder.parent, kept=folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_sealed(folder / OWNER, {"checkpoint": run_name(folder)})


def forget_states(target: Path) -> None:
    """Remove the training states of a finished checkpoint; whatever else lies there stays."""
    parent = target.parent / f".{target.name}.training"
    _remove_own(parent)
    with contextlib.suppress(OSError):  # there is none, or it holds something of others
        parent.rmdir()


def _remove_own(parent: Path, kept: Path | None = None) -> None:
    for marker in parent.glob(f"*/{OWNER}"):
        with contextlib.suppress(UserError):  # damaged, so it is not known whose it is
            if marker.parent != kept and read_sealed(marker) == {"checkpoint": run_name(marker.parent)}:
                shutil.rmtree(marker.parent, ignore_errors=True)


def complete(state: Path) -> None:
    """Let a state count; only then are older ones removed."""
    for path in state.iterdir():
        sync_file(path)
    write_sealed(state / COMPLETE, {"files": _digests(state)})
    for other in state.parent.glob("checkpoint-*"):
        if other != state:
            shutil.rmtree(other, ignore_errors=True)


def last_complete_state(folder: Path) -> Path | None:
    """The newest training state that was written to its end and is intact; a damaged one is named and left out."""
    found = {int(m.parent.name.rpartition("-")[2]): m for m in folder.glob(f"checkpoint-*/{COMPLETE}")}
    for _, marker in sorted(found.items(), reverse=True):
        with contextlib.suppress(UserError):
            if read_sealed(marker)["files"] == _digests(marker.parent):
                return marker.parent
        print(f"{marker.parent} is damaged and is not resumed from", file=sys.stderr, flush=True)
    return None


def _digests(state: Path) -> dict[str, str]:
    return {p.name: digest_file(p) for p in sorted(state.iterdir()) if p.is_file() and p.name != COMPLETE}

"""Where every artifact lives, and how one is written so that no half of it is ever seen.

The rules: write beside the target, fsync, rename, manifest last; one writer at a time, held by a lock on the
output; a manifest holds only what follows from inputs (digests, parameters), never a time or a path, so that two
runs of the same thing give the same bytes. `Layout` is the only place that knows a path under `results/`; the
Snakefile and the stages both ask it. Imports neither torch nor pyarrow.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziprc.errors import UserError

CHECKPOINT_MANIFEST = "ziprc.json"


@dataclass(frozen=True)
class Layout:
    """Paths of one experiment, `<root>/<experiment>/…`."""

    root: Path
    experiment: str

    @property
    def home(self) -> Path:
        return self.root / self.experiment

    def table(self, kind: str, name: str) -> Path:
        """A parquet table such as `rollouts/train.parquet`."""
        return self.home / kind / f"{name}.parquet"

    def checkpoint(self, name: str) -> Path:
        """A model folder; its `ziprc.json` is written last."""
        return self.home / "checkpoints" / name

    def log(self, stage: str, name: str) -> Path:
        return self.home / "logs" / f"{stage}-{name}.log"

    def benchmark(self, stage: str, name: str) -> Path:
        return self.home / "benchmarks" / f"{stage}-{name}.tsv"


def manifest_of(artifact: Path) -> Path:
    """The manifest of a table (`x.parquet` → `x.manifest.json`), page, or checkpoint folder (`ziprc.json`)."""
    if artifact.suffix:
        return artifact.with_suffix(".manifest.json")
    return artifact / CHECKPOINT_MANIFEST


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else (order of work, sharding)."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before compute is spent when the disk cannot hold the output."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB free, but this stage needs about {needed_bytes / 2**20:.0f} MiB. "
            "Free some space, or put the results folder on another disk (a symbolic link `results` will do)."
        )


@contextlib.contextmanager
def output_lock(target: Path) -> Iterator[None]:
    """Hold the exclusive right to write `target`; the kernel releases it when the process dies.

    Raises UserError when another live process is writing the same output.
    """
    lock = target.parent / f".{target.name}.lock"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise UserError(
                f"{target} is being written by another process (pid {owner}). Wait for it to end, or stop it, "
                "then run the same command again."
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a private path beside `target`; on success fsync it and rename it onto `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    private = target.parent / f".{target.name}.partial"
    private.unlink(missing_ok=True)
    try:
        yield private
        with open(private, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(private, target)
        sync_folder(target.parent)
    finally:
        private.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a private folder; on success move its files to `target`, the manifest last.

    A reader that waits for the manifest never sees a mixture: the old manifest goes before the first file moves.
    """
    private = target.parent / f".{target.name}.partial"
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir(parents=True)
    try:
        yield private
        target.mkdir(parents=True, exist_ok=True)
        (target / CHECKPOINT_MANIFEST).unlink(missing_ok=True)
        names = sorted(path.name for path in private.iterdir())
        for stale in target.iterdir():
            if stale.is_file() and stale.name not in names:
                stale.unlink()
        for name in sorted(names, key=lambda n: n == CHECKPOINT_MANIFEST):
            (private / name).chmod(0o644)  # safetensors writes 0600, which nobody else on a cluster can read
            with open(private / name, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(private / name, target / name)
        sync_folder(target)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    with atomic_path(target) as private:
        private.write_text(text)


def write_json(target: Path, value: Any) -> None:
    write_text(target, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or damaged one is a UserError naming it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Build it first: `make {path}`.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Delete it and build it again: `make {path}`.") from None


def write_manifest(artifact: Path, params: Mapping[str, Any], parents: Mapping[str, Path]) -> None:
    """Describe a finished file: its sha256, the science parameters, and the digests of its parents.

    `parents` maps a role to the parent artifact; what is recorded is the sha256 of the parent's manifest, so a chain of
    manifests fixes the whole history.
    """
    write_json(
        manifest_of(artifact),
        {
            "artifact": artifact.name,
            "sha256": digest_file(artifact),
            "params": dict(params),
            "parents": {role: digest_file(manifest_of(path)) for role, path in sorted(parents.items())},
        },
    )

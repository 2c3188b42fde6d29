"""Where every artifact lives, and how one is written so that no half of it is ever seen.

The rules: write beside the target, fsync, rename, manifest last; one writer at a time, held by a lock on the
output; a manifest holds only what follows from inputs (digests, parameters), never a time or a path, so that two
runs of the same thing give the same bytes. A manifest carries a seal, the digest of its own content, so that one flipped
bit anywhere, in a file or in what describes it, is noticed before anything is made from it. `Layout` is the only
place that knows a path under `results/`; the Snakefile and the stages both ask it. Imports neither torch nor pyarrow.
"""

from __future__ import annotations

import contextlib
import errno
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
MANIFEST_SUFFIX = ".manifest.json"
SEAL = "seal"
LITTLE_BYTES = 4 << 20  # less free space than this, and a failed write is put down to the full disk


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

    def provenance(self, stage: str, name: str) -> Path:
        """How an artifact came to be; no artifact itself (ziprc/provenance.py)."""
        return self.home / "provenance" / f"{stage}-{name}.json"


def manifest_of(artifact: Path) -> Path:
    """The manifest of a table (`x.parquet` → `x.manifest.json`), page, or checkpoint folder (`ziprc.json`)."""
    if artifact.suffix:
        return artifact.with_suffix(MANIFEST_SUFFIX)
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
            f"{folder} has {free / 2**20:.1f} MiB free, but this stage needs about {needed_bytes / 2**20:.1f} MiB. "
            "Free some space, or put the results folder on another disk (a symbolic link `results` will do)."
        )


@contextlib.contextmanager
def disk_errors_explained(home: Path) -> Iterator[None]:
    """Turn a write that failed for lack of room or of permission into a UserError; everything else passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        free = shutil.disk_usage(home).free if home.exists() else LITTLE_BYTES
        if number in (errno.ENOSPC, errno.EDQUOT) or free < LITTLE_BYTES:
            raise UserError(
                f"The disk of {home} is full ({free / 2**20:.1f} MiB free; {type(error).__name__}: {error}). Nothing was "
                "left half-written, and finished shards and training states are kept. Free some space, then run the same "
                "command again."
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                f"{home} cannot be used ({error}). Make it readable and writable, or put the results folder somewhere else "
                "(a symbolic link `results` will do), then run the same command again."
            ) from error
        raise


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
        sync_file(private)
        os.replace(private, target)
        sync_folder(target.parent)
    finally:
        private.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


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
            sync_file(private / name)
            os.replace(private / name, target / name)
        sync_folder(target)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    with atomic_path(target) as private:
        private.write_text(text)


def json_text(value: Any) -> str:
    """A JSON value as this project writes it into files."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def write_json(target: Path, value: Any) -> None:
    write_text(target, json_text(value))


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or damaged one is a UserError naming it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Build it first: `make {path}`.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Delete it and build it again: `make {path}`.") from None


def write_sealed(target: Path, record: Mapping[str, Any]) -> None:
    """Write a manifest with the digest of its own content."""
    content = json.loads(json.dumps(dict(record)))
    write_json(target, {**content, SEAL: digest_json(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a manifest, without its seal; UserError when it was damaged or edited."""
    record = read_json(path)
    written = json_text(record)
    seal = record.pop(SEAL, None) if isinstance(record, dict) else None
    if seal is None or seal != digest_json(record) or path.read_text() != written:
        raise UserError(
            f"{path} was damaged or edited: its content does not have the digest that it was sealed with. "
            f"Delete it and build it again: `make {path}`."
        )
    return record


def write_manifest(artifact: Path, params: Mapping[str, Any], parents: Mapping[str, Path]) -> None:
    """Describe a finished file: its sha256, the science parameters, and the digests of its parents.

    `parents` maps a role to the parent artifact; what is recorded is the sha256 of the parent's manifest, so a chain of
    manifests fixes the whole history.
    """
    record = {"artifact": artifact.name, "sha256": digest_file(artifact), "params": dict(params)}
    write_sealed(manifest_of(artifact), {**record, "parents": manifest_digests(parents)})


def manifest_digests(parents: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of the manifest of each parent, by role; UserError when one is missing."""
    return {role: digest_file(_require_manifest(path)) for role, path in sorted(parents.items())}


def _require_manifest(artifact: Path) -> Path:
    manifest = manifest_of(artifact)
    if not manifest.exists():
        raise UserError(
            f"{manifest} does not exist. Build it first: `make {artifact if artifact.suffix else manifest}`."
        )
    return manifest


def find_manifests(home: Path) -> list[Path]:
    """Every manifest of an experiment; those of unfinished work, in hidden folders, are none."""
    tables = [p for p in home.glob(f"**/*{MANIFEST_SUFFIX}") if not any(n[0] == "." for n in p.relative_to(home).parts)]
    return sorted([*tables, *home.glob(f"checkpoints/*/{CHECKPOINT_MANIFEST}")])


def described_files(manifest: Path) -> dict[Path, str]:
    """The files that a manifest describes and the sha256 of each; UserError when the manifest is damaged."""
    record = read_sealed(manifest)
    if manifest.name == CHECKPOINT_MANIFEST:
        return {manifest.parent / name: digest for name, digest in record["files"].items()}
    return {manifest.parent / record["artifact"]: record["sha256"]}


def require_intact(artifact: Path) -> None:
    """UserError unless an artifact is there and is, to the bit, what its manifest describes."""
    manifest = _require_manifest(artifact)
    for path, digest in described_files(manifest).items():
        if not path.exists():
            raise UserError(
                f"{path} is gone, but {manifest} describes it. Delete that too and build both again: `make {manifest}`."
            )
        if digest_file(path) != digest:
            raise UserError(
                f"{path} is not what {manifest.name} describes: it was damaged, cut short or edited since it was made "
                f"(sha256 {digest[:12]}… was expected). Delete {manifest} and build it again: `make {manifest}`."
            )

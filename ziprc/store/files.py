"""How a file comes to be whole: written beside its target, fsynced, renamed; one writer at a time.

A writer holds a lock on its output, which the kernel releases when the process dies, so no half of a file is ever seen and
no two processes write the same one. Errors of disks are explained here, where files are written. Imports neither torch
nor pyarrow.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ziprc.errors import UserError
from ziprc.store.layout import CHECKPOINT_MANIFEST

LITTLE_BYTES = 4 << 20  # less free space than this, and a failed write is put down to the full disk


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
                "left half-written, and finished pieces and training states are kept. Free some space, then run the same "
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

    It is given back by word, not by closing the file alone: a child that another thread has just forked holds a copy of the
    open file until it runs its own program. Raises UserError when another live process is writing the same output.
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
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


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

"""Digests of bytes, files and JSON values, and seeds that follow from what they are for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


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

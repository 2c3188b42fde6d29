"""What a file is and what it was made from, written beside it when it is whole.

A manifest holds only what follows from inputs (digests, parameters), never a time or a path, so that two runs of the same
thing give the same bytes. It carries a seal, the digest of its own content, so that one flipped bit anywhere, in a file or
in what describes it, is noticed before anything is made from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ziprc.errors import UserError
from ziprc.store.digests import digest_file, digest_json
from ziprc.store.files import json_text, read_json, write_json
from ziprc.store.layout import CHECKPOINT_MANIFEST, MANIFEST_SUFFIX, manifest_of

SEAL = "seal"


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
        target = artifact if artifact.suffix else manifest
        raise UserError(f"{manifest} does not exist. Build it first: `make {target}`.")
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

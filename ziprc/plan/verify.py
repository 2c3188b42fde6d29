"""Whether every file of an experiment is, to the bit, what it was made as: `ziprc verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ziprc.errors import UserError
from ziprc.store.digests import digest_file
from ziprc.store.layout import CHECKPOINT_MANIFEST, manifest_of
from ziprc.store.manifest import described_files, find_manifests, read_sealed


@dataclass
class Audit:
    """What `ziprc verify` found in an experiment."""

    home: Path
    artifacts: int = 0
    files: int = 0
    records: int = 0
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Problems, one a line, and a closing line."""
        lines = [f"* {problem}" for problem in self.problems]
        counted = f"{self.artifacts} artifacts of {self.files} files, {self.records} provenance records"
        verdict = f"{len(self.problems)} problems" if lines else "every digest agrees"
        return "\n".join([*lines, f"verify: {self.home}: {counted}: {verdict}"])


def verify(home: Path) -> Audit:
    """Check every digest of an experiment: files against manifests, manifests against seals, parents, provenance.

    Raises UserError when there is nothing to check.
    """
    manifests = find_manifests(home)
    if not manifests:
        raise UserError(f"{home} holds no manifest, so there is nothing to verify. Name a folder results/<experiment>.")
    audit = Audit(home)
    digests = {digest_file(path): path for path in manifests}
    for manifest in manifests:
        _audit_artifact(audit, manifest, digests)
    for table in sorted(home.glob("*/*.parquet")):
        if not manifest_of(table).exists():
            audit.problems.append(f"{table} has no manifest: it was not finished, or not made by the workflow.")
    for path in sorted((home / "provenance").glob("*.json")):
        _audit_record(audit, path, digests)
    return audit


def _audit_artifact(audit: Audit, manifest: Path, digests: Mapping[str, Path]) -> None:
    artifact = manifest.parent if manifest.name == CHECKPOINT_MANIFEST else manifest
    try:
        for path, digest in described_files(manifest).items():
            audit.files += 1
            if not path.exists():
                audit.problems.append(f"{path} is gone. Delete {manifest} and build it again: `make {manifest}`.")
            elif digest_file(path) != digest:
                audit.problems.append(
                    f"{path} is not what {manifest.name} describes: damaged or edited. Delete {manifest} and build it "
                    f"again: `make {manifest}`."
                )
        parents = read_sealed(manifest)["parents"]
    except UserError as error:
        audit.problems.append(str(error))
        return
    audit.artifacts += 1
    gone = sorted(role for role, digest in parents.items() if digest not in digests)
    if gone:
        audit.problems.append(
            f"{artifact} was made from another {', '.join(gone)} than there is now. `make why` says what would rerun."
        )


def _audit_record(audit: Audit, path: Path, digests: Mapping[str, Path]) -> None:
    try:
        record = read_sealed(path)
    except UserError as error:
        audit.problems.append(str(error).partition(" Delete it")[0] + " It is no artifact: delete it.")
        return
    audit.records += 1
    if record["manifest"] not in digests:
        audit.problems.append(
            f"{path} tells of another version of {record['stage']} {record['name']} than there is now. "
            "Run the stage again, or delete the record."
        )
    diff = record["code"]["diff"]
    if diff and not _same_diff(path.parent / diff):
        audit.problems.append(f"{path.parent / diff}, what differed from the commit, is gone or was edited.")


def _same_diff(path: Path) -> bool:
    return path.exists() and digest_file(path).startswith(path.stem)

"""Where every artifact lives: the only place that knows a path under `results/`.

Imports neither torch nor pyarrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_MANIFEST = "ziprc.json"
MANIFEST_SUFFIX = ".manifest.json"


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

    def seconds(self, name: str) -> Path:
        """What the rollouts of on-policy training took, by part; no artifact, since no two runs take the same."""
        return self.home / "seconds" / f"{name}.json"

    def provenance(self, stage: str, name: str) -> Path:
        """How an artifact came to be; no artifact itself (ziprc/plan/provenance.py)."""
        return self.home / "provenance" / f"{stage}-{name}.json"


def manifest_of(artifact: Path) -> Path:
    """The manifest of a table (`x.parquet` → `x.manifest.json`), page, or checkpoint folder (`ziprc.json`)."""
    if artifact.suffix:
        return artifact.with_suffix(MANIFEST_SUFFIX)
    return artifact / CHECKPOINT_MANIFEST

"""What an experiment consists of: the artifacts that `make all` builds, by path. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ziprc.artifacts import Layout, manifest_of
from ziprc.config import POOLS, Config, head_names


def artifact_names(config: Config, layout: Layout) -> list[str]:
    """Every file that the rules of an experiment declare, manifests included."""
    final = ["ziprc", *(["lite"] if config.train_joint.lite else [])]
    tables = [
        *(("prompts", n) for n in ("train", "validation", "test")),
        *(("rollouts", n) for n in ("train", "test", "test-many", *POOLS)),
        *(("grades", n) for n in ("train", "test", *POOLS)),
        *(("values", n) for n in ("train", "test-many")),
        *(("introspection", n) for n in (*final, *POOLS)),
        ("baselines", "test"),
        *(("samples", policy) for policy in config.samples.policies),
    ]
    files: list[Path] = [manifest_of(layout.checkpoint(name)) for name in ("base", *head_names(config))]
    single = [layout.home / name for name in ("frontier.json", "metrics.json", "report.html")]
    for artifact in (*(layout.table(*t) for t in tables), layout.checkpoint("ziprc") / "calibration.json", *single):
        files += [artifact, manifest_of(artifact)]
    return [str(path) for path in files]


def missing(config: Config, layout: Layout) -> list[str]:
    """Declared files that are not there, when at least one other is: what was deleted, or is yet to be built."""
    files = artifact_names(config, layout)
    absent = [f for f in files if not Path(f).exists()]
    return absent if len(absent) < len(files) else []

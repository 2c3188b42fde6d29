"""What an experiment consists of: every artifact by path, and for each stage what it reads and what it writes.

The stages take their inputs from here, manifests record them under the same roles, and a test holds the Snakefile to
them. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from ziprc.config.load import Config
from ziprc.store.layout import Layout, manifest_of
from ziprc.systems.names import POOLS, critics, head_names, head_of, introspected, policy_of, prompts_of

CHECKPOINTS = ("base", "train_joint")  # stages that make a model folder
SINGLE = {"frontier": "frontier.json", "evaluate": "metrics.json", "report": "report.html"}  # one file each


def final_heads(config: Config) -> list[str]:
    """The heads that are judged: `ziprc` and, if asked for, `lite`."""
    return ["ziprc", *(["lite"] if config.train_joint.lite else [])]


def calibration_file(checkpoint: Path) -> Path:
    """Where a checkpoint's calibration is: beside its weights, so that it goes where they go."""
    return checkpoint / "calibration.json"


def target_of(layout: Layout, stage: str, name: str) -> Path:
    """The artifact `name` of a stage: a table, a model folder or a single file."""
    if stage in CHECKPOINTS:
        return layout.checkpoint(name)
    if stage in SINGLE:
        return layout.home / SINGLE[stage]
    return calibration_file(layout.checkpoint(name)) if stage == "calibration" else layout.table(stage, name)


def pool_parents(layout: Layout, name: str) -> dict[str, Path]:
    """The tables that a pool of recorded rollouts is read from, by role."""
    tables = [(kind, name) for kind in ("rollouts", "grades", "introspection")]
    return {f"{kind}/{split}": layout.table(kind, split) for kind, split in [*tables, ("prompts", prompts_of(name))]}


def parents_of(config: Config, layout: Layout, stage: str, name: str) -> dict[str, Path]:
    """Every artifact that artifact `name` of a stage is made from, by role; those under them are implied."""
    table, checkpoint = layout.table, layout.checkpoint
    if stage == "rollouts":
        return {"prompts": table("prompts", prompts_of(name)), "policy": checkpoint(policy_of(config, name))}
    if stage == "grades":
        return {"rollouts": table("rollouts", name), "prompts": table("prompts", prompts_of(name))}
    if stage == "train_joint":
        labels = {"score": "grades", "value": "values"}[head_of(config, name).label]
        return {"base": checkpoint("base"), "rollouts": table("rollouts", "train"), labels: table(labels, "train")}
    if stage == "values":
        return {"rollouts": table("rollouts", name)} | {critic: checkpoint(critic) for critic in critics(config)}
    if stage == "introspection":
        rollouts, head = introspected(name)
        return {"rollouts": table("rollouts", rollouts), "checkpoint": checkpoint(head)}
    if stage == "baselines":
        sources = {"train": table("rollouts", "train"), "grades": table("grades", "train")}
        return {**sources, "test": table("rollouts", name), "base": checkpoint("base")}
    if stage == "calibration":
        return {**pool_parents(layout, f"validation-{name}"), "checkpoint": checkpoint(name)}
    if stage == "frontier":
        pools = [pool_parents(layout, pool) for pool in POOLS]
        return {**pools[0], **pools[1], "calibration": calibration_file(checkpoint("ziprc"))}
    if stage == "samples":
        fitted = {"checkpoint": checkpoint("ziprc"), "calibration": calibration_file(checkpoint("ziprc"))}
        return {"prompts": table("prompts", "test"), "frontier": layout.home / SINGLE["frontier"], **fitted}
    if stage == "evaluate":
        return _evaluated(config, layout)
    if stage == "report":
        shown = [("introspection", "ziprc"), ("rollouts", "test"), ("grades", "test"), ("prompts", "test")]
        shown += [("samples", policy) for policy in config.samples.policies]
        single = {"metrics": "evaluate", "frontier": "frontier"}
        files = {role: layout.home / SINGLE[of] for role, of in single.items()}
        return files | {f"{kind}/{of}": table(kind, of) for kind, of in shown}
    return {}  # prompts and base start from the configuration


def _evaluated(config: Config, layout: Layout) -> dict[str, Path]:
    wanted = [
        ("prompts", "test"),
        *(("rollouts", n) for n in ("train", "test", "test-many", "test-ziprc")),
        *(("grades", n) for n in ("train", "test", "test-ziprc")),
        *(("values", n) for n in ("train", "test-many")),
        *(("introspection", head) for head in final_heads(config)),
        ("baselines", "test"),
    ]
    tables = {f"{kind}/{name}": layout.table(kind, name) for kind, name in wanted}
    return tables | {name: layout.checkpoint(name) for name in ("base", *final_heads(config))}


def artifact_names(config: Config, layout: Layout) -> list[str]:
    """Every file that the rules of an experiment declare, manifests included."""
    tables = [
        *(("prompts", n) for n in ("train", "validation", "test")),
        *(("rollouts", n) for n in ("train", "test", "test-many", *POOLS)),
        *(("grades", n) for n in ("train", "test", *POOLS)),
        *(("values", n) for n in ("train", "test-many")),
        *(("introspection", n) for n in (*final_heads(config), *POOLS)),
        ("baselines", "test"),
        *(("samples", policy) for policy in config.samples.policies),
    ]
    files: list[Path] = [manifest_of(layout.checkpoint(name)) for name in ("base", *head_names(config))]
    single = [layout.home / name for name in SINGLE.values()]
    for artifact in (*(layout.table(*t) for t in tables), calibration_file(layout.checkpoint("ziprc")), *single):
        files += [artifact, manifest_of(artifact)]
    return [str(path) for path in files]


def missing(config: Config, layout: Layout) -> list[str]:
    """Declared files that are not there, when at least one other is: what was deleted, or is yet to be built."""
    files = artifact_names(config, layout)
    absent = [f for f in files if not Path(f).exists()]
    return absent if len(absent) < len(files) else []

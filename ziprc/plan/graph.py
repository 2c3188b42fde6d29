"""What follows from the declarations for one experiment: paths, parents, params, code, and which artifacts it consists of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ziprc.config.load import Config
from ziprc.errors import UserError, nearest
from ziprc.plan.code import code_digest
from ziprc.plan.stage import Ref, Stage
from ziprc.store.layout import Layout, manifest_of


class Graph:
    """The stages of an experiment. Every method takes a `Ref`; UserError for a stage or a name that there is not."""

    def __init__(self, stages: Iterable[Stage[Any]], config: Config, layout: Layout) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.config, self.layout = config, layout

    def stage(self, name: str) -> Stage[Any]:
        if name not in self.stages:
            raise UserError(f"There is no stage '{name}'{nearest(name, self.stages)}.")
        return self.stages[name]

    def variant(self, ref: Ref) -> Any:
        """What the name of an artifact means to its stage."""
        known = self.stage(ref.stage).variants(self.config)
        if ref.name not in known:
            raise UserError(f"{ref.stage} has no '{ref.name}' in {self.layout.experiment}{nearest(ref.name, known)}.")
        return known[ref.name]

    def parents(self, ref: Ref) -> Mapping[str, Ref]:
        """Every artifact that this one is made from, by role; those under them are implied."""
        return self.stage(ref.stage).reads(self.config, self.variant(ref))

    def target(self, ref: Ref) -> Path:
        """The artifact: a table, a model folder or a single file."""
        return self.layout.home / self.stage(ref.stage).path(ref.name)

    def reads(self, ref: Ref) -> dict[str, Path]:
        """Paths of the parents, by role."""
        return {role: self.target(parent) for role, parent in self.parents(ref).items()}

    def params(self, ref: Ref) -> dict[str, Any]:
        """Keys of the configuration that the artifact depends on, with their values: params of its rule and manifest."""
        keys = self.stage(ref.stage).params(self.config, self.variant(ref))
        return {key: setting(self.config, key) for key in sorted(keys)}

    def code(self, ref: Ref) -> str:
        """Digest of the code that makes the artifact."""
        stage = self.stage(ref.stage)
        return code_digest(ref.stage, tuple(sorted(stage.uses(self.config, self.variant(ref)))))

    def machine(self, stage: str) -> str:
        """The class of machine that a stage wants."""
        wanted = self.stage(stage).machine
        return wanted(self.config) if callable(wanted) else wanted

    def closure(self, goals: Iterable[Ref]) -> list[Ref]:
        """The goals and all that they are made from, parents first."""
        found: dict[Ref, None] = {}

        def visit(ref: Ref) -> None:
            if ref not in found:
                for parent in self.parents(ref).values():
                    visit(parent)
                found[ref] = None

        for goal in goals:
            visit(goal)
        return list(found)

    def files(self, refs: Iterable[Ref]) -> list[Path]:
        """Every file that the rules of these artifacts declare, manifests included."""
        out = []
        for target in map(self.target, refs):
            out += [target, manifest_of(target)] if target.suffix else [manifest_of(target)]
        return out

    def known(self) -> list[Ref]:
        """Every artifact that can be built by name, in no order."""
        return [Ref(stage.name, name) for stage in self.stages.values() for name in stage.variants(self.config)]

    def made_by(self, file: Path) -> Ref | None:
        """The artifact that a file under `results/` belongs to; its manifest counts as the artifact."""
        return next((ref for ref in self.known() if file in self.files([ref])), None)

    def missing(self, goals: Iterable[Ref]) -> list[Path]:
        """Declared files that are not there, when at least one other is: what was deleted, or is yet to be built."""
        files = self.files(self.closure(goals))
        absent = [file for file in files if not file.exists()]
        return absent if len(absent) < len(files) else []

    def check(self, goals: Iterable[Ref]) -> None:
        """Let every stage that the goals need look at the configuration; UserError for what one would refuse."""
        for stage in dict.fromkeys(ref.stage for ref in self.closure(goals)):
            self.stages[stage].check(self.config)


def setting(config: Config, key: str) -> Any:
    """The value of `section.key` or of a whole section, JSON-like."""
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else _jsonlike(value)


def _jsonlike(value: Any) -> Any:
    return list(map(_jsonlike, value)) if isinstance(value, tuple | list) else value

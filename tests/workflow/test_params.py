"""Params are complete and minimal: every stage runs on a configuration that notes the keys that are read of it.

What a stage reads and its params lack, another value of it would silently not rerun; what it does not read and its params
hold reruns it for nothing. Keys under `runtime` are no params.
"""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.workflow.conftest import MICRO, Workplace
from ziprc.config.base import Section
from ziprc.config.load import Config, load
from ziprc.plan.graph import Graph
from ziprc.plan.stage import Ref
from ziprc.stages.context import Context
from ziprc.store.layout import Layout
from ziprc.systems import goals_of, graph_of

pytestmark = pytest.mark.slow

PLAN = graph_of(load(MICRO, "micro"), Layout(Path("results"), "micro"))
EVERY = {ref.stage: ref for ref in PLAN.closure(goals_of(PLAN.config))}  # one artifact of each stage
MORE = [
    Ref("train_joint", "noisy-fold0"),
    Ref("values", "test-many"),
    Ref("rollouts", "train"),
    Ref("rollouts", "test-online-copies-swapped"),
    Ref("rollouts", "gradings-grader-main"),
    Ref("train_online", "online-gated"),
]
# Of these a whole section is handed on, and which of its keys are read depends on the values of others.
WHOLE = {"frontier", "base", "train_joint", "train_policy", "train_online", "expand", "warm_up", "train_grader"}


def inner(section: BaseModel, name: str) -> dict[str, Section]:
    """The sections that a key holds, by where they are below it: itself, or those of a mapping."""
    value = section.__dict__[name]
    if isinstance(value, dict) and all(isinstance(one, Section) for one in value.values()):
        return {f"{name}.{key}": one for key, one in value.items()}
    return {name: value} if isinstance(value, Section) else {}


def keys_of(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Every key of a section, as `a.b.c`."""
    for name in type(section).model_fields:
        for below, own in inner(section, name).items():
            yield from keys_of(own, f"{prefix}{below}.")
        if not inner(section, name):
            yield prefix + name


class Notes:
    """The keys that were read of one configuration: by the stage, and by the plan for it (a variant hands values on)."""

    def __init__(self, config: Config) -> None:
        self.read: set[str] = set()
        self.planned: set[str] = set()
        self.planning, self.asked = 0, ""  # how deep in the plan, and in which of its methods
        self.path: dict[int, str] = {}
        self._walk(config, "")

    def _walk(self, section: BaseModel, prefix: str) -> None:
        self.path[id(section)] = prefix
        for name in type(section).model_fields:
            for below, own in inner(section, name).items():
                self._walk(own, f"{prefix}{below}.")

    def note(self, section: Any, name: str) -> None:
        prefix = self.path.get(id(section))
        if prefix is None or name not in type(section).model_fields:
            return
        if not inner(section, name):
            if not self.planning:
                self.read.add(prefix + name)
            elif self.asked == "variant":
                self.planned.add(prefix + name)


@contextmanager
def noted(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain = Section.__getattribute__

    def get(self: Any, name: str) -> Any:
        if name in ("model_dump", "model_copy"):
            for key in type(self).model_fields:
                notes.note(self, key)
        elif not name.startswith("_"):
            notes.note(self, name)
        return plain(self, name)

    def quietly(method: Any) -> Any:
        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            before = notes.planning, notes.asked
            notes.planning, notes.asked = notes.planning + 1, method.__name__
            try:
                return method(*arguments)
            finally:
                notes.planning, notes.asked = before

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", get)
        for name in ("variant", "parents", "target", "reads", "params", "code"):
            patch.setattr(Graph, name, quietly(getattr(Graph, name)))
        yield


@pytest.mark.parametrize("ref", [*EVERY.values(), *MORE], ids=str)
def test_a_stage_reads_its_params_and_nothing_else(
    ref: Ref, built: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built.home, tmp_path / "results" / "micro")
    config = load(MICRO, "micro")
    context = Context(graph_of(config, Layout(tmp_path / "results", "micro")), ref)
    notes = Notes(config)
    with noted(notes, monkeypatch):
        importlib.import_module(f"ziprc.stages.{ref.stage}").run(context)
    read = {key for key in notes.read if not key.startswith(("runtime.", "systems"))}
    params = set(PLAN.stage(ref.stage).params(config, context.variant))
    allowed = {key for key in keys_of(config) if any(key == p or key.startswith(f"{p}.") for p in params)}
    assert read <= allowed, "read, but no param"
    known = read | notes.planned
    idle = {p for p in params if not any(key == p or key.startswith(f"{p}.") for key in known)}
    assert not idle or ref.stage == "report", "a param, but not read"
    rest = {key for key in allowed - known if key.partition(".")[0] not in WHOLE}
    assert not rest or ref.stage == "report", "a part of a param, but not read"

"""What a stage declares: what it makes, every name that it knows and what the name means, what it reads, by which keys.

A stage is declared once, without torch, in `ziprc/systems/<system>.py`. From the declarations follow the rules of the
Snakefile, paths, params, `make why`, provenance and `verify`, and which files an experiment consists of. A name such as
`validation-ziprc` is looked up and never taken apart: `variants` says what it means, as a record of a type of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ziprc.config.load import Config

V = TypeVar("V")
TABLE, CHECKPOINT = "{stage}/{name}.parquet", "checkpoints/{name}"
CLASSES = ("cpu", "gpu", "big-gpu")  # of machines; training takes every GPU of every node of the last


@dataclass(frozen=True, order=True)
class Ref:
    """An artifact: the stage that makes it, and its name there."""

    stage: str
    name: str

    def __str__(self) -> str:
        return f"{self.stage} {self.name}"


@dataclass(frozen=True)
class Stage(Generic[V]):
    """One rule of the workflow, one module in `ziprc/stages/`, one section of the configuration, one kind of log.

    `makes` is a path under `results/<experiment>/`, a folder where it has no suffix, and `says` one sentence; both may
    hold {name}. `params` are keys of the configuration, whole sections or single ones: everything that the stage reads and
    nothing else. `machine` is one of CLASSES. `uses` names the modules that are chosen by name while the stage runs (a
    task, a grader, an engine), for the digest of its code. `check` raises UserError for what the stage would refuse, before
    anything runs. A stage that is `held_out` trains, calibrates or judges, and refuses splits that share a prompt.
    """

    name: str
    says: str
    makes: str
    variants: Callable[[Config], Mapping[str, V]]
    reads: Callable[[Config, V], Mapping[str, Ref]] = lambda config, variant: {}
    params: Callable[[Config, V], Iterable[str]] = lambda config, variant: ()
    machine: str | Callable[[Config], str] = "cpu"
    uses: Callable[[Config, V], Iterable[str]] = lambda config, variant: ()
    check: Callable[[Config], None] = lambda config: None
    held_out: bool = False

    def path(self, name: str = "{name}") -> str:
        """Where artifact `name` is, relative to the experiment's folder."""
        return self.makes.format(stage=self.name, name=name)


@dataclass(frozen=True)
class System:
    """What one published system adds to the plan.

    `rollouts` are the tables of responses that it needs, by name; `shows` what its section of the report is made from, by
    role, which is also what building the system means; `sections` the names of its sections of the configuration.
    """

    name: str
    stages: tuple[Stage[Any], ...]
    rollouts: Callable[[Config], Mapping[str, Any]]
    shows: Callable[[Config], Mapping[str, Ref]]
    evaluated: Callable[[Config], Mapping[str, Ref]]  # what `evaluate` reads to make metrics/<system>.json
    evaluate_params: Callable[[Config], Iterable[str]]
    sections: tuple[str, ...]
    evaluation: str  # module with `metrics(config, reads)`
    page: str  # module with `sections(config, layout, reads)` for the report, and the QUESTION that they answer
    graded: Callable[[Config], Mapping[str, Any]] = (
        lambda config: {}
    )  # what is graded besides rollouts, as variants of `grades`
    evaluate_uses: Callable[[Config], Iterable[str]] = lambda config: ()  # modules that it chooses by name


def one(name: str) -> Callable[[Config], Mapping[str, str]]:
    """Variants of a stage that makes one artifact."""
    return lambda config: {name: name}


def many(*names: str) -> Callable[[Config], Mapping[str, str]]:
    """Variants that mean nothing but their names."""
    return lambda config: {name: name for name in names}

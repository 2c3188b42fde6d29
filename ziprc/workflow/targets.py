"""What a command is about: experiments and files of theirs, looked up before anything starts.

A file that no rule makes would be an hour of work, or days, before it is noticed. Imports no torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ziprc.config import load as settings
from ziprc.config.load import Config
from ziprc.errors import UserError, nearest
from ziprc.plan.graph import Graph
from ziprc.store.layout import Layout
from ziprc.systems import goals_of, graph_of
from ziprc.workflow.call import DEFAULT_EXPERIMENT

RESULTS = Path("results")


@dataclass(frozen=True)
class Wanted:
    """Experiments by name, with their plans, and the `targets`; without, all goals, or those of some `systems`."""

    graphs: Mapping[str, Graph]
    targets: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()

    @property
    def configs(self) -> dict[str, Config]:
        return {name: graph.config for name, graph in self.graphs.items()}

    @property
    def layouts(self) -> list[Layout]:
        return [graph.layout for graph in self.graphs.values()]

    def missing(self) -> list[str]:
        """Files of experiments that are there in part: what was deleted, or is yet to be built."""
        plans = self.graphs.values()
        return [str(file) for plan in plans for file in plan.missing(goals_of(plan.config, self.systems))]


def look_up(options: argparse.Namespace) -> Wanted:
    """The experiments of a command, by `--experiment`, `--suite` or its targets; every name and setting is checked."""
    targets = tuple(os.path.relpath(target) for target in vars(options).get("targets") or ())
    names = _of_targets(targets, options.experiment) if targets else [options.experiment or DEFAULT_EXPERIMENT]
    if vars(options).get("suite") and not targets:
        names = settings.suite(options.config_file, options.suite, options.system)
    configs = {name: settings.load(options.config_file, name, options.set) for name in names}
    system = vars(options).get("system") or "all"
    for name, config in configs.items():
        if system not in ("all", *config.systems):
            raise UserError(f"{name} does not build the system '{system}'{nearest(system, (*config.systems, 'all'))}.")
    graphs = {name: graph_of(config, Layout(RESULTS, name)) for name, config in configs.items()}
    for target in targets:
        _check_target(target, graphs[Path(target).parts[1]])
    wanted = Wanted(graphs, targets, () if system == "all" else (system,))
    for graph in graphs.values():
        graph.check(goals_of(graph.config, wanted.systems))
    return wanted


def _of_targets(targets: Sequence[str], experiment: str | None) -> list[str]:
    """The experiments that the targets belong to; UserError for what is not the path of a result."""
    names = []
    for target in targets:
        parts = Path(target).parts
        if len(parts) < 2 or parts[0] != str(RESULTS):
            example = f"results/{experiment or DEFAULT_EXPERIMENT}/{parts[-1] if '.' in target else 'report.html'}"
            raise UserError(f"A target is a file by its path, such as {example}; found '{target}'.")
        names.append(parts[1])
        if experiment and experiment != parts[1]:
            raise UserError(f"{target} does not belong to the experiment {experiment}. Leave --experiment out.")
    return list(dict.fromkeys(names))


def _check_target(target: str, graph: Graph) -> None:
    known, name = list(map(str, graph.files(graph.known()))), graph.layout.experiment
    if target in known:
        return
    if inside := [file for file in known if file.startswith(f"{target}/") and not file.endswith(".manifest.json")]:
        everything = f", or everything with `make all EXPERIMENT={name}`" if Path(target).parent == RESULTS else ""
        few = f"{', '.join(inside[:6])}{' …' * (len(inside) > 6)}"
        raise UserError(f"{target} is a folder. Name a file in it: {few}{everything}.")
    close = difflib.get_close_matches(target, known, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Everything of {name}: `make all EXPERIMENT={name}`."
    raise UserError(f"Nothing here makes {target}. {hint}")

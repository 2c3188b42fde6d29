"""The rules of the Snakefile, made from the declarations of the stages: what each function of a rule answers.

A rule's params are the keys of the configuration that its stage reads and a digest of the code that it runs, so a change
reruns just what depends on it; keys under `runtime` are no params. Downstream depends on manifests, which are written last
and hold no time, so that a rebuilt artifact with the same content reruns nothing below it.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ziprc.config.base import Runtime
from ziprc.config.load import Config, experiments, load
from ziprc.plan.graph import Graph
from ziprc.plan.stage import Ref, Stage
from ziprc.store.files import write_text
from ziprc.store.layout import Layout, manifest_of
from ziprc.systems import STAGES, goals_of, graph_of
from ziprc.workflow.call import Asked
from ziprc.workflow.needs import Sites, check_sites, resource_names, resources, threads

HOME = "results/{experiment}"
FILE = Path(__file__).parents[2] / "Snakefile"
RULER = "# ---\n"
Ask = Callable[..., Any]


class Rules:
    """What every rule needs, for one invocation of Snakemake and its `--config`."""

    stages = STAGES

    def __init__(self, config: Mapping[str, Any], folder: str) -> None:
        self.asked = Asked.of(config, folder)
        self.sites = check_sites(config.get("classes", {}))
        self.graph = functools.cache(self._graph)
        self.every = functools.cache(self._every)

    def _graph(self, experiment: str) -> Graph:
        config = load(self.asked.config_file, experiment, self.asked.overrides)
        return graph_of(config, Layout(Path("results"), experiment))

    def _every(self) -> list[Config]:
        """The configurations of all experiments of the file; of those that are not asked for, without overrides."""
        file, asked = self.asked.config_file, self.asked.experiments
        return [self.graph(one).config if one in asked else load(file, one) for one in experiments(file)]

    @property
    def goals(self) -> list[str]:
        """Every file of the experiments that are asked for."""
        files = []
        for graph in map(self.graph, self.asked.experiments):
            goals = goals_of(graph.config, self.asked.systems)
            graph.check(goals)
            files += map(str, graph.files(graph.closure(goals)))
        return files

    def names(self, stage: Stage[Any]) -> str:
        """A pattern of every name that the stage has in any experiment of the file."""
        found = {name for config in self.every() for name in stage.variants(config)}
        return "|".join(map(re.escape, sorted(found)))

    def makes(self, stage: Stage[Any]) -> dict[str, str]:
        """The artifact and its manifest, the one to depend on; of a checkpoint the manifest alone."""
        target = Path(HOME) / stage.path()
        manifest = {"manifest": str(manifest_of(target))}
        return {"artifact": str(target), **manifest} if target.suffix else manifest

    def reads(self, stage: Stage[Any]) -> Ask:
        """The manifests of what an artifact is made from."""
        return self._of(stage, lambda graph, ref: [str(manifest_of(path)) for path in graph.reads(ref).values()])

    def log(self, stage: Stage[Any]) -> str:
        return f"{HOME}/logs/{stage.name}-{self._name(stage)}.log"

    def benchmark(self, stage: Stage[Any]) -> str:
        return f"{HOME}/benchmarks/{stage.name}-{self._name(stage)}.tsv"

    def message(self, stage: Stage[Any]) -> str:
        says = stage.says.replace("{name}", "{wildcards.name}")
        return f"{stage.name}: {says}{' of' if '{name}' in stage.says else ','} {{wildcards.experiment}}"

    def params(self, stage: Stage[Any]) -> dict[str, Ask]:
        """`section`, the keys of the configuration, `code`, and for the command `stage` and `name`."""
        named = {"stage": lambda w: stage.name, "name": self._of(stage, lambda graph, ref: ref.name)}
        return {**named, "section": self._of(stage, Graph.params), "code": self._of(stage, Graph.code)}

    def threads(self, stage: Stage[Any]) -> Ask:
        return lambda w: threads(*self._machine(stage, w))

    def resources(self, stage: Stage[Any]) -> dict[str, Ask]:
        """How they follow from the class of machine, the experiment and the site: ziprc/workflow/needs.py."""

        def ask(name: str) -> Ask:
            return lambda w, attempt: resources(*self._machine(stage, w), attempt).get(name)

        return {name: ask(name) for name in resource_names(self.sites)}

    @property
    def prefix(self) -> str:
        """What precedes every shell line: it hands the settings on as "$@", quoted for the shell and against braces.

        In the line itself a change of settings, be it of a runtime key, would be a change of code, and everything would run
        again; a variable there, `{settings}`, is what Snakemake's lint forbids.
        """
        overrides = ["--set", *self.asked.overrides] if self.asked.overrides else []
        settings = shlex.join(["--config-file", str(self.asked.config_file), *overrides])
        return f"set -euo pipefail; set -- {settings.replace('{', '{{').replace('}', '}}')}; "

    @property
    def command(self) -> str:
        """The shell line of every rule. Snakemake evaluates it late, when a variable of the loop has its last value."""
        options = "--experiment {wildcards.experiment:q} --threads {threads} --name {params.name}"
        return f'python -m ziprc run {{params.stage}} "$@" {options} > {{log:q}} 2>&1'

    def _machine(self, stage: Stage[Any], w: Any) -> tuple[str, Runtime, Sites]:
        graph = self.graph(w.experiment)
        return graph.machine(stage.name), graph.config.runtime, self.sites

    def _name(self, stage: Stage[Any]) -> str:
        """The wildcard, or the one name that the stage knows."""
        return "{name}" if "{name}" in stage.makes else self.names(stage)

    def _of(self, stage: Stage[Any], ask: Callable[[Graph, Ref], Any]) -> Ask:
        """A function of wildcards that asks the graph about the artifact."""
        fixed = None if "{name}" in stage.makes else self.names(stage)
        return lambda w: ask(self.graph(w.experiment), Ref(stage.name, fixed or w.name))


def stage_table() -> str:
    """The head of the Snakefile: rule, file and what it is made from, as comments."""
    config = load(FILE.parent / "config.yaml", "toy")
    graph = graph_of(config, Layout(Path("results"), "toy"))
    rows = [("rule", "file under results/{experiment}/", "from")]
    for stage in STAGES:
        names = [Ref(stage.name, name) for name in stage.variants(config)]
        parents = dict.fromkeys(parent.stage for ref in names for parent in graph.parents(ref).values())
        path = Path(stage.path())
        file = str(path if path.suffix else manifest_of(path))
        rows.append((stage.name, file, ", ".join(parents) or "the configuration"))
    first, second = (max(len(row[i]) for row in rows) for i in range(2))
    return "".join(f"#   {rule:{first}}  {file:{second}}  {parents}\n" for rule, file, parents in rows)


def main() -> None:
    """`make stages`: write the table into the Snakefile, between its two lines of dashes."""
    head, _, tail = FILE.read_text().split(RULER)
    write_text(FILE, f"{head}{RULER}{stage_table()}{RULER}{tail}")
    print(f"stages: wrote the table of {len(STAGES)} stages into {FILE}")


if __name__ == "__main__":
    main()

"""What every stage is given, and how it starts and ends.

A stage is started as `ziprc run <stage> --experiment toy --name train [--set a.b=c …]`, which accelerate launches where it
trains in several processes (workflow/launch.py). It reads and writes where its declaration says (ziprc/systems/). Before
anything is computed, its inputs are compared with their digests, and an artifact that the same recipe has made already is
left as it is. One process at a time writes an artifact. On success the stage prints one line that says what was written
where; a `UserError` ends it with one paragraph and exit code 2, SIGTERM (a preemption, say) with one sentence and exit code
143, Ctrl-C with 130. Whatever ends it, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ziprc.config.load import Config, load
from ziprc.errors import Stopped, UserError
from ziprc.plan.graph import Graph
from ziprc.plan.provenance import Clock, is_current, recipe_of, write_record
from ziprc.plan.stage import Ref
from ziprc.store.digests import digest_json
from ziprc.store.files import disk_errors_explained, output_lock
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import require_intact, write_manifest
from ziprc.systems import graph_of
from ziprc.tables.check import TableSchema
from ziprc.tables.pieces import Pieces, pieces_folder
from ziprc.tables.prompts import PROMPTS, check_disjoint

EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128  # and the number of the signal
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Context:
    """Which artifact is wanted, and of it: what its name means, where it goes, where its inputs are."""

    graph: Graph
    ref: Ref

    @property
    def config(self) -> Config:
        return self.graph.config

    @property
    def name(self) -> str:
        return self.ref.name

    @property
    def variant(self) -> Any:
        """What the name means to the stage, a record of the declaration's own type."""
        return self.graph.variant(self.ref)

    @property
    def target(self) -> Path:
        """The artifact: a table, a model folder or a single file."""
        return self.graph.target(self.ref)

    @property
    def reads(self) -> dict[str, Path]:
        """The inputs by role."""
        return self.graph.reads(self.ref)

    @property
    def params(self) -> dict[str, Any]:
        """Keys of the configuration that the artifact depends on, with their values."""
        return self.graph.params(self.ref)

    def write(self, schema: TableSchema, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
        """Write the stage's table and describe it."""
        schema.write(self.target, table, metadata)
        self.write_manifest()

    def write_manifest(self) -> None:
        """Describe the file that the stage has just written: digest, params, digests of its parents."""
        write_manifest(self.target, self.params, self.reads)

    def pieces(self, schema: TableSchema, parts: Sequence[Any]) -> Pieces:
        """The artifact in pieces, kept under what it follows from; the inputs have to be there."""
        return Pieces(pieces_folder(self.target), schema, digest_json(recipe_of(self.graph, self.ref)), parts)


Run = Callable[[Context], str]


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which experiment, in which variant, and where its results are."""
    parser.add_argument("--experiment", required=True, help="a name under `experiments` in the configuration file")
    parser.add_argument("--config-file", type=Path, default=Path("config.yaml"), help="the configuration file")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="e.g. train_joint.ziprc.kl=25"
    )


def context_of(options: argparse.Namespace, stage: str) -> Context:
    """The context that a command line names; UserError for an experiment, a stage or a name that there is not."""
    config = load(options.config_file, options.experiment, options.set)
    context = Context(graph_of(config, Layout(options.results, options.experiment)), Ref(stage, options.name))
    _ = context.variant
    return context


def is_main_process() -> bool:
    """Whether this is rank 0 of an accelerate launch."""
    return os.environ.get("RANK", "0") == "0"


def perform(run: Run, context: Context) -> str:
    """Make the artifact unless it is there already, with its provenance; the closing line.

    Raises UserError for inputs that are missing or damaged, for splits that share a prompt, for an output that somebody else
    is writing, and for a disk that is full or read-only.
    """
    clock, main, home = Clock(), is_main_process(), context.graph.layout.home
    with disk_errors_explained(home), output_lock(context.target) if main else contextlib.nullcontext():
        if main:
            for parent in context.reads.values():
                require_intact(parent)
            if context.graph.stage(context.ref.stage).held_out:
                refuse_shared_prompts(context.graph)
        if done := already_made(context):
            return done
        recipe = recipe_of(context.graph, context.ref)
        line = run(context)
        if main:
            write_record(context.graph, context.ref, recipe, clock)
    return f"{line} ({clock.seconds():.1f} s)"


def refuse_shared_prompts(graph: Graph) -> None:
    """UserError when the splits that are there share a prompt: nothing may be judged by what it was trained on."""
    splits = {name: graph.target(Ref("prompts", name)) for name in graph.stage("prompts").variants(graph.config)}
    check_disjoint({name: PROMPTS.read(path) for name, path in splits.items() if path.exists()})


def already_made(context: Context) -> str | None:
    """The closing line of a stage that has nothing to do; its artifact is made younger than its inputs.

    Raises UserError when an input is missing.
    """
    if not is_current(context.graph, context.ref, recipe_of(context.graph, context.ref)):
        return None
    if is_main_process():
        for path in {context.target, manifest_of(context.target)}:
            if path.is_file():
                os.utime(path)
    return f"nothing to do, {context.target} is there, made from the same inputs, settings, code and packages"


def run_stage(stage: str, run: Run, argv: Sequence[str] | None = None) -> None:
    """Parse the command line, perform, print the closing line; exit with one paragraph when it can't."""
    parser = argparse.ArgumentParser(
        prog=f"ziprc.stages.{stage}",
        description=sys.modules[run.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m ziprc.stages.{stage} --experiment smoke --name train",
    )
    add_experiment_arguments(parser)
    parser.add_argument("--name", required=True, help="which of the stage's artifacts to build")
    options = parser.parse_args(argv)
    what = f"{stage} ({options.experiment}/{options.name})"
    _end_with_launcher()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_stopped)
    try:
        line = perform(run, context_of(options, stage))
    except UserError as error:
        print(f"error in stage {what}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        print(
            f"stage {what} was stopped by {name}. {stopped.kept} Run the same command again to go on.",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT_SIGNAL + stopped.number)
    if is_main_process():
        print(f"{stage}: {line}", flush=True)


def _raise_stopped(number: int, frame: Any) -> None:
    raise Stopped(number)


def _end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when accelerate's launcher dies, so that no process of several goes on alone."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

"""What every stage is given, and how it starts and ends.

A stage is started as `accelerate launch -m ziprc.stages.<stage> --experiment toy --name train [--set a.b=c …]`; it
reads and writes where `Layout` says. Before anything is computed, its inputs are compared with their digests, and an
artifact that the same recipe has made already is left as it is. One process at a time writes an artifact. On success
the stage prints one line that says what was written where; a `UserError` ends it with one paragraph and exit code 2,
SIGTERM (a preemption, say) with one sentence and exit code 143. Whatever ends it, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ziprc.config.load import Config, load
from ziprc.errors import UserError
from ziprc.plan.provenance import Clock, is_current, recipe_of, write_record
from ziprc.store.files import disk_errors_explained, output_lock
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import require_intact, write_manifest
from ziprc.systems.artifacts import parents_of, target_of
from ziprc.systems.names import params_of

EXIT_USER_ERROR = 2
EXIT_TERMINATED = 128 + signal.SIGTERM
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Context:
    """The resolved experiment, its paths, and which of the stage's artifacts is wanted (`train`, `ziprc`, …)."""

    config: Config
    layout: Layout
    name: str

    def write_manifest(self, stage: str) -> None:
        """Describe the file that the stage has just written: digest, params of its rule, digests of its parents."""
        parents = parents_of(self.config, self.layout, stage, self.name)
        write_manifest(target_of(self.layout, stage, self.name), params_of(self.config, stage, self.name), parents)


Run = Callable[[Context], str]


class Terminated(BaseException):
    """SIGTERM arrived. No Exception, so that nothing on the way takes it for a failure of its own."""


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which experiment, in which variant, and where its results are."""
    parser.add_argument("--experiment", required=True, help="a name under `experiments` in the configuration file")
    parser.add_argument("--config-file", type=Path, default=Path("config.yaml"))
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="e.g. train_joint.ziprc.kl=25")


def is_main_process() -> bool:
    """Whether this is rank 0 of an accelerate launch."""
    return os.environ.get("RANK", "0") == "0"


def perform(stage: str, run: Run, context: Context) -> str:
    """Make the artifact unless it is there already, with its provenance; the closing line.

    Raises UserError for inputs that are missing or damaged, for an output that somebody else is writing, and for a disk
    that is full or read-only.
    """
    clock, config, layout, name = Clock(), context.config, context.layout, context.name
    target, main = target_of(layout, stage, name), is_main_process()
    with disk_errors_explained(layout.home), output_lock(target) if main else contextlib.nullcontext():
        if main:
            for parent in parents_of(config, layout, stage, name).values():
                require_intact(parent)
        if done := already_made(stage, context):
            return done
        recipe = recipe_of(config, layout, stage, name)
        line = run(context)
        if main:
            write_record(config, layout, stage, name, recipe, clock)
    return f"{line} ({clock.seconds():.1f} s)"


def already_made(stage: str, context: Context) -> str | None:
    """The closing line of a stage that has nothing to do; its artifact is made younger than its inputs.

    Raises UserError when an input is missing.
    """
    config, layout, name = context.config, context.layout, context.name
    if not is_current(layout, stage, name, recipe_of(config, layout, stage, name)):
        return None
    target = target_of(layout, stage, name)
    if is_main_process():
        for path in {target, manifest_of(target)}:
            if path.is_file():
                os.utime(path)
    return f"nothing to do, {target} is there, made from the same inputs, settings, code and packages"


def run_stage(stage: str, run: Run, argv: Sequence[str] | None = None) -> None:
    """Parse the command line, perform, print the closing line; exit with one paragraph when it can't."""
    parser = argparse.ArgumentParser(
        prog=f"ziprc.stages.{stage}",
        description=sys.modules[run.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: accelerate launch -m ziprc.stages.{stage} --experiment smoke --name train",
    )
    add_experiment_arguments(parser)
    parser.add_argument("--name", required=True, help="which of the stage's artifacts to build")
    options = parser.parse_args(argv)
    what = f"{stage} ({options.experiment}/{options.name})"
    _end_with_launcher()
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        config = load(options.config_file, options.experiment, options.set)
        line = perform(stage, run, Context(config, Layout(options.results, options.experiment), options.name))
    except UserError as error:
        print(f"error in stage {what}: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except Terminated:
        print(
            f"stage {what} was stopped by SIGTERM. Nothing is half-written; finished shards are kept. Run the same "
            "command again to go on.",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT_TERMINATED)
    if is_main_process():
        print(f"{stage}: {line}", flush=True)


def _raise_terminated(number: int, frame: Any) -> None:
    raise Terminated


def _end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that no stage goes on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

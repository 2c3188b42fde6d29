"""What every stage is given, and how it starts and ends.

A stage is started as `accelerate launch -m ziprc.stages.<stage> --experiment toy --name train [--set a.b=c …]`; it
reads and writes where `Layout` says. On success it prints one line that says what was written where; a `UserError`
ends it with one paragraph and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ziprc.artifacts import Layout
from ziprc.config import Config, load
from ziprc.errors import UserError


@dataclass(frozen=True)
class Context:
    """The resolved experiment, its paths, and which of the stage's artifacts is wanted (`train`, `ziprc`, …)."""

    config: Config
    layout: Layout
    name: str


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which experiment, in which variant, and where its results are."""
    parser.add_argument("--experiment", required=True, help="a name under `experiments` in the configuration file")
    parser.add_argument("--config-file", type=Path, default=Path("config.yaml"))
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of all results")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="e.g. train_joint.ziprc.kl=25")


def is_main_process() -> bool:
    """Whether this is rank 0 of an accelerate launch."""
    return os.environ.get("RANK", "0") == "0"


def run_stage(stage: str, run: Callable[[Context], str], argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run, print the closing line; exit 2 with one paragraph on a UserError."""
    parser = argparse.ArgumentParser(
        prog=f"ziprc.stages.{stage}",
        description=sys.modules[run.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: accelerate launch -m ziprc.stages.{stage} --experiment smoke --name train",
    )
    add_experiment_arguments(parser)
    parser.add_argument("--name", required=True, help="which of the stage's artifacts to build")
    options = parser.parse_args(argv)
    started = time.monotonic()
    try:
        config = load(options.config_file, options.experiment, options.set)
        line = run(Context(config, Layout(options.results, options.experiment), options.name))
    except UserError as error:
        print(f"error in stage {stage} ({options.experiment}/{options.name}): {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if is_main_process():
        print(f"{stage}: {line} ({time.monotonic() - started:.1f} s)", flush=True)

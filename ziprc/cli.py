"""`ziprc`: the command line. Imports no torch until a command needs it.

ziprc doctor                                what is installed, whether it agrees, what to do about it
ziprc build --experiment smoke              the whole workflow (what `make all` calls)
ziprc run grades --experiment smoke --name train        one stage, through accelerate
ziprc why results/smoke/values/train.parquet            what would rerun, and why
ziprc verify results/smoke                  whether every file is what its digest says
ziprc inspect results/smoke                 a page of rollouts coloured by what the model expects
ziprc sample "Compute 47+91+85" --checkpoint results/toy/checkpoints/ziprc      adaptive sampling, live
ziprc export results/smoke train out.parquet            the wide table of the original systems
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ziprc.config.load import load
from ziprc.errors import UserError
from ziprc.stages.context import add_experiment_arguments, already_made, context_of
from ziprc.store.layout import Layout
from ziprc.workflow import build as building
from ziprc.workflow.launch import first_line, stage_command
from ziprc.workflow.why import explain


def doctor(options: argparse.Namespace) -> int:
    from ziprc.workflow.doctor import diagnose, format_table

    checks = diagnose(options.accelerator)
    print(format_table(checks))
    return 1 if any(check.problem for check in checks) else 0


def run(options: argparse.Namespace) -> int:
    """Become the launcher of a stage, unless its artifact is there already."""
    context = context_of(options, options.stage)
    command, environment = stage_command(options, context.graph)
    print(first_line(options), flush=True)
    if done := already_made(context):  # found out here, before torch is imported
        print(f"{options.stage}: {done}")
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the launcher: it waits for the stage, which Ctrl-C reaches too
    os.execvpe(command[0], command, environment)


def build(options: argparse.Namespace) -> int:
    config = load(options.config_file, options.experiment, options.set)
    return building.build(options, config)


def why(options: argparse.Namespace) -> int:
    print(explain(options))
    return 0


def unlock(options: argparse.Namespace) -> int:
    """Remove a lock that a killed run left."""
    load(options.config_file, options.experiment, options.set)
    print(building.unlock(options))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check every digest; exit code 1 when something is wrong."""
    from ziprc.plan.verify import verify as audit_of

    audit = audit_of(options.home)
    print(audit.text())
    return 1 if audit.problems else 0


def inspect(options: argparse.Namespace) -> int:
    """Print rollouts or one prompt's tree, or write the page that shows them."""
    if options.tree is not None:
        return inspect_tree(options)
    from ziprc.pages.inspect import inspect_html, inspect_text

    if options.text:
        print(inspect_text(options.home, options.checkpoint, options.count or 2))
        return 0
    page = inspect_html(options.home, options.checkpoint, options.count or 8)
    print(f"inspect: wrote {page}; open it in a browser")
    return 0


def inspect_tree(options: argparse.Namespace) -> int:
    """One prompt's tree of branches, as it was sampled live."""
    from ziprc.pages.tree import tree_html, tree_text

    chosen = (options.home, options.tree, options.policy, options.budget)
    if options.text:
        print(tree_text(*chosen))
        return 0
    print(f"inspect: wrote {tree_html(*chosen)}; open it in a browser")
    return 0


def sample(options: argparse.Namespace) -> int:
    """Answer one question live."""
    from ziprc.pages.terminal import sample as show
    from ziprc.sampling.live.asking import Wishes

    named = {key: value for key, value in vars(options).items() if key not in ("action", "json")}
    return show(Wishes(**named), options.json)


def summary(options: argparse.Namespace) -> int:
    """Print the table of headline numbers; draw the figures when asked."""
    from ziprc.pages.summary import sampling_table
    from ziprc.pages.summary import summary as headline_table

    print(headline_table(options.homes))
    print("\n" + sampling_table(options.homes))
    if options.figure:
        from ziprc.evaluation.outcomes import MOMENTS
        from ziprc.pages.figures import overview
        from ziprc.store.files import read_json

        overview(options.figure, read_json(options.homes[0] / "metrics/zip-rc.json")["prediction"], MOMENTS)
        print(f"\nsummary: drew {options.homes[0]} into {options.figure}")
    if options.frontier:
        from ziprc.pages.figures import frontier_figure
        from ziprc.store.files import read_json

        frontier_figure(options.frontier, read_json(options.homes[0] / "frontier.json"))
        print(f"\nsummary: drew the frontier of {options.homes[0]} into {options.frontier}")
    return 0


def export(options: argparse.Namespace) -> int:
    from ziprc.integrations.wide import export_wide

    rows, left_out = export_wide(Layout(options.home.parent, options.home.name), options.name, options.target)
    print(f"export: wrote {rows} rollouts to {options.target}, left out {left_out} without a grade or value")
    return 0


def import_(options: argparse.Namespace) -> int:
    from ziprc.integrations.wide import import_wide

    rows = import_wide(options.source, Layout(options.home.parent, options.home.name), options.name)
    print(f"import: wrote {rows} rollouts to {options.home}")
    return 0


def fetch(options: argparse.Namespace) -> int:
    from ziprc.integrations.fetch import fetch_experiment

    print(fetch_experiment(load(options.config_file, options.experiment, options.set)))
    return 0


def add_container_argument(sub: argparse.ArgumentParser) -> None:
    """The option of commands that may run stages in an image."""
    sub.add_argument(
        "--container", nargs="?", const="auto", metavar="IMAGE",
        help="run the stages in a container image: cpu or cuda as `make image` built it, the path of another, or what the "
        "experiment's GPUs call for",
    )  # fmt: skip


def add_sample_arguments(sub: argparse.ArgumentParser) -> None:
    """The options of `ziprc sample`; what is left out comes from the checkpoint's experiment."""
    sub.add_argument("prompt", help="the question, as the checkpoint's task asks it")
    sub.add_argument("--checkpoint", type=Path, required=True, help="a folder with a joint head and calibration.json")
    sub.add_argument(
        "--policy", default="zip-rc-plus", help="or zip-rc-plus-branching, zip-rc-plus-wide, zip-rc, majority"
    )
    sub.add_argument(
        "--budget", dest="samples", type=float, default=4, help="in samples; frontier.json says which price"
    )
    sub.add_argument("--price", type=float, help="of a token, in probability of a right answer (zip-rc-plus)")
    sub.add_argument("--alpha", type=float, help="share of tokens in the cost, the rest is time (zip-rc)")
    sub.add_argument("--beta", type=float, help="weight of the cost (zip-rc)")
    sub.add_argument("--interval", type=int, help="tokens between two decisions")
    sub.add_argument("--max-tokens", type=int, help="of all branches together")
    sub.add_argument("--max-steps", type=int, help="serial decoding steps")
    sub.add_argument("--max-branches", type=int)
    sub.add_argument("--max-new-tokens", type=int, help="of one response")
    sub.add_argument("--temperature", type=float)
    sub.add_argument("--min-p", type=float)
    sub.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="whether the model thinks first")
    sub.add_argument("--task", help="whose answers are compared: arithmetic, countdown, hub")
    sub.add_argument("--engine", choices=("vllm", "hf"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", action="store_true", help="print one JSON object at the end, nothing else")


def parser() -> argparse.ArgumentParser:
    """The whole command line; every command has a help with an example."""
    top = argparse.ArgumentParser(
        prog="ziprc", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, action: object, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")
        sub.set_defaults(action=action)
        return sub

    sub = command("doctor", doctor, "check the installation", "ziprc doctor")
    sub.add_argument("--accelerator", choices=("cpu", "cuda"), help="what the installation is meant for")

    sub = command("run", run, "run one stage through accelerate", "ziprc run rollouts --experiment smoke --name train")
    sub.add_argument("stage")
    sub.add_argument("--name", required=True, help="which of the stage's artifacts")
    sub.add_argument("--threads", type=int, default=1, help="CPU threads")
    sub.add_argument("--rendezvous", metavar="HOST:PORT", help="of the first node, when several train together")
    sub.add_argument("--machine-rank", type=int, help="number of this node, from 0; SLURM knows it")
    add_experiment_arguments(sub)

    sub = command("build", build, "build an experiment, or single artifacts of it", "ziprc build --experiment smoke")
    sub.add_argument("targets", nargs="*", help="artifact files; all of them when empty")
    sub.add_argument("--profile", help="a folder under profiles/, e.g. slurm, or the path of another")
    sub.add_argument("--dry-run", action="store_true")
    add_container_argument(sub)
    add_experiment_arguments(sub)

    sub = command(
        "why", why, "say in words what would rerun", "ziprc why --experiment smoke results/smoke/metrics/zip-rc.json"
    )
    sub.add_argument("targets", nargs="*")
    sub.add_argument("--profile")
    add_container_argument(sub)
    add_experiment_arguments(sub)

    sub = command("unlock", unlock, "remove a lock that a killed run left", "ziprc unlock --experiment smoke")
    sub.add_argument("--profile")
    add_experiment_arguments(sub)

    sub = command("verify", verify, "check every digest of an experiment", "ziprc verify results/smoke")
    sub.add_argument("home", type=Path, help="results/<experiment>")

    sub = command("inspect", inspect, "look at rollouts, token by token", "ziprc inspect results/smoke --text")
    sub.add_argument("home", type=Path, help="results/<experiment>")
    sub.add_argument("--checkpoint", default="ziprc")
    sub.add_argument("--count", type=int, help="rollouts shown")
    sub.add_argument("--text", action="store_true", help="print in the terminal")
    sub.add_argument(
        "--tree", metavar="PROMPT_ID", help="draw the branches of one prompt instead; auto: one that shows much"
    )
    sub.add_argument("--policy", help="whose tree, as in samples/<policy>.parquet")
    sub.add_argument("--budget", help="of the tree; the largest when left out")

    add_sample_arguments(
        command(
            "sample",
            sample,
            "answer one question by adaptive sampling, live",
            'ziprc sample "Make 24 from 3,5,7" --checkpoint results/toy/checkpoints/ziprc',
        )
    )

    sub = command("summary", summary, "headline numbers of several runs", "ziprc summary results/toy results/toy-seed1")
    sub.add_argument("homes", nargs="+", type=Path, help="results/<experiment> …")
    sub.add_argument("--figure", type=Path, metavar="PNG", help="also draw the predictors of the first run")
    sub.add_argument("--frontier", type=Path, metavar="PNG", help="also draw accuracy against tokens of the first run")

    sub = command("export", export, "write the wide table", "ziprc export results/smoke train wide.parquet")
    sub.add_argument("home", type=Path, help="results/<experiment>")
    sub.add_argument("name", help="train or test")
    sub.add_argument("target", type=Path)

    sub = command("import", import_, "read a wide table", "ziprc import wide.parquet results/mine train")
    sub.add_argument("source", type=Path)
    sub.add_argument("home", type=Path, help="results/<experiment>")
    sub.add_argument("name", help="train or test")

    sub = command("fetch", fetch, "download models and data beforehand", "ziprc fetch --experiment qwen3-0.6b")
    add_experiment_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a UserError is printed as one paragraph, exit code 2."""
    options = parser().parse_args(argv)
    try:
        sys.exit(options.action(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

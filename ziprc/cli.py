"""`ziprc`: the command line. Imports no torch until a command needs it, and checks what it can before.

ziprc doctor                                            what is installed, whether it agrees, what to do about it
ziprc build --experiment smoke                          the whole workflow (what `make all` calls)
ziprc build results/smoke/values/train.parquet          one artifact and what it needs
ziprc run grades --experiment smoke --name train        one stage
ziprc why results/smoke/values/train.parquet            what would rerun, and why
ziprc verify results/smoke                              whether every file is what its digest says
ziprc inspect results/smoke                             a page of rollouts coloured by what the model expects
ziprc sample "Compute 47+91+85" --checkpoint results/toy/checkpoints/ziprc      adaptive sampling, live
ziprc export results/smoke train out.parquet            the wide table of the original systems

Options that change settings are written `--set section.key=value …`, the value in YAML. What holds spaces outside of
brackets is quoted: --set 'train_joint.length_edges=[0, 8, 16]' "prompts.settings.note='two words'".
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ziprc.config.zip_rc import LIVE_POLICIES
from ziprc.errors import UserError, nearest
from ziprc.stages.context import add_experiment_arguments, already_made, context_of
from ziprc.store.layout import Layout
from ziprc.workflow.build import build, unlock
from ziprc.workflow.call import DEFAULT_EXPERIMENT, INTERRUPTED, split_overrides
from ziprc.workflow.container import ACCELERATORS
from ziprc.workflow.doctor import doctor
from ziprc.workflow.launch import first_line, stage_command
from ziprc.workflow.targets import look_up
from ziprc.workflow.why import draw, explain, provenance

# --- what the commands do; each returns an exit code, or the line to print ---------------------------------------------

Action = Callable[[argparse.Namespace], "int | str"]


def run(options: argparse.Namespace) -> int:
    """Become a stage, or its launcher, unless its artifact is there already."""
    context = context_of(options, options.stage)
    command, environment = stage_command(options, context.graph)
    print(first_line(options), flush=True)
    if done := already_made(context):  # found out here, before torch is imported
        print(f"{options.stage}: {done}")
        return 0
    if "accelerate.commands.launch" in command:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it waits for the stage, which Ctrl-C reaches too
    os.execvpe(command[0], command, environment)


def verify(options: argparse.Namespace) -> int:
    """Check every digest of an experiment, or of each in a folder of them; exit code 1 when something is wrong."""
    from ziprc.plan.verify import verify as audit_of

    inside = [path.parent for path in sorted(_existing(options.home).glob("*/provenance"))]
    audits = [audit_of(home) for home in inside or [options.home]]
    print("\n".join(audit.text() for audit in audits))
    return 1 if any(audit.problems for audit in audits) else 0


def inspect(options: argparse.Namespace) -> str:
    """Show rollouts or one prompt's tree as text, or write the page that shows them."""
    home = _existing(options.home)
    if options.tree is not None:
        from ziprc.pages.tree import tree_html, tree_text

        chosen = (home, options.tree, options.policy, options.budget)
        return tree_text(*chosen) if options.text else f"inspect: wrote {tree_html(*chosen)}; open it in a browser"
    if options.labels is not None:
        from ziprc.pages.labels import labels_html

        return f"inspect: wrote {labels_html(home, options.labels, options.count or 8)}; open it in a browser"
    table = home / "introspection" / f"{options.checkpoint}.parquet"
    if not table.exists():
        raise UserError(f"{table} does not exist, so there is nothing to look at. Build it first: `make {table}`.")
    from ziprc.pages.inspect import inspect_html, inspect_text

    if options.text:
        return inspect_text(home, options.checkpoint, options.count or 2)
    return f"inspect: wrote {inspect_html(home, options.checkpoint, options.count or 8)}; open it in a browser"


def _existing(home: Path) -> Path:
    """A folder of results; UserError when it is not there."""
    if not home.is_dir():
        known = [path.name for path in home.parent.glob("*/") if not path.name.startswith(".")]
        hint = nearest(home.name, known) if known else ""
        raise UserError(f"There is no folder {home}{hint}. An experiment's is made by `make all EXPERIMENT=…`.")
    return home


def sample(options: argparse.Namespace) -> int:
    """Answer one question live."""
    if (policy := options.policy) not in LIVE_POLICIES:
        raise UserError(f"There is no live policy '{policy}'{nearest(policy, LIVE_POLICIES)} (--policy).")
    if not options.samples >= 1:
        raise UserError(f"--budget counts samples and must be at least 1, found {options.samples:g}.")
    if not (folder := options.checkpoint).is_dir():
        raise UserError(f"There is no checkpoint {folder}. Give a folder such as results/toy/checkpoints/ziprc.")
    from ziprc.pages.terminal import sample as show
    from ziprc.sampling.live.asking import Wishes

    named = {key: value for key, value in vars(options).items() if key not in ("action", "json")}
    return show(Wishes(**named), options.json)


def summary(options: argparse.Namespace) -> str:
    """The table of headline numbers; draws the figures when asked."""
    from ziprc.evaluation.outcomes import MOMENTS
    from ziprc.pages import summary as tables
    from ziprc.store.files import read_json

    first, *_ = map(_existing, options.homes)
    lines = [tables.summary(options.homes), tables.sampling_table(options.homes)]
    if options.figure:
        from ziprc.pages.figures import overview

        overview(options.figure, read_json(first / "metrics/zip-rc.json")["prediction"], MOMENTS)
        lines.append(f"summary: drew {first} into {options.figure}")
    if options.frontier:
        from ziprc.pages.figures import frontier_figure

        frontier_figure(options.frontier, read_json(first / "frontier.json"))
        lines.append(f"summary: drew the frontier of {first} into {options.frontier}")
    return "\n\n".join(lines)


def export(options: argparse.Namespace) -> str:
    from ziprc.integrations.wide import export_wide

    home = _existing(options.home)
    rows, left_out = export_wide(Layout(home.parent, home.name), options.name, options.target)
    return f"export: wrote {rows} rollouts to {options.target}, left out {left_out} without a grade or value"


def import_(options: argparse.Namespace) -> str:
    from ziprc.integrations.wide import import_wide

    rows = import_wide(options.source, Layout(options.home.parent, options.home.name), options.name)
    return f"import: wrote {rows} rollouts to {options.home}"


def windows(options: argparse.Namespace) -> str:
    """What the window rules of an experiment's arms do to lengths that follow known laws."""
    from ziprc.evaluation.rl.laws import table

    (config,) = look_up(options).configs.values()
    # A predicted window follows no law of lengths.
    own = {name: arm.window for name, arm in config.train_online.arms.items()}
    arms = {name: window for name, window in own.items() if window.rule != "predicted"}
    if not arms:
        raise UserError(
            f"{options.experiment} trains no arm on-policy (train_online.arms). Try --experiment toy-countdown."
        )
    largest = config.rollouts.max_new_tokens
    return "\n".join(table(arms, largest, options.rollouts, options.responses, config.seed))


def fetch(options: argparse.Namespace) -> str:
    from ziprc.integrations.fetch import fetch_experiment

    return "\n".join(map(fetch_experiment, look_up(options).configs.values()))


# --- the command line --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The whole command line; every command has a help with an example."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="ziprc", description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name: str, action: Action, summary: str, example: str) -> argparse.ArgumentParser:
        epilog = f"example: ziprc {name} {example}".rstrip()
        sub = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
        sub.set_defaults(action=action)
        return sub

    _add_workflow(command)
    _add_results(command)
    _add_sample(command)
    return top


Command = Callable[[str, Action, str, str], argparse.ArgumentParser]


def _add_workflow(command: Command) -> None:
    """Commands that start or ask Snakemake, and those around them."""
    sub = command("doctor", doctor, "check the installation", "")
    sub.add_argument("--accelerator", choices=ACCELERATORS, help="what the installation is meant for")

    sub = command("run", run, "run one stage", "rollouts --experiment smoke --name train")
    sub.add_argument("stage", help="a rule of the Snakefile, such as grades")
    sub.add_argument("--name", required=True, help="which of the stage's artifacts")
    sub.add_argument("--threads", type=int, default=1, help="CPU threads")
    sub.add_argument("--rendezvous", metavar="HOST:PORT", help="of the first node, when several train together")
    sub.add_argument("--machine-rank", type=int, help="number of this node, from 0; SLURM knows it")
    add_experiment_arguments(sub)

    sub = command("build", build, "build experiments, or single artifacts", "--experiment smoke")
    _add_wanted(sub, targets=True, suite=True)
    sub.add_argument("--dry-run", action="store_true", help="only say what would be done, in Snakemake's words")

    sub = command("why", explain, "say in words what would rerun", "results/smoke/metrics/zip-rc.json")
    _add_wanted(sub, targets=True, suite=True)

    _add_wanted(command("unlock", unlock, "remove a lock that a killed run left", "--experiment smoke"))
    _add_wanted(command("dag", draw, "draw the graph of an experiment's rules", "--experiment smoke"))
    sub = command("provenance", provenance, "write Snakemake's own report of an experiment", "--experiment smoke")
    _add_wanted(sub)
    sub = command("windows", windows, "try window rules on synthetic lengths", "--experiment toy-countdown")
    sub.add_argument("--rollouts", type=int, default=300, help="of a run")
    sub.add_argument("--responses", type=int, default=200, help="of a rollout")
    _add_wanted(sub)
    _add_wanted(command("fetch", fetch, "download models and data beforehand", "--experiment qwen3-0.6b"), suite=True)


def _add_wanted(sub: argparse.ArgumentParser, targets: bool = False, suite: bool = False) -> None:
    """Options that say which experiments, and which files of them, in which variant, by which means."""
    named, add = sub.add_mutually_exclusive_group(), sub.add_argument
    if targets:
        add("targets", nargs="*", help="artifact files; everything when there is none")
    default = f"that of the targets, or {DEFAULT_EXPERIMENT}" if targets else DEFAULT_EXPERIMENT
    named.add_argument("--experiment", help=f"a name under `experiments` in the configuration file; default: {default}")
    if suite:
        named.add_argument("--suite", help="a name under `suites`: all its experiments")
        add("--system", help="only what this system is for, such as zip-rc; all: every system")
    add("--config-file", type=Path, default=Path("config.yaml"), help="the configuration file")
    add("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="e.g. train_joint.ziprc.kl=25")
    add("--profile", help="a folder under profiles/, e.g. slurm, or the path of another")
    if targets:
        add(
            "--container", nargs="?", const="auto", metavar="IMAGE",
            help="run the stages in a container image: cpu or cuda as `make image` built it, the path of another, or what "
            "the experiment's GPUs call for",
        )  # fmt: skip


def _add_results(command: Command) -> None:
    """Commands that read or write results without Snakemake."""
    home = "results/<experiment>"
    add = command("verify", verify, "check every digest of an experiment", "results/smoke").add_argument
    add("home", type=Path, help=f"{home}, or `results` for each experiment in it")

    add = command("inspect", inspect, "look at rollouts, token by token", "results/smoke --text").add_argument
    add("home", type=Path, help=home)
    add("--checkpoint", default="ziprc", help="whose expectations, as in introspection/<checkpoint>.parquet")
    add(
        "--labels",
        metavar="NAME",
        help="tokens coloured by their value, with their rivals, as in qvalues/<NAME>.parquet",
    )
    add("--count", type=int, help="rollouts shown")
    add("--text", action="store_true", help="print in the terminal")
    add("--tree", metavar="PROMPT_ID", help="draw the branches of one prompt instead; auto: one that shows much")
    add("--policy", help="whose tree, as in samples/<policy>.parquet")
    add("--budget", help="of the tree; the largest when left out")

    add = command("summary", summary, "headline numbers of several runs", "results/toy results/toy-seed1").add_argument
    add("homes", nargs="+", type=Path, help=f"{home} …")
    add("--figure", type=Path, metavar="PNG", help="also draw the predictors of the first run")
    add("--frontier", type=Path, metavar="PNG", help="also draw accuracy against tokens of the first run")

    add = command("export", export, "write the wide table", "results/smoke train wide.parquet").add_argument
    add("home", type=Path, help=home)
    add("name", help="train or test")
    add("target", type=Path, help="the table to write")

    add = command("import", import_, "read a wide table", "wide.parquet results/mine train").add_argument
    add("source", type=Path, help="the table to read")
    add("home", type=Path, help=home)
    add("name", help="train or test")


def _add_sample(command: Command) -> None:
    """`ziprc sample`; what is left out comes from the checkpoint's experiment."""
    add = command(
        "sample",
        sample,
        "answer one question by adaptive sampling, live",
        '"Compute 47+91+85" --checkpoint results/toy/checkpoints/ziprc',
    ).add_argument
    add("prompt", help="the question, as the checkpoint's task asks it")
    add("--checkpoint", type=Path, required=True, help="a folder with a joint head and calibration.json")
    add("--policy", default=LIVE_POLICIES[0], help=f"or {', '.join(LIVE_POLICIES[1:])}")
    add("--budget", dest="samples", type=float, default=4, help="in samples; frontier.json says which price")
    add("--price", type=float, help="of a token, in probability of a right answer (zip-rc-plus)")
    add("--alpha", type=float, help="share of tokens in the cost, the rest is time (zip-rc)")
    add("--beta", type=float, help="weight of the cost (zip-rc)")
    add("--interval", type=int, help="tokens between two decisions")
    add("--max-tokens", type=int, help="of all branches together")
    add("--max-steps", type=int, help="serial decoding steps")
    add("--max-branches", type=int, help="at once and in all")
    add("--max-new-tokens", type=int, help="of one response")
    add("--temperature", type=float, help="of sampling")
    add("--min-p", type=float, help="tokens below this share of the likeliest are not sampled")
    add("--thinking", action=argparse.BooleanOptionalAction, help="whether the model thinks first")
    add("--task", help="whose answers are compared: arithmetic, countdown, multiplication, hub")
    add("--engine", choices=("vllm", "hf"), help="what generates")
    add("--seed", type=int, default=0, help="of sampling")
    add("--json", action="store_true", help="print one JSON object at the end, nothing else")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a UserError is printed as one paragraph, exit code 2."""
    options = parser().parse_args(argv)
    try:
        if "set" in options:
            options.set = [one for text in options.set for one in split_overrides(text)]
        done = options.action(options)
        code = print(done) if isinstance(done, str) else done
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # who read it, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

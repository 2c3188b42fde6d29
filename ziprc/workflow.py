"""Starting things: one stage through accelerate, the whole workflow through Snakemake, and why something reruns.

`build` holds a kernel lock on the experiment that every child inherits. It is released when the last of them dies, so
a run that was killed with all its children leaves nothing to unlock, while a stage left over from a killed run is
noticed and named. Under that lock Snakemake's own lock is not needed. Deleted artifacts are rebuilt first and alone;
as their manifests come out the same, nothing below them reruns.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

from ziprc.artifacts import Layout
from ziprc.config import Config, load
from ziprc.container import apptainer_arguments, find_image
from ziprc.errors import UserError, nearest
from ziprc.plan import missing

TRAINING_STAGES = ("base", "train_joint")


def root_of(config_file: Path) -> Path:
    """The project folder: where the Snakefile and the profiles are."""
    root = config_file.resolve().parent
    return root if (root / "Snakefile").exists() else Path(__file__).resolve().parent.parent


def stage_command(options: argparse.Namespace, config: Config) -> tuple[list[str], dict[str, str]]:
    """The accelerate command line of one stage and its environment."""
    root = root_of(options.config_file)
    stages = [path.stem for path in (Path(__file__).parent / "stages").glob("[a-z]*.py") if path.stem != "context"]
    if options.stage not in stages:
        raise UserError(f"There is no stage '{options.stage}'{nearest(options.stage, stages)}.")
    training = options.stage in TRAINING_STAGES
    profile = config.runtime.accelerate if training or config.runtime.accelerate == "cpu" else "single"
    file = root / "profiles" / "accelerate" / f"{profile}.yaml"
    if not file.exists():
        known = [path.stem for path in file.parent.glob("*.yaml")]
        raise UserError(f"runtime.accelerate: there is no {file}{nearest(profile, known)}.")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--quiet", "--num_cpu_threads_per_process", str(options.threads), "-m", f"ziprc.stages.{options.stage}"]
    command += ["--config-file", str(options.config_file), "--experiment", options.experiment]
    command += ["--results", str(options.results), "--name", options.name]
    if options.set:
        command += ["--set", *options.set]
    return command, stage_environment(options.threads)


def stage_environment(threads: int) -> dict[str, str]:
    """Threads as granted, passive waiting (cores are shared), and no telemetry."""
    own = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **own}


def snakemake_command(options: argparse.Namespace, *extra: str) -> list[str]:
    """Snakemake on this project's Snakefile, with the experiment and the overrides."""
    root = root_of(options.config_file)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile")]
    command += ["--workflow-profile", str(profile_folder(root, options.profile))]
    settings = [f"experiment={options.experiment}", f"config_file={options.config_file.resolve()}"]
    if options.set:
        settings.append(f"set={' '.join(options.set)}")
    if vars(options).get("container"):
        image, arguments = container_of(options)
        command += ["--software-deployment-method", "apptainer", f"--apptainer-args={arguments}"]
        settings.append(f"container={image}")
    return [*command, *extra, "--config", *settings]


def container_of(options: argparse.Namespace) -> tuple[Path, str]:
    """The image that the stages run in, and what Apptainer is told; UserError when that can't work."""
    config = load(options.config_file, options.experiment, options.set)
    nodes = getattr(config.runtime, "nodes", 1)
    if nodes > 1:
        raise UserError(
            f"runtime.nodes={nodes} does not go with a container: the other nodes are started by srun, which is not in the "
            "image. Set runtime.nodes=1, or build without CONTAINER."
        )
    root = root_of(options.config_file)
    image = find_image(options.container, root, config.runtime.gpus)
    return image, apptainer_arguments(config, options.config_file, options.results, root)


def profile_folder(root: Path, name: str | None) -> Path:
    folder = root / "profiles" / (name or "default")
    if not (folder / "config.yaml").exists():
        known = [path.parent.name for path in (root / "profiles").glob("*/config.yaml")]
        raise UserError(f"There is no profile '{name}'{nearest(str(name), known)}.")
    return folder


def lock_experiment(home: Path) -> int:
    """An inheritable, kernel-held lock on an experiment; UserError naming the holder when somebody has it."""
    home.mkdir(parents=True, exist_ok=True)
    handle = os.open(home / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    os.set_inheritable(handle, True)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 100).decode().strip()
        alive = Path(f"/proc/{holder}").exists()
        who = f"by the run with pid {holder}" if alive else f"by a stage left over from the run with pid {holder}"
        raise UserError(
            f"{home} is being built {who}. Wait for it to end, or stop it (`pkill -f 'ziprc.stages.*{home.name}'`), "
            "then run the same command again."
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def build(options: argparse.Namespace, config: Config) -> int:
    """Build the targets, or everything; the exit code is Snakemake's."""
    layout = Layout(options.results, options.experiment)
    if options.dry_run:
        return subprocess.call(snakemake_command(options, "--dry-run", *(options.targets or ["all"])))
    lock = lock_experiment(layout.home)
    steps = [options.targets] if options.targets else [missing(config, layout), ["all"]]
    for targets in filter(None, steps):
        code = subprocess.call(snakemake_command(options, "--nolock", *targets), pass_fds=[lock])
        if code:
            return code
    print(f"{options.experiment}: everything is up to date; see {layout.home / 'report.html'}" if not options.targets else
          f"up to date: {' '.join(options.targets)}")  # fmt: skip
    return 0


def why(options: argparse.Namespace) -> str:
    """What would rerun and why, one line a job, from Snakemake's dry run."""
    command = snakemake_command(options, "--dry-run", "--nolock", *(options.targets or ["all"]))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"Snakemake could not plan this:\n{(result.stderr or result.stdout)[-2000:]}")
    return explain_plan(result.stdout + result.stderr)


def explain_plan(text: str) -> str:
    """Turn the jobs of a dry run into sentences: what the job makes, and why Snakemake would run it."""
    lines: list[str] = []
    job = ""
    for line in text.splitlines():
        if line.startswith("Job "):
            job = line.split(": ", 1)[-1]
        elif line.startswith("Reason:") and job:
            lines.append(f"* {job}\n    {_plain_reason(line.removeprefix('Reason:'))}")
            job = ""
    if not lines:
        return "Nothing would rerun: everything is up to date."
    return f"{len(lines)} jobs would run:\n\n" + "\n".join(lines)


def _plain_reason(reason: str) -> str:
    plain = reason.strip().replace("Input files updated by another job", "its input is made anew")
    plain = plain.replace("Missing output files", "not there").replace("Updated input files", "its input has changed")
    return re.sub(r"results/[^/]+/", "", plain)

"""Starting things: one stage through accelerate, the whole workflow through Snakemake, and why something reruns.

`build` holds a kernel lock on the experiment that every child inherits. It is released when the last of them dies, so
a run that was killed with all its children leaves nothing to unlock, while a stage left over from a killed run is
noticed and named. Under that lock Snakemake's own lock is not needed. Deleted artifacts are rebuilt first and alone;
as their manifests come out the same, nothing below them reruns.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from ziprc import living
from ziprc.artifacts import Layout, disk_errors_explained
from ziprc.config import Config, load
from ziprc.container import apptainer_arguments, find_image
from ziprc.errors import UserError, nearest
from ziprc.needs import trains
from ziprc.plan import missing
from ziprc.provenance import hand_on_revision


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
    training = trains(options.stage, config)
    file = launch_profile(root, config, training)
    if training and config.runtime.nodes > 1 and options.rendezvous is None:
        return node_launchers(options, config.runtime.nodes), stage_environment(options.threads)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += processes_of(file, options, config)
    command += ["--quiet", "--num_cpu_threads_per_process", str(options.threads), "-m", f"ziprc.stages.{options.stage}"]
    return command + stage_arguments(options), stage_environment(options.threads)


def launch_profile(root: Path, config: Config, training: bool) -> Path:
    """accelerate's settings: the experiment's for training, one process for everything else."""
    runtime = config.runtime
    profile = runtime.accelerate if training or runtime.accelerate == "cpu" else "single"
    file = root / "profiles" / "accelerate" / f"{profile}.yaml"
    if not file.exists():
        known = [path.stem for path in file.parent.glob("*.yaml")]
        raise UserError(f"runtime.accelerate: there is no {file}{nearest(profile, known)}.")
    if training and runtime.nodes > 1 and one_process(file):
        raise UserError(
            f"runtime.nodes={runtime.nodes} needs several processes, but the launch profile {file.name} has one. Set "
            "runtime.accelerate to ddp, fsdp or, without GPUs, cpus."
        )
    return file


def one_process(profile: Path) -> bool:
    return yaml.safe_load(profile.read_text())["distributed_type"] == "NO"


def stage_arguments(options: argparse.Namespace) -> list[str]:
    """What every stage is given."""
    arguments = ["--config-file", str(options.config_file), "--experiment", options.experiment]
    arguments += ["--results", str(options.results), "--name", options.name]
    return [*arguments, "--set", *options.set] if options.set else arguments


def processes_of(profile: Path, options: argparse.Namespace, config: Config) -> list[str]:
    """How many processes on how many machines, for a launch profile with more than one process.

    A machine has `runtime.gpus` processes, or as many as the profile says where there are no GPUs.
    """
    if one_process(profile):
        return []
    per_node = config.runtime.gpus or yaml.safe_load(profile.read_text())["num_processes"]
    if options.rendezvous is None:
        return ["--num_processes", str(per_node), "--main_process_port", "0"]  # a free one: others train here too
    host, _, port = options.rendezvous.rpartition(":")
    rank = os.environ.get("SLURM_NODEID") if options.machine_rank is None else options.machine_rank
    if not host or not port.isdecimal() or rank is None:
        raise UserError(
            f"--rendezvous is HOST:PORT of the first node, found '{options.rendezvous}', and --machine-rank the number of "
            f"this node, found {rank}."
        )
    nodes = config.runtime.nodes
    return [
        *("--num_machines", str(nodes), "--machine_rank", str(rank), "--num_processes", str(nodes * per_node)),
        *("--main_process_ip", host, "--main_process_port", port, "--rdzv_backend", "static"),
    ]


def node_launchers(options: argparse.Namespace, nodes: int) -> list[str]:
    """Start `ziprc run` once on every node of this SLURM job; each is told where the first one listens.

    The first node is this one: SLURM runs a job's script there, and gives it the first task.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            f"runtime.nodes={nodes}, but this is no SLURM job. Build with `PROFILE=slurm`, or start `ziprc run "
            f"{options.stage} … --rendezvous HOST:PORT --machine-rank RANK` on every node by hand."
        )
    rendezvous = f"{socket.gethostname()}:{meeting_port(int(os.environ['SLURM_JOB_ID']))}"
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    command += [f"--cpus-per-task={options.threads}", "--mpi=none"]
    command += [sys.executable, "-m", "ziprc.cli", "run", options.stage, "--threads", str(options.threads)]
    return [*command, "--rendezvous", rendezvous, *stage_arguments(options)]


def meeting_port(job: int) -> int:
    """A free port of the first node, by the number of the SLURM job, so that jobs on one node hardly want the same.

    The launcher takes it only seconds later, so it lies below the ports that Linux hands to others (from 32768 on, as
    Linux comes). Raises UserError when 100 ports in a row are taken.
    """
    first = 12_000 + job % 20_000
    for port in range(first, first + 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("", port))
            return port
    raise UserError(
        f"None of the ports {first} to {first + 99} of {socket.gethostname()} is free, and training on several nodes needs "
        "one. See with `ss -tlnp` what holds them; a new job looks in another range."
    )


def first_line(options: argparse.Namespace) -> str:
    """What a stage's log begins with, at every attempt: where and with what it runs."""
    found = {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "SLURM job": os.environ.get("SLURM_JOB_ID"),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": options.threads,
    }
    where = ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)
    return f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {options.stage} {options.name}: {where}"


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
    nodes = config.runtime.nodes
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


def call_to_the_end(command: Sequence[str], pass_fds: Sequence[int] = ()) -> int:
    """Run a command to its own end; its exit code.

    Ctrl-C reaches it too, and it needs time: Snakemake cancels its SLURM jobs. `subprocess.call` would kill it after a
    quarter of a second and leave them. Rules start `python`, which has to be this one, whatever PATH says.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        return subprocess.Popen(command, pass_fds=pass_fds, env=environment).wait()
    finally:
        signal.signal(signal.SIGINT, before)


def build(options: argparse.Namespace, config: Config) -> int:
    """Build the targets, or everything; the exit code is Snakemake's."""
    layout = Layout(options.results, options.experiment)
    if options.dry_run:
        return subprocess.call(snakemake_command(options, "--dry-run", *(options.targets or ["all"])))
    with disk_errors_explained(layout.home):
        lock = lock_experiment(layout.home)
        if options.container:
            hand_on_revision(layout)
    try:
        living.wait_for_jobs(Path.cwd(), options.experiment)
    except KeyboardInterrupt:
        print(f"\n{options.experiment}: stopped waiting; the SLURM jobs go on.")
        return 130
    except UserError as error:
        print(f"{options.experiment}: whether an earlier run left SLURM jobs is not known. {error}", file=sys.stderr)
    steps = [options.targets] if options.targets else [missing(config, layout), ["all"]]
    for targets in filter(None, steps):
        code = call_to_the_end(snakemake_command(options, "--nolock", *targets), pass_fds=[lock])
        if code:
            return code
    print(f"{options.experiment}: everything is up to date; see {layout.home / 'report.html'}" if not options.targets else
          f"up to date: {' '.join(options.targets)}")  # fmt: skip
    return 0


def unlock(options: argparse.Namespace) -> str:
    """Remove the locks that a killed Snakemake left in this folder; UserError naming what is still alive."""
    alive = living.everything(Path.cwd(), options.results)
    if alive:
        listing = "\n".join(f"  * {one}" for one in alive)
        raise UserError(
            f"This folder is in use, so its lock stays:\n{listing}\nWait for them, or stop them; then `make unlock` again."
        )
    locked = [path for path in (Path(".snakemake") / "locks").glob("*") if path.is_file()]
    if not locked:
        return "unlock: nothing was locked, and nothing of this workflow is alive in this folder"
    done = subprocess.run(snakemake_command(options, "--unlock"), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"Snakemake could not unlock this folder:\n{(done.stderr or done.stdout)[-2000:]}")
    return "unlock: nothing of this workflow is alive, so Snakemake's lock was removed; the same command goes on"


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

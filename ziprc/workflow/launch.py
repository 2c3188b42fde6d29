"""Starting one stage: in one process, on all GPUs of a node, or on several nodes of a SLURM job.

Several processes are accelerate's business. For one process its launcher would import torch, which takes 1.7 CPU-seconds a
stage, only to set a few variables and start Python a second time; they are set here, and a test holds them to accelerate's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import yaml

from ziprc.config.load import Config
from ziprc.errors import UserError, nearest
from ziprc.plan.graph import Graph

PLAIN_SETTINGS = {
    "compute_environment", "distributed_type", "use_cpu", "num_machines", "num_processes", "mixed_precision",
}  # fmt: skip


def root_of(config_file: Path) -> Path:
    """The project folder: where the Snakefile and the profiles are."""
    root = config_file.resolve().parent
    return root if (root / "Snakefile").exists() else Path(__file__).resolve().parents[2]


def stage_command(options: argparse.Namespace, graph: Graph) -> tuple[list[str], dict[str, str]]:
    """The command line of one stage and its environment: the stage itself, accelerate's launcher, or srun with launchers."""
    config, training, threads = graph.config, graph.machine(options.stage) == "big-gpu", str(options.threads)
    file = launch_profile(root_of(options.config_file), config, training)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}  # stages share the cores
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if training and config.runtime.nodes > 1 and options.rendezvous is None:
        return node_launchers(options, config.runtime.nodes), environment
    stage = ["-m", f"ziprc.stages.{options.stage}", *stage_arguments(options)]
    if (one := one_process_environment(file)) is not None:
        return [sys.executable, *stage], environment | one
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += [*processes_of(file, options, config), "--quiet", "--num_cpu_threads_per_process", threads, *stage]
    return command, environment


def one_process_environment(profile: Path) -> dict[str, str] | None:
    """What accelerate's launcher sets for one process; None where there are several, or settings that only it knows."""
    settings = yaml.safe_load(profile.read_text())
    if not one_process(profile) or set(settings) - PLAIN_SETTINGS:
        return None
    on_cpu = {"KMP_AFFINITY": "granularity=fine,compact,1,0", "KMP_BLOCKTIME": "1"} if settings["use_cpu"] else {}
    return {
        "ACCELERATE_USE_CPU": str(settings["use_cpu"]),
        "ACCELERATE_MIXED_PRECISION": settings["mixed_precision"],
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        **{f"ACCELERATE_DYNAMO_USE_{w}": "False" for w in ("FULLGRAPH", "DYNAMIC", "REGIONAL_COMPILATION")},
        **on_cpu,
    }


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
    arguments = ["--config-file", str(options.config_file), "--experiment", options.experiment]
    arguments += ["--results", str(options.results), "--name", options.name]
    return [*arguments, "--set", *options.set] if options.set else arguments


def processes_of(profile: Path, options: argparse.Namespace, config: Config) -> list[str]:
    """How many processes on how many machines: on each `runtime.gpus`, or without GPUs as many as the profile says."""
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

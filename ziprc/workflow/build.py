"""Building an experiment through Snakemake, under a lock that its children inherit.

`build` holds a kernel lock on the experiment. It is released when the last child dies, so a run that was killed with all its
children leaves nothing to unlock, while a stage left over from a killed run is noticed and named. Under that lock
Snakemake's own lock is not needed. Deleted artifacts are rebuilt first and alone; as their manifests come out the same,
nothing below them reruns.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ziprc.config.load import Config, load
from ziprc.errors import UserError, nearest
from ziprc.plan.provenance import hand_on_revision
from ziprc.store.files import disk_errors_explained
from ziprc.store.layout import Layout
from ziprc.systems import goals_of, graph_of
from ziprc.workflow import living
from ziprc.workflow.container import apptainer_arguments, find_image
from ziprc.workflow.launch import root_of


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
    steps = (
        [options.targets]
        if options.targets
        else [list(map(str, graph_of(config, layout).missing(goals_of(config)))), ["all"]]
    )
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

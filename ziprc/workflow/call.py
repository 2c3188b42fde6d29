"""Calling Snakemake: its command line, the settings on it and how the Snakefile reads them, and what failed.

Settings go through `--config`. Under SLURM Snakemake hands them on through two more shells, without quoting, so whatever
is not a plain word or path is percent-encoded JSON there: no space, quote, brace or dollar is left to be misread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ziprc.config.load import Config
from ziprc.errors import UserError, nearest
from ziprc.workflow.container import apptainer_arguments, find_image
from ziprc.workflow.launch import root_of

DEFAULT_EXPERIMENT = "toy"  # the Makefile says the same
PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")  # what every shell, and Snakemake's YAML, leaves as it is
FAILED = re.compile(r"^ *Error in rule \w+:\n(?: +(?!log:).*\n)*? +log: (?P<log>[^,\n]+?)(?:,.*)? \(check log", re.M)
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def split_overrides(text: str) -> list[str]:
    """`a.b=1 c=[0, 8] d='x y'` as three overrides: it is split at spaces outside of quotes, brackets and braces.

    Quotes stay, since a value is YAML. One override comes back as it is.
    """
    found, depth, quoted = [""], 0, ""
    for before, character in zip(f" {text}", text, strict=False):
        if quoted:
            quoted = "" if character == quoted else quoted
        elif character in "'\"" and before in "=[{,: ":  # elsewhere it is an apostrophe
            quoted = character
        elif character.isspace() and depth == 0:
            found.append("")
            continue
        else:
            depth += (character in "[{") - (character in "]}")
        found[-1] += character
    return [one for one in found if one]


def packed(settings: Mapping[str, Any]) -> list[str]:
    """`key=value` of each setting, for `--config`."""
    plain = {key: isinstance(value, str) and PLAIN.fullmatch(value) for key, value in settings.items()}
    return [f"{k}={v if plain[k] else quote(json.dumps(v), safe='')}" for k, v in settings.items()]


def unpacked(value: Any) -> Any:
    """A value of Snakemake's `config`: as it was `packed`, or as somebody wrote it who called Snakemake by hand."""
    return json.loads(unquote(value)) if isinstance(value, str) and value.startswith("%") else value


@dataclass(frozen=True)
class Asked:
    """What a run of Snakemake is about: experiments, of all their systems or of some, and how their settings are changed."""

    config_file: Path
    experiments: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    container: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], root: str | Path) -> Asked:
        """What Snakemake's `config` says; `root` is the folder of the Snakefile."""
        given = {key: unpacked(value) for key, value in config.items()}
        names = given.get("experiments") or given.get("experiment") or DEFAULT_EXPERIMENT
        experiments = tuple(map(str, names if isinstance(names, list) else [names]))
        overrides = given.get("set") or ()
        overrides = tuple(split_overrides(overrides) if isinstance(overrides, str) else map(str, overrides))
        config_file = Path(given.get("config_file") or Path(root) / "config.yaml").resolve()
        return cls(config_file, experiments, overrides, tuple(given.get("systems") or ()), given.get("container"))


def snakemake_command(options: argparse.Namespace, configs: Mapping[str, Config], *extra: str) -> list[str]:
    """Snakemake on this project's Snakefile, with the experiments and how the caller changed them."""
    root = root_of(options.config_file)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile")]
    profile = root / "profiles" / (options.profile or "default")
    if not (profile / "config.yaml").exists():
        known = [path.parent.name for path in (root / "profiles").glob("*/config.yaml")]
        raise UserError(f"There is no profile '{profile.name}'{nearest(profile.name, known)} in {profile.parent}.")
    command += ["--workflow-profile", str(profile)]
    settings: dict[str, Any] = {"experiments": list(configs), "config_file": str(options.config_file.resolve())}
    settings |= {"set": options.set} if options.set else {}
    settings |= {"systems": [system]} if (system := vars(options).get("system")) not in (None, "all") else {}
    if vars(options).get("container"):
        for name, config in configs.items():
            if (nodes := config.runtime.nodes) > 1:
                raise UserError(
                    f"runtime.nodes={nodes} of {name} does not go with a container: the other nodes are started by srun, "
                    "which is not in the image. Set runtime.nodes=1, or build without CONTAINER."
                )
        image = find_image(options.container, root, max(config.runtime.gpus for config in configs.values()))
        arguments = apptainer_arguments(list(configs.values()), options.config_file, Path("results"), root)
        command += ["--software-deployment-method", "apptainer", f"--apptainer-args={arguments}"]
        settings["container"] = str(image)
    return [*command, *extra, "--config", *packed(settings)]


def answer(command: Sequence[str]) -> tuple[str, str]:
    """What a short run of Snakemake prints, on stdout and on stderr; UserError with all of it when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(filter(None, (done.stderr.strip(), done.stdout.strip())))
        raise UserError(f"Snakemake could not do this:\n{said[-3000:]}")
    return done.stdout, done.stderr


def call_to_the_end(command: Sequence[str], pass_fds: Sequence[int] = ()) -> int:
    """Run a command to its own end; its exit code, or INTERRUPTED if it failed after a Ctrl-C.

    Ctrl-C reaches it too, and it needs time: Snakemake cancels its SLURM jobs. `subprocess.call` would kill it after a
    quarter of a second and leave them. Rules start `python`, which has to be this one, whatever PATH says.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        code = subprocess.Popen(command, pass_fds=pass_fds, env=environment).wait()
        return INTERRUPTED if code and interrupts else code
    finally:
        signal.signal(signal.SIGINT, before)


def failures(started: float, experiments: Sequence[str]) -> Iterator[str]:
    """For each stage of these experiments that failed since: its name, what its log says last, and where the log is.

    Known from what Snakemake has written about its runs under `.snakemake/log`.
    """
    runs = [path for path in Path(".snakemake/log").glob("*.log") if path.stat().st_mtime >= started]
    found = [Path(match["log"]) for run in sorted(runs) for match in FAILED.finditer(run.read_text(errors="replace"))]
    for log in dict.fromkeys(log for log in found if log.parts[1:2] and log.parts[1] in experiments):
        text = log.read_text(errors="replace") if log.exists() else ""
        attempt = text[text.rfind("\n--- ") + 1 :]
        start = attempt.rfind("error in stage ")
        plain = [line for line in attempt.splitlines() if line[:1].strip()] or ["its log is empty"]
        said = attempt[start:].strip() if start >= 0 else plain[-1]
        yield f"{log.parts[1]}: {log.stem} failed.\n{said}\nIts log: {log}"

"""Running the workflow's stages in an image: which file it is, and what Apptainer has to be told.

Snakemake runs on the host and starts each stage with `apptainer exec`. The image holds the packages of a lock and nothing
of this project; the checkout is bound at its own path, so host and container see the same code and the same files. An
image is named by the digest of what it is built from (`make image`, containers/build.sh), so a name always means the same
content. Apptainer hands the host's variables on: SLURM_* and CUDA_VISIBLE_DEVICES must reach a stage. What must not (PYTHONHOME
and its like) is emptied here, so that it holds for an image of one's own too. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ziprc.config.load import Config
from ziprc.errors import UserError

ACCELERATORS = ("cpu", "cuda")
# What writes caches and settings, and where under the cache folder; by default many of them write to HOME, which in a
# container is the folder that Snakemake works in.
CACHES = {
    "XDG_CACHE_HOME": "xdg",
    "XDG_CONFIG_HOME": "config",
    "VLLM_CACHE_ROOT": "vllm",
    "VLLM_CONFIG_ROOT": "vllm-config",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton/cache",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "NUMBA_CACHE_DIR": "numba",
    "MPLCONFIGDIR": "matplotlib",
}
# Of the host's Python and libraries; an empty value is as good as none.
EMPTIED = ("PYTHONHOME", "PYTHONSTARTUP", "LD_PRELOAD")
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def image_name(containers: Path, accelerator: str) -> str:
    """`ziprc-<accelerator>-<digest of definition, install steps and lock>.sif`; the digest of containers/build.sh."""
    parts = ("ziprc.def", "install.sh", "check.py", f"requirements/{accelerator}.txt")
    content = b"".join((containers / part).read_bytes() for part in parts)
    return f"ziprc-{accelerator}-{hashlib.sha256(content).hexdigest()[:12]}.sif"


def find_image(wanted: str, root: Path, gpus: int) -> Path:
    """The image file: `wanted` is a path, `cpu`, `cuda`, or `auto` for what the experiment's GPUs call for.

    Raises UserError when it is not there, or where Apptainer is not.
    """
    accelerator = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
    built, containers = accelerator in ACCELERATORS, root / "containers"
    image = containers / "images" / image_name(containers, accelerator) if built else Path(wanted).absolute()
    if not image.exists():
        remedy = f"`make image BUILDER=apptainer ACCELERATOR={accelerator}`" if built else "`make image`"
        raise UserError(
            f"There is no container image {image}. Build it with {remedy}, or name one: CONTAINER=path/to.sif."
        )
    if any(character.isspace() for character in str(image)):
        raise UserError(
            f"The path of the container image, '{image}', has a space in it, which Snakemake does not accept."
        )
    if not shutil.which("apptainer") and not shutil.which("singularity"):
        raise UserError(
            f"Running stages in {image.name} takes Apptainer (or Singularity), and neither is on PATH. Install it from "
            "https://apptainer.org or load your cluster's module, or build without CONTAINER."
        )
    return image


def apptainer_arguments(configs: Sequence[Config], config_file: Path, results: Path, root: Path) -> str:
    """What `apptainer exec` is given beside the image to build these experiments, as one string for a shell.

    Makes the folders of caches, on the host. UserError for a folder that Apptainer cannot bind because of its name.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = caches / "ziprc" / "container"
    hub = Path(os.environ.get("HF_HOME") or caches / "huggingface")  # which `make fetch` fills
    variables = {**{key: str(cache / name) for key, name in CACHES.items()}, "HF_HOME": str(hub)}
    for folder in variables.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    variables |= {"PYTHONPATH": str(root), "PYTHONNOUSERSITE": "1", "TMPDIR": "/tmp", **dict.fromkeys(EMPTIED, "")}
    variables |= {key: os.environ.get(key, "1") for key in OFFLINE}
    arguments = ["--nv"] if any(config.runtime.gpus for config in configs) else []
    local = [folder for config in configs for folder in local_folders(config.model_dump())]
    for folder in bound_folders([root, config_file.resolve().parent, cache, hub, results, *local]):
        arguments += ["--bind", folder]
    for key, value in variables.items():
        arguments += ["--env", f"{key}={value}"]
    return shlex.join(arguments)


def bound_folders(folders: list[Path]) -> list[str]:
    """Each folder by its real path, outer ones first, without those that lie in another one.

    A symbolic link is bound under what it points to, since it is followed inside the container too.
    """
    bound: list[Path] = []
    for folder in sorted({folder.resolve() for folder in folders}):
        if any(character in str(folder) for character in ":,"):
            raise UserError(
                f"{folder} has a colon or comma in its name, so it can't be bound into a container. Rename it."
            )
        if not any(folder.is_relative_to(outer) for outer in bound):
            bound.append(folder)
    return [str(folder) for folder in bound]


def local_folders(value: Any) -> Iterator[Path]:
    """Folders of models and data that a configuration, or a part of it, names by path."""
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from local_folders(inner)
    elif isinstance(value, str) and ("/" in value or value.startswith(".")) and (path := Path(value)).exists():
        yield path if path.is_dir() else path.parent

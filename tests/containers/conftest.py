"""Both images, built for real from nothing but Debian's mirror and PyPI; named skips for what cannot be had.

The definitions are the product's own; only their base is replaced, since no registry of images is asked here: a Debian
made by mmdebstrap. What is downloaded (the base, the wheels, Apptainer) is kept between runs in the user's cache folder
`ziprc-tests`; images are always built anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import cluster  # noqa: F401  the SLURM of the tests of the cluster, in this folder too
from tests.workflow.conftest import MICRO, ROOT, Workplace
from ziprc.store.digests import digest_bytes

HERE = Path(__file__).parent
LOCK = ROOT / "containers" / "requirements" / "cpu.txt"
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}  # Debian's own Python must be the one the wheels are for
GRADES = "results/micro/grades/train.parquet"
KEPT_S = 7 * 24 * 3600  # how long something that no test asked for stays in the cache
SECONDS: dict[str, float] = {}


@contextmanager
def timed(what: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    SECONDS[what] = SECONDS.get(what, 0) + time.monotonic() - begin


def call(command: list[str | Path], what: str, **more: object) -> subprocess.CompletedProcess[str]:
    """Run a command that gets something from outside; a skip with the reason when it can't."""
    with timed(what):
        done = subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload]
    if done.returncode:
        pytest.skip(f"{what}: {(done.stderr or done.stdout).strip()[-400:]}")
    return done


def cache() -> Path:
    """The folder of what is kept between runs, for every checkout of this user; so nothing in it may name one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ziprc-tests" / "containers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept(kind: str, made_from: bytes, suffix: str = "") -> Path:
    """Where something made from this is kept. Others of the kind (older, or cut short) go when nobody asks for them."""
    path = cache() / f"{kind}-{digest_bytes(made_from)[:12]}{suffix}"
    for other in cache().glob(f"{kind}-*"):
        if other != path and time.time() - other.stat().st_mtime > KEPT_S:
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)
    if path.exists():
        os.utime(path)
    return path


@contextmanager
def partial(path: Path) -> Iterator[Path]:
    """A folder of this run's own; what is made in it under the path's name gets its place when it is complete."""
    with tempfile.TemporaryDirectory(prefix=f"{path.name.partition('-')[0]}-partial-", dir=cache()) as folder:
        yield Path(folder) / path.name
        try:
            (Path(folder) / path.name).rename(path)
        except OSError:
            if not path.exists():  # if it does, another run was faster, with the same content
                raise


# --- what is needed from outside -------------------------------------------------------------------------------------


def require(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def debian() -> Path:
    """A tarball of a minimal Debian with Python."""
    suite, packages = SUITES[sys.version_info[:2]], "python3,python3-venv,ca-certificates,libnuma1"
    tarball = kept("debian", f"{suite} {packages}".encode(), ".tar")
    if not tarball.exists():
        with partial(tarball) as made:
            options = ["--variant=minbase", f"--include={packages}", "--dpkgopt=force-unsafe-io"]
            call(["mmdebstrap", *options, suite, made], "Debian base (mmdebstrap)")
    return tarball


def wheelhouse() -> Path:
    """A folder with every wheel of the CPU lock, by this machine's pip and its settings."""
    folder = kept("wheels", LOCK.read_bytes())
    if not folder.exists():
        with partial(folder) as made:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", made, "-r", LOCK]
            call(download, "wheels of the lock (pip download)")
    return folder


def find_apptainer() -> Path:
    """The machine's Apptainer, or Debian's in a private folder."""
    found = shutil.which("apptainer")
    if found is None:
        parts = [HERE / "apptainer.sh", HERE / "identity_namespace.py"]
        folder = kept("apptainer", b"".join(part.read_bytes() for part in parts))
        call([parts[0], folder], "Apptainer (Debian's package)")
        found = str(folder / "tool" / "apptainer")
    return Path(found)


@dataclass(frozen=True)
class Supplies:
    """What both builds start from."""

    debian: Path
    wheels: Path


@pytest.fixture(scope="session")
def supplies() -> Supplies:
    if os.getuid() != 0:
        pytest.skip("it needs root, to make a Debian base")
    if sys.version_info[:2] not in SUITES:
        pytest.skip(f"no Debian release has Python {sys.version.split()[0]}, so the wheels would not fit")
    require("mmdebstrap")
    with ThreadPoolExecutor() as pool:
        base, wheels = pool.submit(debian), pool.submit(wheelhouse)
        return Supplies(base.result(), wheels.result())


# --- the images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def apptainer() -> Path:
    return find_apptainer()


@pytest.fixture(scope="session")
def image(supplies: Supplies, apptainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The CPU image by Apptainer."""
    folder = tmp_path_factory.mktemp("apptainer")
    base = folder / "base"
    base.mkdir()
    # device nodes cannot be copied inside a user namespace
    subprocess.run(["tar", "-x", "-f", supplies.debian, "-C", base, "--exclude=./dev/*"], check=True)
    own = {
        "BUILDER": "apptainer",
        "BOOTSTRAP": "localimage",
        "BASE": str(base),
        "WHEELS": str(supplies.wheels),
        "IMAGES": str(folder / "images"),
        "MKSQUASHFS_ARGS": "-comp zstd -Xcompression-level 1",
        "APPTAINER_TMPDIR": str(folder),
        "PATH": f"{apptainer.parent}:{os.environ['PATH']}",
        **SENTINELS,
    }
    built(folder, own, "SIF: build")
    shutil.rmtree(base)
    [made] = (folder / "images").iterdir()
    yield made
    shutil.rmtree(folder)


# Settings of the building machine that must not get into an image.
SENTINELS = {"PIP_TRUSTED_HOST": "sentinel-of-this-machine.invalid", "PIP_RETRIES": "7"}


def built(folder: Path, own: dict[str, str], what: str) -> str:
    """Run containers/build.sh; what it printed."""
    with timed(what), open(folder / "build.log", "w") as log:
        code = subprocess.call(
            [ROOT / "containers" / "build.sh"], env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT
        )
    said = (folder / "build.log").read_text()
    assert code == 0, said[-4000:]
    return said


@dataclass(frozen=True)
class Store:
    """A private store of Buildah images, and the CPU image in it."""

    environment: dict[str, str]
    tag: str

    def buildah(self, *arguments: str) -> str:
        done = subprocess.run(
            ["buildah", *arguments], env={**os.environ, **self.environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()


@pytest.fixture(scope="session")
def store(supplies: Supplies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The CPU image by Buildah, from the Dockerfile."""
    require("buildah")
    folder = tmp_path_factory.mktemp("buildah")
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    own = {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "BUILDAH_ISOLATION": "chroot",
        "BUILDER": "buildah",
        "BASE": "localhost/debian-with-python:tests",
        "WHEELS": str(supplies.wheels),
        "TMPDIR": str(folder),
        **SENTINELS,
    }
    empty = Store(own, "")
    try:
        with timed("Buildah: base from the tarball"):
            context = folder / "base"
            context.mkdir()
            (context / "Dockerfile").write_text(f"FROM scratch\nADD {supplies.debian.name} /\n")
            shutil.copy(supplies.debian, context)
            empty.buildah("build", "--quiet", "--tag", own["BASE"], str(context))
        said = built(folder, own, "Buildah: build")
        yield Store(own, said.partition("image: built ")[2].split()[0])
    finally:
        empty.buildah("rm", "--all")
        empty.buildah("rmi", "--all", "--force")
        left = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
        for mount in left:  # the store itself is mounted onto itself while it is in use
            subprocess.run(["umount", mount.split()[1]], check=True)
        shutil.rmtree(folder)


# --- building an experiment ------------------------------------------------------------------------------------------


class Place(Workplace):
    """A folder to build in, as a user would: nothing set but PATH, and HOME elsewhere."""

    def __init__(self, folder: Path, home: Path, **own: str) -> None:
        super().__init__(folder, MICRO, "micro")
        self.user_home, self.own = home, own
        folder.mkdir(exist_ok=True)

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "PYTHON"))}
        mine = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(self.user_home), "OMP_NUM_THREADS": "1"}
        return kept | mine | self.own

    def build(self, *more: str) -> str:
        """`ziprc build` to a good end; what it printed."""
        done = subprocess.run(
            self.command("build", *more), cwd=self.folder, env=self.environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each part took, and what did not run and why."""
    for what, seconds in SECONDS.items():
        terminalreporter.write_line(f"containers: {seconds:6.1f} s  {what}")
    here = str(HERE.relative_to(ROOT))
    for report in terminalreporter.stats.get("skipped", []):
        if getattr(report, "nodeid", "").startswith(here):
            terminalreporter.write_line(f"  not run: {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")

"""Stages in the images: the same tables as without, nothing of the host's Python, nothing left lying about."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.containers.conftest import GRADES, HERE, ROOT, SENTINELS, Place, Store, cache, timed
from ziprc.config.load import load
from ziprc.workflow import container

pytestmark = [pytest.mark.containers, pytest.mark.slow]

USER_SITE = Path(".local") / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
# What a host might have lying about: modules that Python imports by itself, where it finds them. Harmless on the host.
POISON = """
import os
if os.path.exists("/.singularity.d"):
    open("/tmp/{mark}", "w").close()
    raise SystemExit("host Python reached the container")
"""
PROBE = """
import json, os, sys, torch, vllm
system = dict(line.rstrip().split("=", 1) for line in open("/etc/os-release") if "=" in line)["PRETTY_NAME"]
seen = {key: os.environ.get(key) for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES", "PYTHONHOME")}
print(json.dumps(dict(python=sys.executable, prefix=sys.prefix, path=sys.path, torch=torch.__file__, vllm=vllm.__file__,
                      system=system, container=os.environ.get("APPTAINER_CONTAINER"), **seen)))
"""
# Python's own traces of tests and runs in a checkout, by host and container alike.
TRACES = ("__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache", ".egg-info")


def checkout() -> set[str]:
    """Every file of the checkout that no run may add to."""
    found = set()
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in (".git", ".venv") and not name.endswith(TRACES)]
        found.update(os.path.join(folder, name) for name in names)
    return found


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The first four stages on the host."""
    place = Place(tmp_path_factory.mktemp("native"), tmp_path_factory.mktemp("home"))
    with timed("native: four stages"):
        place.build(GRADES)
    return place


@pytest.fixture(scope="module")
def inside(image: Path, apptainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same stages in the Apptainer image, with a poisoned host and `results` on "another disk"."""
    home, disk = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("disk")
    folder, elsewhere = tmp_path_factory.mktemp("inside"), tmp_path_factory.mktemp("modules")
    (folder / "results").symlink_to(disk)
    for site in (home / USER_SITE, folder / USER_SITE, elsewhere):
        site.mkdir(parents=True, exist_ok=True)
        for name in ("sitecustomize.py", "usercustomize.py"):
            (site / name).write_text(POISON.format(mark=f"{folder.name}.poisoned"))
    place = Place(
        folder,
        home,
        PATH=f"{Path(sys.executable).parent}:{apptainer.parent}:{os.environ['PATH']}",
        PYTHONPATH=f"{ROOT}:{elsewhere}",
        CUDA_VISIBLE_DEVICES="",
    )
    before = checkout()
    with timed("SIF: the same four stages"):
        place.build(GRADES, "--container", str(image))
    assert checkout() == before, "a stage wrote into the checkout"
    return place


def records(place: Place) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((place.home / "provenance").glob("*.json"))]


def test_every_stage_ran_in_the_container(inside: Place, image: Path) -> None:
    found = records(inside)
    assert {record["stage"] for record in found} == {"prompts", "base", "rollouts", "grades"}
    assert {record["machine"]["environment"]["APPTAINER_CONTAINER"] for record in found} == {str(image)}


def test_a_stage_in_the_container_knows_the_revision_though_git_is_not_there(native: Place, inside: Place) -> None:
    outside = [record["code"] for record in records(native)]
    assert [record["code"] for record in records(inside)] == outside and outside[0]["commit"]


def test_the_native_run_did_not(native: Place) -> None:
    assert all("APPTAINER_CONTAINER" not in record["machine"]["environment"] for record in records(native))


def test_tables_and_weights_are_the_same_to_the_byte(native: Place, inside: Place) -> None:
    assert len(native.tables()) == 3 and inside.tables() == native.tables()
    weights = Path("checkpoints") / "base" / "model.safetensors"
    assert (inside.home / weights).read_bytes() == (native.home / weights).read_bytes()


def test_nothing_is_left_in_the_project_folder(inside: Place) -> None:
    assert {path.name for path in inside.folder.iterdir()} == {"results", ".snakemake", ".local"}
    assert {path.name for path in (inside.folder / ".local").rglob("*.py")} == {"sitecustomize.py", "usercustomize.py"}


def test_the_hosts_python_stays_outside(inside: Place, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = Path("/tmp") / f"{inside.folder.name}.poisoned"
    assert not mark.exists()
    seen = probe(inside, image, monkeypatch)
    assert seen["python"] == "/opt/venv/bin/python" and seen["prefix"] == "/opt/venv"
    assert all(seen[module].startswith("/opt/venv/") for module in ("torch", "vllm"))
    foreign = [
        p for p in seen["path"] if p and not p.startswith(("/opt/venv", "/usr/lib", "/usr/local/lib", str(ROOT)))
    ]
    assert foreign == [] and not seen["PYTHONHOME"]
    assert seen["container"] == str(image) and seen["system"].startswith('"Debian')
    assert not mark.exists()


def test_offline_is_the_default_and_variables_of_the_scheduler_get_in(
    inside: Place, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    seen = probe(inside, image, monkeypatch)
    assert seen["HF_HUB_OFFLINE"] == seen["HF_DATASETS_OFFLINE"] == "1"
    assert seen["CUDA_VISIBLE_DEVICES"] == "1,0"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert probe(inside, image, monkeypatch)["HF_HUB_OFFLINE"] == "0"


def probe(place: Place, image: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What Python sees when it is started as Snakemake starts a stage."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.user_home / ".cache"))
    config = load(place.config_file, place.experiment)
    arguments = container.apptainer_arguments([config], place.config_file, place.folder / "results", ROOT)
    command = [
        "apptainer",
        "exec",
        "--home",
        str(place.folder),
        *shlex.split(arguments),
        str(image),
        "python",
        "-c",
        PROBE,
    ]
    environment = place.environment() | {"CUDA_VISIBLE_DEVICES": "1,0", "PYTHONHOME": "/usr"}
    environment |= {key: os.environ[key] for key in container.OFFLINE if key in os.environ}
    done = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_finished_run_moves_into_the_container_without_computing_again(
    native: Place, inside: Place, image: Path, tmp_path: Path
) -> None:
    shutil.copytree(native.folder, tmp_path / "place", copy_function=shutil.copy2)
    place = Place(tmp_path / "place", inside.user_home, PATH=inside.own["PATH"])
    before = place.tables()
    with timed("SIF: four stages with nothing to do"):
        said = place.build(GRADES, "--container", str(image))
    assert "4 of 4 steps" in said and "Software environment definition has changed" in said
    for name in ("prompts-train", "base-base", "rollouts-train", "grades-train"):
        assert "nothing to do" in (place.home / "logs" / f"{name}.log").read_text()
    assert place.tables() == before


def test_vllm_generates_in_the_container_what_it_does_outside(inside: Place, native: Place, image: Path) -> None:
    for place, more in ((native, []), (inside, ["--container", str(image)])):
        with timed(f"{'SIF' if more else 'native'}: rollouts by vLLM"):
            place.build("results/micro/rollouts/train.parquet", *more, "--set", "rollouts.engine=vllm")
    assert inside.tables() == native.tables()
    found = next(record for record in records(inside) if record["stage"] == "rollouts")
    assert found["config"]["rollouts"]["engine"] == "vllm"
    assert found["machine"]["environment"]["APPTAINER_CONTAINER"] == str(image)
    assert {path.name for path in inside.folder.iterdir()} == {"results", ".snakemake", ".local"}


def test_stages_run_in_the_container_under_slurm(
    cluster: object, native: Place, image: Path, apptainer: Path, tmp_path: Path
) -> None:
    path = f"{Path(sys.executable).parent}:{apptainer.parent}:{os.environ['PATH']}"
    place = Place(tmp_path / "place", tmp_path, PATH=path)
    options = ["--container", str(image), "--profile", str(cluster.profile), "--set", "runtime.gpus=1"]  # type: ignore[attr-defined]
    with timed("SIF under SLURM: four stages"):
        place.build(GRADES, *options)
    found = {record["stage"]: record["machine"]["environment"] for record in records(place)}
    assert set(found) == {"prompts", "base", "rollouts", "grades"}
    assert all(where["APPTAINER_CONTAINER"] == str(image) and where["SLURM_JOB_ID"] for where in found.values())
    assert found["base"]["CUDA_VISIBLE_DEVICES"] in ("0", "1"), "the card that SLURM gave"
    weights = Path("checkpoints") / "base" / "model.safetensors"
    assert (place.home / weights).read_bytes() == (native.home / weights).read_bytes()


def test_settings_of_the_building_machine_are_not_in_the_image(image: Path, apptainer: Path) -> None:
    script = f"! grep -rIl {SENTINELS['PIP_TRUSTED_HOST']} /etc /root /run /opt/ziprc /.singularity.d"
    command = [apptainer, "exec", "--contain", "--no-home", image, "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_of_the_dockerfile_runs_a_stage(store: Store, native: Place, tmp_path: Path) -> None:
    prompts = Path("results") / "micro" / "prompts" / "train.parquet"
    made = store.buildah("from", store.tag)
    options = ["--config-file", str(native.config_file), "--experiment", "micro", "--name", "train"]
    mounts = ["--volume", f"{ROOT}:{ROOT}:ro", "--volume", f"{tmp_path}:{tmp_path}", "--workingdir", str(tmp_path)]
    mine = ["--env", f"PYTHONPATH={ROOT}", "--env", "PYTHONDONTWRITEBYTECODE=1"]
    with timed("Buildah: one stage"):
        store.buildah("run", *mounts, *mine, made, "--", "python", "-m", "ziprc", "run", "prompts", *options)
    assert (tmp_path / prompts).read_bytes() == (native.folder / prompts).read_bytes()
    seen = json.loads(store.buildah("run", made, "--", "python", "-c", PROBE).splitlines()[-1])
    assert seen["prefix"] == "/opt/venv" and seen["HF_HUB_OFFLINE"] == "1" and seen["system"].startswith('"Debian')


def test_the_dockerfile_keeps_no_settings_of_the_building_machine(store: Store) -> None:
    assert SENTINELS["PIP_TRUSTED_HOST"] not in store.buildah("inspect", "--type", "image", store.tag)
    made = store.buildah("from", store.tag)
    script = f"! grep -rIl {SENTINELS['PIP_TRUSTED_HOST']} /etc /root /run /opt/ziprc"
    store.buildah("run", made, "--", "sh", "-c", script)


def test_the_kept_apptainer_names_no_checkout(apptainer: Path) -> None:
    """The one that unpacked it may be gone when another uses it."""
    if not apptainer.is_relative_to(cache()):
        pytest.skip("this machine has an Apptainer of its own")
    kept, here = apptainer.parent.parent, str(HERE.relative_to(ROOT))
    found = subprocess.run(["grep", "-rlF", f"/{here}/", kept], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, ""), found.stdout + found.stderr


def test_an_image_that_is_there_is_not_built_again(store: Store, image: Path, apptainer: Path) -> None:
    for own in (
        store.environment,
        {"BUILDER": "apptainer", "IMAGES": str(image.parent), "PATH": f"{apptainer.parent}:{os.environ['PATH']}"},
    ):
        answer = subprocess.run(
            [ROOT / "containers" / "build.sh"], env={**os.environ, **own}, capture_output=True, text=True
        )
        assert answer.returncode == 0 and "is there already" in answer.stdout, answer.stderr

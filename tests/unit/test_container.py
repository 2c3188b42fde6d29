"""Which image, and what Apptainer is told."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ziprc.config.load import Config, load
from ziprc.errors import UserError
from ziprc.workflow import container

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = ROOT / "containers"


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for key in ("HF_HOME", *container.OFFLINE):
        monkeypatch.delenv(key, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def apptainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A command of that name, which nobody runs here."""
    tool = tmp_path / "bin" / "apptainer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}")
    return tool


def arguments(config: Config, results: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """(flags, variables, bound folders) as Apptainer would read them."""
    words = shlex.split(container.apptainer_arguments([config], ROOT / "config.yaml", results, ROOT))
    flags = [word for word in words if word.startswith("--") and word not in ("--env", "--bind")]
    variables = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--env")
    return flags, variables, [words[i + 1] for i, word in enumerate(words) if word == "--bind"]


@pytest.mark.parametrize("accelerator", container.ACCELERATORS)
def test_the_name_follows_from_definition_steps_and_lock(accelerator: str, tmp_path: Path) -> None:
    copy = tmp_path / "containers"
    shutil.copytree(CONTAINERS, copy, ignore=shutil.ignore_patterns("images"))
    before = container.image_name(copy, accelerator)
    assert before == container.image_name(CONTAINERS, accelerator)
    other = ({"cpu", "cuda"} - {accelerator}).pop()
    for file, counts in [
        ("README.md", False), (f"requirements/{other}.txt", False), ("ziprc.def", True), ("install.sh", True),
        (f"requirements/{accelerator}.txt", True),
    ]:  # fmt: skip
        was = container.image_name(copy, accelerator)
        with open(copy / file, "a") as handle:
            handle.write("# a change\n")
        assert (container.image_name(copy, accelerator) != was) == counts, file


def test_the_build_script_gives_the_same_name(tmp_path: Path, apptainer: Path) -> None:
    image = tmp_path / "images" / container.image_name(CONTAINERS, "cpu")
    image.parent.mkdir()
    image.touch()
    environment = {"PATH": f"{apptainer.parent}:/usr/bin:/bin", "BUILDER": "apptainer", "IMAGES": str(image.parent)}
    answer = subprocess.run([CONTAINERS / "build.sh"], env=environment, capture_output=True, text=True)
    assert f"{image} is there already" in answer.stdout, answer.stderr


def test_without_a_builder_the_script_says_what_to_install(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    answer = subprocess.run([CONTAINERS / "build.sh"], env={"PATH": str(tools)}, capture_output=True, text=True)
    assert (
        answer.returncode == 2 and "Install Apptainer" in answer.stderr and "Docker, Podman or Buildah" in answer.stderr
    )


def test_a_missing_image_says_how_to_build_it(apptainer: Path) -> None:
    with pytest.raises(UserError, match=r"ziprc-cuda-\w{12}\.sif.*make image BUILDER=apptainer ACCELERATOR=cuda"):
        container.find_image("auto", _bare(apptainer), gpus=2)
    with pytest.raises(UserError, match="ACCELERATOR=cpu"):
        container.find_image("auto", _bare(apptainer), gpus=0)
    with pytest.raises(UserError, match=r"no container image .*mine\.sif"):
        container.find_image("mine.sif", ROOT, gpus=0)


def _bare(tool: Path) -> Path:
    """A project folder with the definitions and no image."""
    root = tool.parent.parent / "project"
    if not root.exists():
        shutil.copytree(CONTAINERS, root / "containers", ignore=shutil.ignore_patterns("images"))
    return root


def test_an_image_of_ones_own_is_taken_as_it_is(apptainer: Path, tmp_path: Path) -> None:
    image = tmp_path / "mine.sif"
    image.touch()
    assert container.find_image(str(image), ROOT, gpus=8) == image


def test_without_apptainer_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = tmp_path / "mine.sif"
    image.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="takes Apptainer"):
        container.find_image(str(image), ROOT, gpus=0)


def test_a_space_in_the_path_is_refused(apptainer: Path, tmp_path: Path) -> None:
    image = tmp_path / "my image.sif"
    image.touch()
    with pytest.raises(UserError, match="has a space"):
        container.find_image(str(image), ROOT, gpus=0)


def test_a_linked_results_folder_is_bound_where_it_really_is(tmp_path: Path) -> None:
    disk = tmp_path / "other-disk"
    disk.mkdir()
    (tmp_path / "results").symlink_to(disk)
    _, _, bound = arguments(Config(), tmp_path / "results")
    assert str(disk) in bound and str(ROOT) in bound


def test_gpus_are_passed_on_when_there_are_any(tmp_path: Path) -> None:
    cuda = Config(runtime=Config().runtime.model_copy(update={"gpus": 2}))
    assert arguments(Config(), tmp_path)[0] == []
    assert arguments(cuda, tmp_path)[0] == ["--nv"]


def test_offline_is_the_default_and_the_user_may_say_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [arguments(Config(), tmp_path)[1][key] for key in container.OFFLINE] == ["1", "1"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert [arguments(Config(), tmp_path)[1][key] for key in container.OFFLINE] == ["0", "1"]


def test_caches_are_outside_the_project_and_code_comes_from_it(tmp_path: Path, caches: Path) -> None:
    _, variables, bound = arguments(Config(), tmp_path / "results")
    assert variables["PYTHONPATH"] == str(ROOT)
    for key in container.CACHES:
        folder = Path(variables[key])
        assert folder.is_relative_to(caches) and folder.is_dir()
        assert any(folder.is_relative_to(outer) for outer in bound)


def test_the_hub_cache_is_the_hosts(tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments(Config(), tmp_path)[1]["HF_HOME"] == str(caches / "huggingface")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    _, variables, bound = arguments(Config(), tmp_path / "results")
    assert variables["HF_HOME"] == str(tmp_path / "hub") and str(tmp_path / "hub") in bound


def test_a_local_model_is_bound_too(tmp_path: Path) -> None:
    model = tmp_path / "elsewhere" / "model"
    model.mkdir(parents=True)
    config = load(ROOT / "config.yaml", "smoke", [f"base.model={model}"])
    assert str(model) in arguments(config, tmp_path / "results")[2]


def test_a_folder_that_cannot_be_bound_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="colon or comma"):
        arguments(Config(), tmp_path / "a:b")


def test_spaces_and_quotes_survive_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / "it's $HOME here"
    folder.mkdir()
    assert str(folder) in arguments(Config(), folder)[2]

"""The command line that starts a stage, on one node and on several."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from ziprc.cli import parser
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.store.layout import Layout
from ziprc.systems import graph_of
from ziprc.workflow.call import call_to_the_end
from ziprc.workflow.launch import first_line, meeting_port, one_process, one_process_environment, root_of, stage_command

CONFIG = root_of(Path(__file__)) / "config.yaml"


def command(stage: str, *more: str, base: str = "scratch", **runtime: object) -> str:
    named = ["--name", "x", "--experiment", "smoke", "--config-file", str(CONFIG), "--threads", "6"]
    config = Config.model_validate({"base": {"model": base}, "runtime": runtime})
    return " ".join(
        stage_command(
            parser().parse_args(["run", stage, *named, *more]), graph_of(config, Layout(Path("results"), "smoke"))
        )[0]
    )


def test_one_node_starts_a_process_for_each_gpu() -> None:
    assert "ddp.yaml --num_processes 4 --main_process_port 0" in command("base", accelerate="ddp", gpus=4)
    assert "accelerate" not in command("base", accelerate="single", gpus=1)


def accelerates_own(profile: Path) -> dict[str, str]:
    """The environment in which accelerate's launcher would start one process."""
    arguments = ["--config_file", str(profile), "--num_cpu_threads_per_process", "6", "-m", "stage"]
    settings, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    return prepare_simple_launcher_cmd_env(settings)[1]


def test_one_process_starts_as_accelerate_would_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("ACCELERATE", "KMP"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    alone = [p for p in sorted((CONFIG.parent / "profiles" / "accelerate").glob("*.yaml")) if one_process(p)]
    assert [profile.stem for profile in alone] == ["cpu", "single"]
    for profile in alone:
        assert {**os.environ, **(one_process_environment(profile) or {})} == accelerates_own(profile)


def test_settings_that_only_accelerate_knows_are_left_to_its_launcher(tmp_path: Path) -> None:
    profile = tmp_path / "compiled.yaml"
    profile.write_text(
        (CONFIG.parent / "profiles/accelerate/cpu.yaml").read_text() + "dynamo_config: {dynamo_backend: INDUCTOR}\n"
    )
    assert one_process(profile) and one_process_environment(profile) is None


def test_several_nodes_get_one_launcher_each_from_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    started = command("train_joint", accelerate="ddp", gpus=8, nodes=4)
    assert started.startswith("srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=6")
    assert "ziprc.cli run train_joint --threads 6 --rendezvous " in started and "--experiment smoke" in started


def test_jobs_meet_at_different_free_ports_that_linux_hands_to_nobody() -> None:
    ports = [meeting_port(job) for job in (7, 5_007, 19_999)]
    assert len(set(ports)) == 3 and max(ports) < 32_768
    with socket.socket() as taken:
        taken.bind(("", ports[0]))
        assert meeting_port(7) > ports[0]


def test_a_node_without_a_free_port_says_which_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(self: socket.socket, address: tuple[str, int]) -> None:
        raise OSError("Address already in use")

    monkeypatch.setattr(socket, "socket", type("Taken", (socket.socket,), {"bind": taken}))
    with pytest.raises(UserError, match=r"12007 to 12106 of .* a new job looks in another range"):
        meeting_port(7)


def test_a_launcher_knows_its_rank_and_the_number_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NODEID", "2")
    launched = command("base", "--rendezvous", "n1:2000", accelerate="fsdp", gpus=8, nodes=4)
    assert "--num_machines 4 --machine_rank 2 --num_processes 32" in launched
    assert "--main_process_ip n1 --main_process_port 2000 --rdzv_backend static" in launched
    by_hand = command("base", "--rendezvous", "n1:2000", "--machine-rank", "0", accelerate="fsdp", gpus=8, nodes=4)
    assert "--machine_rank 0" in by_hand


def test_stages_that_do_not_train_stay_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert "srun" not in command("rollouts", accelerate="ddp", gpus=8, nodes=4)


def test_a_base_model_that_is_only_copied_is_copied_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    copied = command("base", base="some/model", accelerate="ddp", gpus=8, nodes=4)
    assert "srun" not in copied and "accelerate" not in copied


@pytest.mark.parametrize(
    "more, runtime, message",
    [
        ([], {"accelerate": "ddp", "gpus": 8}, "this is no SLURM job"),
        (["--rendezvous", "n1:2000", "--machine-rank", "0"], {"accelerate": "cpu"}, "needs several processes"),
        (["--rendezvous", "n1", "--machine-rank", "0"], {"accelerate": "cpus"}, "HOST:PORT"),
        (["--rendezvous", "n1:2000"], {"accelerate": "cpus"}, "number of this node, found None"),
    ],
)
def test_what_cannot_be_started_says_what_to_do(
    more: list[str], runtime: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        command("base", *more, nodes=2, **runtime)


def test_a_log_begins_with_where_the_stage_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    options = parser().parse_args(["run", "base", "--name", "base", "--experiment", "smoke", "--threads", "6"])
    assert first_line(options).endswith("base base: host n1, SLURM job 13, CUDA_VISIBLE_DEVICES 2,3, threads 6")


def test_rules_start_this_python_whatever_path_says(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert call_to_the_end(["sh", "-c", "command -v python"]) == 0
    assert Path(capfd.readouterr().out.strip()) == Path(sys.executable).parent / "python"

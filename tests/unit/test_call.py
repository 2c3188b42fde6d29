"""What a user writes reaches Snakemake and every stage as it was written, through all shells on the way."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from snakemake.cli import parse_config
from snakemake_interface_executor_plugins.utils import format_cli_arg

from ziprc.config.load import parse_override
from ziprc.errors import UserError
from ziprc.workflow.call import INTERRUPTED, Asked, call_to_the_end, packed, split_overrides
from ziprc.workflow.snakefile import Rules

HARD = {
    "experiments": ["toy", "7"],
    "config_file": "/a folder/with: $HOME {braces}/own's.yaml",
    "set": ["seed=3", 'prompts.settings.mix={"1 step, small": 1}', "a.b='it''s $HOME `date` \\ {x,y}'"],
    "systems": ["zip-rc"],
    "container": "/images/ziprc-cpu.sif",
}


@pytest.mark.parametrize(
    "text, overrides",
    [
        ("a.b=1 c=2", ["a.b=1", "c=2"]),
        ("  a.b=1\n c=2 ", ["a.b=1", "c=2"]),
        ('prompts.settings.mix={"1 step, small":1}', ['prompts.settings.mix={"1 step, small":1}']),
        ("edges=[0, 8, [1, 2]] seed=3", ["edges=[0, 8, [1, 2]]", "seed=3"]),
        ("a='x y' b=\"p ] q\" c=1", ["a='x y'", 'b="p ] q"', "c=1"]),
        ("a=it's b=1", ["a=it's", "b=1"]),
        ("a={k: 'x } y', l: 2} b=1", ["a={k: 'x } y', l: 2}", "b=1"]),
        ("", []),
    ],
)
def test_overrides_are_split_outside_of_quotes_and_brackets(text: str, overrides: list[str]) -> None:
    assert split_overrides(text) == overrides
    assert [again for one in overrides for again in split_overrides(one)] == overrides, (
        "splitting twice changes nothing"
    )


def test_a_value_that_is_no_yaml_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"a\.b"):
        parse_override("a.b=[0, 8")


def expected(settings: dict) -> Asked:
    lists = {key: tuple(settings[key]) for key in ("experiments", "systems")}
    return Asked(
        Path(settings["config_file"]), overrides=tuple(settings["set"]), container=settings["container"], **lists
    )


def test_settings_come_out_of_snakemake_as_they_went_in() -> None:
    assert Asked.of(parse_config(packed(HARD)), "/root") == expected(HARD)


def test_settings_survive_the_two_shells_of_a_slurm_job() -> None:
    """As the executor builds a job: `--config` is formatted again, and stands in double quotes for sbatch's --wrap."""
    inner = f"printf '%s\\n' {format_cli_arg('--config', packed(HARD))}"
    escaped = inner.replace('"', '\\"')
    said = subprocess.run(f'sh -c "{escaped}"', shell=True, capture_output=True, text=True, check=True).stdout
    flag, *entries = said.splitlines()
    assert flag == "--config" and Asked.of(parse_config(entries), "/root") == expected(HARD)


def test_somebody_who_calls_snakemake_by_hand_writes_plain_words() -> None:
    plain = Asked.of(parse_config(["experiment=micro", "config_file=/a/b.yaml", "set=base.tokens=2 seed=1"]), "/root")
    assert plain == Asked(Path("/a/b.yaml"), ("micro",), ("base.tokens=2", "seed=1"))
    assert Asked.of({}, "/root") == Asked(Path("/root/config.yaml"), ("toy",))


def test_the_prefix_of_a_rule_hands_settings_on_as_they_are() -> None:
    asked = expected(HARD)
    script = (
        Rules({"set": HARD["set"], "config_file": HARD["config_file"]}, "/root")
        .prefix.replace("{{", "{")
        .replace("}}", "}")
        + "printf '%s\\n' \"$@\""
    )
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == ["--config-file", str(asked.config_file), "--set", *asked.overrides]


def test_a_failure_after_ctrl_c_is_an_interruption(tmp_path: Path) -> None:
    assert call_to_the_end(["sh", "-c", f"kill -INT {os.getpid()}; sleep 0.2; exit 1"]) == INTERRUPTED
    assert call_to_the_end(["sh", "-c", "exit 1"]) == 1

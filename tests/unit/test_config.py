"""Strict keys, overlays, overrides, suites, the reference; and what counts as a change of code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ziprc.config import document
from ziprc.config.base import SYSTEMS, Tracker
from ziprc.config.load import load, suite, suites, task_module, tasks
from ziprc.errors import UserError
from ziprc.plan import code as code_module

ROOT = Path(__file__).resolve().parents[2]
CONTENT = """
defaults:
  seed: 1
  rollouts: {max_new_tokens: 64, sampling: {temperature: 0.7}}
experiments:
  plain:
  child: {extends: parent, seed: 3}
  parent: {seed: 2, rollouts: {max_new_tokens: 32}}
  ring: {extends: gnir}
  gnir: {extends: ring}
  typo: {train_joint: {ziprc: {learnin_rate: 1.0}}}
suites: {family: [child, parent], one: [plain]}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONTENT)
    return tmp_path / "config.yaml"


def test_an_experiment_lies_over_its_parent_and_the_defaults(path: Path) -> None:
    child = load(path, "child")
    assert (child.seed, child.rollouts.max_new_tokens, child.rollouts.sampling.temperature) == (3, 32, 0.7)
    assert load(path, "plain").rollouts.max_new_tokens == 64


def test_an_override_wins_and_changes_only_its_key(path: Path) -> None:
    config = load(path, "child", ["train_joint.ziprc.kl=25", "rollouts.sampling.temperature=1"])
    assert (config.train_joint.ziprc.kl, config.rollouts.sampling.temperature, config.seed) == (25, 1, 3)
    assert config.train_joint.noisy == load(path, "child").train_joint.noisy


@pytest.mark.parametrize("text", ["train_joint", "=3"])
def test_a_malformed_override_is_refused(path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"section\.key=value"):
        load(path, "plain", [text])


def test_an_override_whose_value_is_not_yaml_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"override 'prompts.settings=\{a: \[' is not valid YAML"):
        load(path, "plain", ["prompts.settings={a: ["])


def test_a_misspelt_key_names_itself_and_the_nearest(path: Path) -> None:
    with pytest.raises(UserError, match=r"'train_joint\.ziprc\.learnin_rate' \(did you mean 'learning_rate'\?\)"):
        load(path, "typo")
    with pytest.raises(UserError, match=r"'rolouts' \(did you mean 'rollouts'\?\)"):
        load(path, "plain", ["rolouts.dtype=auto"])


def test_an_unknown_experiment_names_the_nearest(path: Path) -> None:
    with pytest.raises(UserError, match=r"'chld' \(did you mean 'child'\?\)"):
        load(path, "chld")


def test_experiments_that_extend_in_a_circle_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match="ring → gnir → ring"):
        load(path, "ring")


@pytest.mark.parametrize(
    "value", ["grades.timeout_s=0", "values.folds=no", "rollouts.engine=tgi", "seed=.nan", "frontier.budgets=[0, 1]"]
)
def test_a_value_out_of_range_is_named_with_what_was_found(path: Path, value: str) -> None:
    key = value.partition("=")[0]
    with pytest.raises(UserError, match=rf"{key}(\.0)?: .*, found "):
        load(path, "plain", [value])


def test_every_problem_is_told_at_once(path: Path) -> None:
    with pytest.raises(UserError) as found:
        load(path, "typo", ["grades.timeout_s=0", "prompts.settings.mxi=1", "samples.policies=[foo]"])
    for key in ("train_joint.ziprc.learnin_rate", "grades.timeout_s", "prompts.settings.mxi", "samples.policies.0"):
        assert key in str(found.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts.settings.mxi={}", r"unknown key 'prompts\.settings\.mxi' \(did you mean 'mix'\?\)"),
        ("prompts.task=arithmetics", r"prompts\.task: there is no task 'arithmetics' \(did you mean 'arithmetic'\?\)"),
        ("samples.policies=[majorty]", r"samples\.policies\.0: .* found 'majorty' \(did you mean 'majority'\?\)"),
        ("systems=[zip_rc]", r"systems\.0: .* found 'zip_rc' \(did you mean 'zip-rc'\?\)"),
        ("grades.rule=exakt", r"grades\.rule: .* found 'exakt' \(did you mean 'exact'\?\)"),
        ("runtime.trackers=[wandbb]", r"runtime\.trackers\.0: .* found 'wandbb' \(did you mean 'wandb'\?\)"),
    ],
)
def test_what_would_fail_hours_later_is_refused_before_anything_runs(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(path, "plain", [override])


def test_settings_that_contradict_each_other_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match="max_new_tokens must be below"):
        load(path, "plain", ["rollouts.max_new_tokens=512"])
    with pytest.raises(UserError, match="at least one thinking or non-thinking sample"):
        load(path, "plain", ["rollouts.thinking_samples=0"])
    with pytest.raises(UserError, match="length_edges"):
        load(path, "plain", ["train_joint.length_edges=[0, 5, 5]"])


WRONG_SHAPES = [
    "a: [", "experiments: {a: {}}\nextra: 1", "[1]", "", "experiments: {a: 3}", "experiments: [a]",
    "defaults: 1\nexperiments: {a: }", "experiments: {a: }\nsuites: {s: a}", "experiments: {a: }\nsuites: {s: [b]}",
    "experiments: {a: }\nsuites: {s: []}",
]  # fmt: skip


@pytest.mark.parametrize("content", WRONG_SHAPES)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load(tmp_path / "c.yaml", "a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no configuration file .*none\.yaml"):
        load(tmp_path / "none.yaml", "a")


def test_a_suite_lists_its_experiments_of_a_system(path: Path) -> None:
    assert suites(path) == {"family": ["child", "parent"], "one": ["plain"]}
    assert [suite(path, "family", system) for system in (None, "all", "zip-rc")] == [["child", "parent"]] * 3


def test_an_unknown_suite_or_system_names_the_nearest(path: Path) -> None:
    with pytest.raises(UserError, match=r"no suite 'famly' \(did you mean 'family'\?\)"):
        suite(path, "famly")
    with pytest.raises(UserError, match=r"no system 'ziprc' \(did you mean 'zip-rc'\?\)"):
        suite(path, "family", "ziprc")


def test_a_file_is_parsed_once_however_many_experiments_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    plain = yaml.safe_load
    monkeypatch.setattr(yaml, "safe_load", lambda text: (parsed.append(text), plain(text))[1])
    file = tmp_path / "own.yaml"
    file.write_text("experiments: {a: {seed: 3}, b: {}}\n")
    assert [load(file, name).seed for name in ("a", "b", "a")] == [3, 0, 3] and len(parsed) == 1
    file.write_text("experiments: {a: {seed: 4}, b: {}}\n")
    assert load(file, "a").seed == 4 and len(parsed) == 2, "what is cached is the text"


def test_every_suite_of_the_repository_builds_something() -> None:
    found = suites(ROOT / "config.yaml")
    assert set(found) == {"smoke", "toy", "toy-countdown", "toy-predicted", "toy-vocabulary", "toy-rubric"}
    built = {
        name: {system for one in of for system in load(ROOT / "config.yaml", one).systems} for name, of in found.items()
    }
    assert built.pop("smoke") == set(SYSTEMS)
    one = {
        "toy": "zip-rc",
        "toy-countdown": "countdown-rl",
        "toy-predicted": "countdown-rl",
        "toy-vocabulary": "reasoning-vocabulary",
        "toy-rubric": "rubric",
    }
    assert built == {name: {system} for name, system in one.items()}
    for name, systems in built.items():
        assert all(suite(ROOT / "config.yaml", name, system) for system in systems)


# --- the reference --------------------------------------------------------------------------------------------------


def sections(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo, list[type[BaseModel]]]]:
    """Every key below a section: its path, its field, and the sections that it may hold."""
    for name, field in model.model_fields.items():
        options = (field.annotation, *get_args(field.annotation))
        held = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        yield above + name, field, held
        for inner in held:
            yield from sections(inner, f"{above}{name}.")


def every_key() -> list[tuple[str, FieldInfo, list[type[BaseModel]]]]:
    own = [key for name in tasks() for key in sections(task_module(name).Settings, f"prompts.settings of {name}.")]
    return [*sections(document.File), *own]


def test_every_key_says_what_it_means() -> None:
    keys = every_key()
    assert len(keys) > 150
    assert [path for path, field, held in keys if not (field.description or any(h.__doc__ for h in held))] == []


def numbers(schema: Any) -> Iterator[dict[str, Any]]:
    """Every number in a JSON schema, those in lists included."""
    if isinstance(schema, dict) and schema.get("type") in ("integer", "number"):
        yield schema
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from numbers(inner)


def test_every_number_has_a_range() -> None:
    found = list(numbers(document.file_schema()))
    assert len(found) > 90
    assert [each for each in found if not {"minimum", "exclusiveMinimum", "enum", "const"} & set(each)] == []


def test_the_reference_is_what_make_config_writes() -> None:
    for file, text in document.files().items():
        assert file.read_text() == text, f"{file.name} is out of date: run `make config`"


def test_the_schema_of_the_editors_knows_the_whole_file() -> None:
    schema = json.loads((ROOT / "docs" / "config.schema.json").read_text())
    for file in ("config.yaml", "tests/workflow/micro.yaml"):
        jsonschema.validate(yaml.safe_load((ROOT / file).read_text()), schema)
    wrong: list[dict[str, Any]] = [
        {"defaults": {"sede": 1}}, {"experiments": {"a": {"extend": "b"}}}, {"suites": {"a": "b"}}, {"other": 1},
        {"defaults": {"prompts": {"settings": {"mxi": {}}}}}, {"experiments": {"a": {"samples": {"policies": ["foo"]}}}},
    ]  # fmt: skip
    for content in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content, schema)


def test_trackers_are_those_of_the_trainer() -> None:
    assert set(get_args(Tracker)) == set(INTEGRATION_TO_CALLBACK)


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two modules: stages/rule.py imports core.py."""
    package = tmp_path / "ziprc"
    (package / "stages").mkdir(parents=True)
    (package / "stages" / "rule.py").write_text('"""Doc."""\nfrom ziprc.core import f\n\nf()\n')
    (package / "core.py").write_text('def f():\n    """Doc."""\n    return 1\n')
    (package / "other.py").write_text("x = 1\n")
    monkeypatch.setattr(code_module, "PACKAGE", package)
    return package


def digest() -> str:
    code_module.code_digest.cache_clear()
    code_module._parse.cache_clear()
    return code_module.code_digest("rule")


@pytest.fixture(autouse=True)
def _forget_digests() -> object:
    yield
    code_module.code_digest.cache_clear()
    code_module._parse.cache_clear()


def test_comments_docstrings_and_layout_are_no_change_of_code(code: Path) -> None:
    before = digest()
    (code / "core.py").write_text('# why\n\ndef f():\n    """Another."""\n\n    return (1)  # because\n')
    (code / "other.py").write_text("x = 2\n")
    assert digest() == before


def test_code_that_the_stage_reaches_counts(code: Path) -> None:
    before = digest()
    (code / "core.py").write_text("def f():\n    return 2\n")
    assert digest() != before

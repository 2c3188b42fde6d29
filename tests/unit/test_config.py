"""Strict keys, overlays, overrides; and what counts as a change of code."""

from __future__ import annotations

from pathlib import Path

import pytest

from ziprc.config.load import load
from ziprc.errors import UserError
from ziprc.plan import code as code_module

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


@pytest.mark.parametrize("value", ["grades.timeout_s=0", "values.folds=no", "rollouts.engine=tgi", "seed=.nan"])
def test_a_value_out_of_range_is_named_with_what_was_found(path: Path, value: str) -> None:
    key = value.partition("=")[0]
    with pytest.raises(UserError, match=rf"{key}: .*, found "):
        load(path, "plain", [value])


def test_settings_that_contradict_each_other_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match="max_new_tokens must be below"):
        load(path, "plain", ["rollouts.max_new_tokens=512"])
    with pytest.raises(UserError, match="at least one thinking or non-thinking sample"):
        load(path, "plain", ["rollouts.thinking_samples=0"])
    with pytest.raises(UserError, match="length_edges"):
        load(path, "plain", ["train_joint.length_edges=[0, 5, 5]"])


@pytest.mark.parametrize("content", ["a: [", "experiments: {a: {}}\nextra: 1", "[1]", ""])
def test_a_file_of_another_shape_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load(tmp_path / "c.yaml", "a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no configuration file .*none\.yaml"):
        load(tmp_path / "none.yaml", "a")


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

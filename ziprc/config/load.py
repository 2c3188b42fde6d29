"""Reading the configuration file."""

from __future__ import annotations

import copy
import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ziprc.config.base import SYSTEMS, merge
from ziprc.config.icl_v import ICLV
from ziprc.config.online import OnlineRL
from ziprc.config.rubric import RubricSections
from ziprc.config.shared import Prompts, Shared
from ziprc.config.vocabulary import ReasoningSections
from ziprc.config.zip_rc import ZipRC
from ziprc.errors import UserError, nearest


class Config(Shared, ZipRC, ICLV, OnlineRL, ReasoningSections, RubricSections):
    """A resolved experiment: the sections of every system, side by side. A new system adds its mixin to the bases."""


def load_yaml(path: Path) -> dict[str, Any]:
    """The parsed file: `defaults`, `experiments`, `suites`. UserError when it is not YAML or has another shape."""
    try:
        content = copy.deepcopy(_parsed(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    keys = set(content) if isinstance(content, dict) else set()
    if "experiments" not in keys or not keys <= {"defaults", "experiments", "suites"}:
        raise UserError(f"{path} must hold the keys 'defaults', 'experiments', 'suites' and nothing else.")
    for key in keys:
        content[key] = content[key] or {}
        if not isinstance(content[key], dict):
            raise UserError(f"{path}: '{key}' must be a mapping, found {content[key]!r}.")
    for name, own in content["experiments"].items():
        if own is not None and not isinstance(own, dict):
            raise UserError(f"{path}: experiment '{name}' must be a mapping of what it changes, found {own!r}.")
    for name, members in content.get("suites", {}).items():
        if not isinstance(members, list) or not members:
            raise UserError(f"{path}: suite '{name}' must be a list of experiments, found {members!r}.")
        for member in members:
            _require(member, content["experiments"], "experiment", f" (suite '{name}' of {path})")
    return content


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """The content of a file, which is asked for once for every experiment in it."""
    return yaml.safe_load(text)


def _require(name: Any, known: Mapping[str, Any] | Sequence[str], kind: str, where: str = "") -> None:
    if name not in list(known):
        raise UserError(f"There is no {kind} '{name}'{nearest(str(name), known)}{where}.")


def experiments(path: Path) -> list[str]:
    """Names of the experiments in a configuration file."""
    return list(load_yaml(path)["experiments"])


def suites(path: Path) -> dict[str, list[str]]:
    """Experiments of every suite in a configuration file."""
    return load_yaml(path).get("suites", {})


def suite(path: Path, name: str, system: str | None = None) -> list[str]:
    """Experiments of a suite; of one `system`, those that build it ("all" and None: every one).

    Raises UserError for names that do not exist, and when nothing is left.
    """
    known = suites(path)
    _require(name, known, "suite")
    if system is None or system == "all":
        return known[name]
    _require(system, [*SYSTEMS, "all"], "system")
    wanted = [experiment for experiment in known[name] if system in load(path, experiment).systems]
    if not wanted:
        raise UserError(f"{path}: no experiment of the suite '{name}' builds the system '{system}'.")
    return wanted


def _overlay(content: Mapping[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    _require(name, content["experiments"], "experiment")
    if name in seen:
        raise UserError(f"Experiments extend each other in a circle: {' → '.join((*seen, name))}.")
    own = dict(content["experiments"][name] or {})
    parent = own.pop("extends", None)
    low = _overlay(content, parent, (*seen, name)) if parent else content.get("defaults", {})
    return merge(low, own)


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` (value in YAML) as a nested dictionary."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"An override is written `section.key=value`, found '{text}'.")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"The value of the override '{text}' is not valid YAML: {problem}.") from None
    for key in reversed(path.strip().split(".")):
        nested = {key: nested}
    return nested


def load(path: Path, experiment: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve one experiment: defaults, overlays, then `overrides` such as `train_joint.ziprc.kl=25`.

    Raises one UserError that names every key that is wrong, task settings included, and the nearest known one when a
    name is misspelt.
    """
    resolved = _overlay(load_yaml(path), experiment)
    for text in overrides:
        resolved = merge(resolved, parse_override(text))
    problems = _task_problems(resolved.get("prompts"))
    try:
        config = Config.model_validate(resolved)
    except ValidationError as error:
        problems = _problems(error, Config) + problems
    if problems:
        raise UserError(f"{path}, experiment '{experiment}': {'; '.join(problems)}.")
    return config


def tasks() -> list[str]:
    """Modules of ziprc/tasks that are tasks. They are found, not listed, so that a new one changes no code here."""
    modules = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "tasks")])]
    return [name for name in modules if hasattr(task_module(name), "TASK")]


def task_module(name: str) -> Any:
    """What publishes a task's `Settings`, by name: this room is below the room of tasks."""
    return importlib.import_module(f"ziprc.tasks.{name}")


def _task_problems(prompts: Any) -> list[str]:
    """What is wrong with the name of the task or, as the task's own model says, with its settings."""
    own = prompts if isinstance(prompts, Mapping) else {}
    task, settings = own.get("task", Prompts().task), own.get("settings", {})
    if task not in tasks():
        return [f"prompts.task: there is no task '{task}'{nearest(str(task), tasks())}"]
    try:
        task_module(task).Settings.model_validate(settings)
    except ValidationError as error:
        return _problems(error, task_module(task).Settings, ("prompts", "settings"))
    return []


def _problems(error: ValidationError, model: type[BaseModel], above: tuple[str, ...] = ()) -> list[str]:
    """One line per wrong key of `model`, whose section lies at `above`."""
    lines = []
    for item in error.errors():
        where = ".".join(map(str, (*above, *item["loc"]))) or "settings"
        found = repr(item["input"])[:100]
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{where}'{nearest(str(item['loc'][-1]), _known_keys(model, item['loc'][:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"the key '{where}' is missing")
        elif item["type"] == "literal_error":
            choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
            lines.append(f"{where}: no such choice, found {found}{nearest(str(item['input']), choices)}")
        else:
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}, found {found}")
    return lines


def _known_keys(model: Any, location: Sequence[str | int]) -> list[str]:
    """Keys of the section at `location`, for the hint in an error."""
    for part in location:
        info = getattr(model, "model_fields", {}).get(part)
        options = [info.annotation, *getattr(info.annotation, "__args__", ())] if info else []
        model = next((option for option in options if hasattr(option, "model_fields")), None)
    return list(getattr(model, "model_fields", {}))

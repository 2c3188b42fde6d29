"""Reading the configuration file."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from ziprc.config.base import Runtime, Section
from ziprc.config.shared import Base, Evaluate, Grades, Prompts, Report, Rollouts
from ziprc.config.zip_rc import Baselines, Calibration, Frontier, Introspection, Samples, TrainJoint, Values
from ziprc.errors import UserError, nearest

SCIENCE = (
    "prompts",
    "base",
    "rollouts",
    "grades",
    "train_joint",
    "values",
    "introspection",
    "baselines",
    "calibration",
    "frontier",
    "samples",
    "evaluate",
    "report",
)


class Config(Section):
    """A resolved experiment."""

    seed: int = 0
    systems: tuple[str, ...] = ("zip-rc",)
    prompts: Prompts = Prompts()
    base: Base = Base()
    rollouts: Rollouts = Rollouts()
    grades: Grades = Grades()
    train_joint: TrainJoint = TrainJoint()
    values: Values = Values()
    introspection: Introspection = Introspection()
    baselines: Baselines = Baselines()
    calibration: Calibration = Calibration()
    frontier: Frontier = Frontier()
    samples: Samples = Samples()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _responses_fit(self) -> Config:
        if self.rollouts.max_new_tokens >= self.rollouts.max_model_len:
            raise ValueError(
                "rollouts.max_new_tokens must be below rollouts.max_model_len, which counts the prompt too"
            )
        if self.rollouts.thinking_samples + self.rollouts.non_thinking_samples < 1:
            raise ValueError("rollouts needs at least one thinking or non-thinking sample per training prompt")
        return self


def load_yaml(path: Path) -> dict[str, Any]:
    """The parsed file; UserError with line and column when it is not YAML."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or set(content) - {"defaults", "experiments"} or "experiments" not in content:
        raise UserError(f"{path} must hold the keys 'defaults' and 'experiments' and nothing else.")
    return content


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` laid over `low`, key by key; lists are replaced. Neither input changes."""
    out = copy.deepcopy(dict(low))
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else copy.deepcopy(value)
    return out


def experiments(path: Path) -> list[str]:
    """Names of the experiments in a configuration file."""
    return list(load_yaml(path)["experiments"])


def _overlay(content: Mapping[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if name not in content["experiments"]:
        raise UserError(f"There is no experiment '{name}'{nearest(name, content['experiments'])}.")
    if name in seen:
        raise UserError(f"Experiments extend each other in a circle: {' → '.join((*seen, name))}.")
    own = dict(content["experiments"][name] or {})
    parent = own.pop("extends", None)
    low = _overlay(content, parent, (*seen, name)) if parent else content.get("defaults") or {}
    return merge(low, own)


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` (value in YAML) as a nested dictionary."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"An override is written `section.key=value`, found '{text}'.")
    nested: Any = yaml.safe_load(value)
    for key in reversed(path.strip().split(".")):
        nested = {key: nested}
    return nested


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Keys of the section at `location`, for the hint in an error."""
    model: Any = Config
    for part in location:
        info = getattr(model, "model_fields", {}).get(part)
        if info is None:
            break
        options = [
            a for a in (info.annotation, *getattr(info.annotation, "__args__", ())) if hasattr(a, "model_fields")
        ]
        model = options[0] if options else None
    return list(getattr(model, "model_fields", {}))


def _explain(error: ValidationError, name: str, path: Path) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{where}'{nearest(str(item['loc'][-1]), _known_keys(item['loc'][:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"the key '{where}' is missing")
        else:
            lines.append(f"{where or 'settings'}: {item['msg']}, found {item['input']!r}"[:300])
    return f"{path}, experiment '{name}': " + "; ".join(lines) + "."


def load(path: Path, experiment: str, overrides: Sequence[str] = ()) -> Config:
    """Resolve one experiment: defaults, overlays, then `overrides` such as `train_joint.ziprc.kl=25`.

    Raises UserError naming the key, and the nearest known one when it is misspelt.
    """
    resolved = _overlay(load_yaml(path), experiment)
    for text in overrides:
        resolved = merge(resolved, parse_override(text))
    try:
        return Config.model_validate(resolved)
    except ValidationError as error:
        raise UserError(_explain(error, experiment, path)) from None


def science(config: Config, section: str) -> dict[str, Any]:
    """The params of a rule: its own section, JSON-like, plus the run seed."""
    return {"seed": config.seed, **getattr(config, section).model_dump(mode="json")}

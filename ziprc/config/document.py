"""The reference of all keys, `docs/config.md`, and the schema by which editors check config.yaml; `make config` writes both.

Both are made of one thing, the JSON schema that pydantic derives from the sections, and a test holds the files to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ziprc.config.base import Section
from ziprc.config.load import Config, task_module, tasks

DOCS = Path(__file__).parents[2] / "docs"
HEAD = """# Every key of config.yaml

Written by `make config` from `ziprc/config/`; edit the descriptions there. `config.yaml` holds `defaults`, named
`experiments` that change some keys of them (`extends: NAME` builds on another experiment) and `suites`, lists of experiments.
A default here is what a key is when `config.yaml` does not give it. Keys under `runtime` never trigger a rebuild; every other
key reruns what reads it. For one run: `make all SET="rollouts.test_samples=4"`."""
TYPES = {"integer": "whole number", "number": "number", "boolean": "yes or no", "string": "text", "object": "mapping"}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "multiple of"}

Schema = dict[str, Any]


class Experiment(Config):
    """What an experiment changes."""

    extends: str | None = Field(None, description="the experiment that this one builds on; null: the defaults")


class File(Section):
    """config.yaml."""

    defaults: Config = Field(Config(), description="what holds for every experiment")
    experiments: dict[str, Experiment | None] = Field(description="what each experiment changes")
    suites: dict[str, list[str]] = Field({}, description="lists of experiments that are built together")


def file_schema() -> Schema:
    """JSON schema of config.yaml. Nothing is required in it, for overlays add up; task settings are any known task's."""
    whole = File.model_json_schema()
    prompts = whole["$defs"]["Prompts"]["properties"]
    prompts["task"]["enum"] = tasks()
    prompts["settings"]["anyOf"] = [{"$ref": f"#/$defs/{name}-settings"} for name in tasks()]
    for name in tasks():
        own = task_module(name).Settings.model_json_schema()
        whole["$defs"] |= own.pop("$defs", {}) | {f"{name}-settings": own}
    return whole


def _for_editors(node: Any) -> Any:
    """Without pydantic's titles, the lists of required keys, and the defaults of whole sections."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    noise = {"title": str, "required": list, "default": dict}
    return {k: _for_editors(v) for k, v in node.items() if not isinstance(v, noise.get(k, ()))}


def _resolve(field: Schema) -> tuple[Schema, str]:
    """A key's schema without its null, and the name of the section that it holds ('' for a plain value)."""
    options = [field] if "type" in field else field.get("anyOf", [field])
    inner = next(option for option in options if option.get("type") != "null")
    return inner, inner.get("$ref", "").rpartition("/")[2]


def _items(inner: Schema) -> Schema:
    """What a list holds, or else the value itself."""
    return inner.get("items") or inner.get("prefixItems", [inner])[0]


def _type(field: Schema) -> str:
    inner, section = _resolve(field)
    item = _items(inner)
    name = "section" if section else "choice" if "enum" in item or "const" in item else TYPES[item["type"]]
    null = any(option.get("type") == "null" for option in field.get("anyOf", ()))
    return (f"list of {name}s" if item is not inner else name) + (" or null" if null else "")


def _range(field: Schema) -> str:
    inner, _ = _resolve(field)
    item = _items(inner)
    found = [" · ".join(f"`{choice}`" for choice in item.get("enum", [item.get("const")]) if choice)]
    found += [f"{sign} {item[key]:g}" for key, sign in LIMITS.items() if key in item]
    found += [f"at least {inner['minItems']}"] if inner.get("minItems") else []
    return ", ".join(filter(None, found))


def _default(field: Schema, own: Schema) -> str:
    """As in YAML; of a section, what differs from the section's own defaults."""
    if "default" not in field:
        return "" if own else "none, must be given"
    value = field["default"]
    if own and isinstance(value, dict):
        other = {k: v for k, v in value.items() if v != own["properties"][k].get("default", v)}
        return ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in other.items())
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _tables(path: str, schema: Schema, definitions: Mapping[str, Schema]) -> Iterator[str]:
    """The table of a section, then those of the sections in it, each once."""
    yield f"### {path}"
    yield " ".join(schema.get("description", "").split())
    rows = ["| key | type | default | range | what it means |", "|---|---|---|---|---|"]
    inside: dict[str, list[str]] = {}
    for key, field in schema.get("properties", {}).items():
        section = _resolve(field)[1]
        own = definitions.get(section, {})
        if section:
            inside.setdefault(section, []).append(f"{path.strip('`')}.{key}")
        says = field.get("description") or own.get("description", "")
        cells = (f"`{key}`", _type(field), _default(field, own), _range(field), says.replace("|", r"\|"))
        rows.append(f"| {' | '.join(cells)} |")
    yield "\n".join(rows) if len(rows) > 2 else ""
    for section, paths in inside.items():
        yield from _tables(", ".join(f"`{p}`" for p in paths), definitions[section], definitions)


def reference(whole: Schema) -> str:
    """docs/config.md: the table of every section, system by system, and of every task."""
    definitions = whole["$defs"]
    keys = definitions["Config"]["properties"]
    parts = [HEAD]
    for mixin in Config.__bases__:
        parts.append(f"## {(mixin.__doc__ or '').rstrip('.')}")
        plain = {name: keys[name] for name in mixin.model_fields if "$ref" not in keys[name]}
        parts += _tables("Keys outside any section", {"properties": plain}, definitions) if plain else []
        for name in (name for name in mixin.model_fields if name not in plain):
            parts += _tables(f"`{name}`", definitions[_resolve(keys[name])[1]], definitions)
    parts.append("## The tasks")
    for task in tasks():
        parts += _tables(f"`prompts.settings` of {task}", definitions[f"{task}-settings"], definitions)
    return "\n\n".join(filter(None, parts)) + "\n"


def files() -> dict[Path, str]:
    """What `make config` writes."""
    whole = file_schema()
    schema = json.dumps(_for_editors(whole), indent=1, ensure_ascii=False) + "\n"
    return {DOCS / "config.md": reference(whole), DOCS / "config.schema.json": schema}


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"config: wrote {path}")

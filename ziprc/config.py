"""The configuration: one strict pydantic model per rule, defaults first, named experiments as overlays.

`config.yaml` holds `defaults` and `experiments`. An experiment names only what differs, and may `extend` another.
Every section but `runtime` is science: it changes results and is handed to its rule as params. `runtime` (devices,
batch per device, workers, memory share, trackers) never triggers a rebuild. Imports no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ziprc.errors import UserError, nearest


class Section(BaseModel):
    """Strict: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(Section):
    """What is asked. `settings` belong to the task; counts are prompts per split."""

    task: str = "arithmetic"
    settings: dict[str, Any] = {}
    train: int = Field(1000, ge=1)
    validation: int = Field(200, ge=1, description="prompts on which samplers are calibrated")
    test: int = Field(200, ge=1)


class Architecture(Section):
    """A small Qwen3."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024
    vocab_size: int = Field(384, description="rows of the output matrix, reserved ones included")
    merges: int = Field(40, description="byte-pair merges learned on the task's words")


class Base(Section):
    """The policy to start from: a Hub id or local folder, or `scratch` to train one on the task's traces."""

    model: str = "scratch"
    revision: str | None = None
    architecture: Architecture = Architecture()
    tokens: int = Field(1_000_000, ge=1000, description="training tokens, prompts included")
    batch_tokens: int = Field(2048, ge=64)
    learning_rate: float = Field(5e-3, gt=0)
    adamw_learning_rate: float = Field(3e-3, gt=0, description="for embeddings and norms, next to Muon")
    warmup: float = Field(0.02, ge=0, lt=1)


class Sampling(Section):
    """Sampling settings of one policy."""

    temperature: float = Field(1.0, ge=0)
    min_p: float = Field(0.1, ge=0, le=1)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps every token")


class Rollouts(Section):
    """Responses per prompt and how they are sampled."""

    engine: Literal["vllm", "hf"] = "vllm"
    sampling: Sampling = Sampling()
    max_model_len: int = Field(512, ge=16, description="prompt and response tokens together")
    max_new_tokens: int = Field(256, ge=1, description="cap on the response")
    thinking_samples: int = Field(2, ge=0, description="per training prompt")
    non_thinking_samples: int = Field(0, ge=0, description="per training prompt")
    test_samples: int = Field(8, ge=1, description="per test prompt")
    test_thinking: bool = True
    many_prompts: int = Field(64, ge=1, description="test prompts that get many rollouts, for the empirical joint")
    many_samples: int = Field(64, ge=1)
    pool_samples: int = Field(8, ge=1, description="per prompt of a pool: what adaptive samplers are replayed on")
    pool_prompts: int | None = Field(None, ge=1, description="prompts of a pool, the first ones; empty: all of them")
    shard_prompts: int = Field(512, ge=1, description="prompts per shard: what is kept after a kill")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"


class Judge(Section):
    """An LLM judge that gives an anchored Yes/No verdict."""

    model: str
    revision: str | None = None
    max_model_len: int = 32768
    max_new_tokens: int = 256
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    max_unparseable: float = Field(
        0.05, ge=0, le=1, description="a larger share of unreadable verdicts fails the stage"
    )


class Grades(Section):
    """Is the answer right? The rule grader first; the judge, if there is one, for what the rule cannot settle."""

    rule: Literal["exact", "math", "countdown", "none"] = "exact"
    timeout_s: float = Field(5.0, gt=0)
    judge: Judge | None = None


Unit = Annotated[float, Field(ge=0, le=1)]


def _increasing(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError("must increase strictly")
    return values


Increasing = AfterValidator(_increasing)


class Head(Section):
    """One joint head: its label, its loss and its optimiser."""

    label: Literal["score", "value"] = "score"
    reward_centres: Annotated[tuple[Unit, ...], Field(min_length=2), Increasing] = (0.0, 1.0)
    kl: float = Field(0.0, ge=0, description="weight of KL(reference || model) over the rows outside the slice")
    kl_form: Literal["exact", "top_k", "legacy_top32"] = "exact"
    kl_top_k: int = Field(64, ge=1)
    trainable: Literal["all", "slice"] = "all"
    unfinished: Literal["zero", "ignore", "drop"] = Field(
        "zero", description="score of a capped response: 0, marginalised over, or the rollout left out"
    )
    censored: Literal["survival", "as_observed"] = "survival"
    legacy_off_by_one: bool = False
    epochs: float = Field(2.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    batch_size: int = Field(128, ge=1, description="rollouts per optimiser step, over all devices")
    max_length: int = Field(32768, ge=2, description="inputs are cut here; labels come from the whole rollout")
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(3e-5, gt=0)
    adamw_learning_rate: float | None = Field(
        None, description="for embeddings and norms next to Muon; default: the same"
    )
    warmup: float = Field(0.05, ge=0, lt=1)
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, gt=0)


class TrainJoint(Section):
    """The joint heads: `noisy` (intermediate, on scores), `ziprc` (final, on values), `lite` (only the reserved rows)."""

    length_edges: Annotated[tuple[int, ...], Field(min_length=3), Increasing] = (
        0,
        256,
        512,
        1024,
        2048,
        4096,
        8192,
        16384,
        32768,
    )
    first_row: int | None = Field(None, description="first reserved row; empty: the first that no token uses")
    thinking_only: bool = False
    noisy: Head = Head()
    ziprc: Head = Head(label="value", reward_centres=(0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1), kl=10.0)
    lite: Head | None = None


class Values(Section):
    """Scalar value of a rollout: the mean expected score over its last labelled states."""

    last_k: int = Field(512, ge=1)
    folds: int = Field(2, ge=1, description="critics are cross-fitted over this many folds of prompts; 1: in sample")


class Introspection(Section):
    """The joint, the emitted token's log-probability and the entropy at every labelled state."""

    dtype: Literal["float32", "bfloat16"] = "float32"


class Baselines(Section):
    """Honest competitors, fitted on the head's own training rollouts."""

    probe_hidden: int = Field(64, ge=0, description="hidden units of the probe on frozen states; 0: linear")
    probe_epochs: int = Field(20, ge=1)
    window: int = Field(8, ge=1, description="tokens of the windowed log-probability")


class Calibration(Section):
    """What is fitted on validation prompts for the samplers. Its data are the pool `validation-ziprc`."""


class Frontier(Section):
    """Replays of samplers. Each family's settings are chosen on validation prompts at every budget."""

    budgets: Annotated[tuple[float, ...], Field(min_length=1), Increasing] = (1.5, 2, 3, 4, 6, 8, 12, 16)
    orders: int = Field(2, ge=1, description="orders in which the test pool is replayed; half of it for validation")
    branches: int = Field(24, ge=1, description="most branches of one prompt; the size of the pool is a limit too")
    prices: int = Field(10, ge=2, description="settings of zip-rc-plus, from the highest to the lowest price")
    highest_price: float = Field(0.03, gt=0, description="probability of a right answer per token")
    lowest_price: float = Field(2e-5, gt=0)
    intervals: Annotated[tuple[int, ...], Field(min_length=1), Increasing] = (8, 16)
    alphas: tuple[Unit, ...] = (0.1, 1.0)
    betas: tuple[Annotated[float, Field(ge=0)], ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    published_samples: int = Field(8, ge=1, description="most samples of the published policy")
    window: int = Field(16, ge=1, description="readings of the joint that are averaged, where smoothing is tried")
    calibrated: bool = Field(False, description="whether the published policy reads the calibrated joint")
    cost_alpha: Unit = Field(0.1, description="of the paper's normalised cost")
    bootstrap: int = Field(1000, ge=10)
    confidence: float = Field(0.95, gt=0, lt=1)


class Samples(Section):
    """Live runs on the engine, with the settings that `frontier` chose."""

    policies: tuple[str, ...] = ("zip-rc-plus", "zip-rc-plus-branching", "zip-rc", "majority")
    budgets: Annotated[tuple[float, ...], Field(min_length=1), Increasing] = (2, 4)
    majority_budgets: Annotated[tuple[float, ...], Field(min_length=1), Increasing] = Field(
        (2, 4, 16), description="of the plain vote, which needs more for the same accuracy"
    )
    prompts: int | None = Field(None, ge=1, description="the first test prompts; empty: all")
    branches: int = Field(24, ge=1, description="most branches of one prompt")
    max_tokens: int | None = Field(None, ge=2, description="most tokens of one prompt, a hard limit")
    max_latency: int | None = Field(None, ge=2, description="most serial decoding steps of one prompt, a hard limit")
    in_flight: int = Field(256, ge=1, description="prompts at a time")
    one_at_a_time: int = Field(0, ge=0, description="prompts that are also timed alone, one after the other")


class Evaluate(Section):
    """What the numbers mean. Intervals are bootstrapped over prompts."""

    bootstrap: int = Field(1000, ge=10)
    confidence: float = Field(0.95, gt=0, lt=1)
    ece_bins: int = Field(10, ge=2)
    last_k: int = Field(8, ge=1, description="states averaged at the end of a response")


class Report(Section):
    """The page."""

    rollouts_shown: int = Field(6, ge=0)


class Runtime(Section):
    """Never triggers a rebuild."""

    accelerate: str = Field("cpu", description="profiles/accelerate/<name>.yaml for training")
    workers: int = Field(1, ge=1, description="data-parallel engine processes")
    tensor_parallel: int = Field(1, ge=1)
    judge_tensor_parallel: int = Field(1, ge=1)
    max_num_seqs: int = Field(256, ge=1, description="responses in flight per engine")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_gib: int = Field(1, ge=1, description="of a CPU engine")
    enforce_eager: bool = True
    stall_limit_s: float = Field(900, gt=0, description="an engine whose step takes longer is ended, with a reason")
    rollouts_per_device: int = Field(16, ge=1, description="micro-batch; accumulation follows from batch_size")
    forward_tokens: int = Field(16384, ge=64, description="tokens per forward pass when states are read")
    position_chunk: int = Field(1024, ge=1, description="states per chunk of the KL")
    bf16: bool = Field(False, description="autocast; master weights stay float32")
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    save_steps: int = Field(100, ge=1, description="steps between training states kept for resuming")
    trackers: tuple[str, ...] = ()
    gpus: int = Field(0, ge=0, description="of one node; 0: every stage runs on the CPU")
    nodes: int = Field(1, ge=1, description="of a training stage; the others use one")
    mem_mb: int = Field(3000, ge=1, description="of a stage, per node; a retry asks for more")
    cpu_mem_mb: int | None = Field(None, ge=1, description="of a stage that needs no GPU; empty: mem_mb")
    runtime_min: int = 120


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


def head_names(config: Config) -> list[str]:
    """Checkpoints that `train_joint` makes: cross-fitted critics, the final head and, if asked for, the lite one."""
    return [*critics(config), "ziprc", *(["lite"] if config.train_joint.lite else [])]


def critics(config: Config) -> list[str]:
    """The intermediate checkpoints, one per fold."""
    return ["noisy"] if config.values.folds == 1 else [f"noisy-fold{i}" for i in range(config.values.folds)]


def head_of(config: Config, checkpoint: str) -> Head:
    """The settings of a checkpoint such as `noisy-fold1` or `ziprc`."""
    head = getattr(config.train_joint, checkpoint.partition("-")[0], None)
    if not isinstance(head, Head):
        raise UserError(f"There is no joint head '{checkpoint}'{nearest(checkpoint, head_names(config))}.")
    return head


def head_params(config: Config, checkpoint: str) -> dict[str, Any]:
    """Params of one head: what all heads share, and its own settings only."""
    shared = config.train_joint.model_dump(mode="json", exclude={"noisy", "ziprc", "lite"})
    folds = {"folds": config.values.folds} if checkpoint.startswith("noisy") else {}
    return {"seed": config.seed, **shared, **folds, **head_of(config, checkpoint).model_dump(mode="json")}


# Pools of recorded rollouts, on which adaptive samplers are replayed: calibrated on the first, judged on the second.
POOLS = ("validation-ziprc", "test-ziprc")

# What `rollouts/<name>` counts samples and prompts by; a name that is not here is a variant of `test`.
ROLLOUT_COUNTS: dict[str, tuple[str, ...]] = {
    "train": ("thinking_samples", "non_thinking_samples"),
    "test": ("test_samples", "test_thinking"),
    "test-many": ("many_prompts", "many_samples", "test_thinking"),
    **{pool: ("pool_prompts", "pool_samples", "test_thinking") for pool in POOLS},
}


def prompts_of(name: str) -> str:
    """The prompts table that `rollouts/<name>` and `grades/<name>` are about."""
    return next((split for split in ("train", "validation") if name.startswith(split)), "test")


def policy_of(config: Config, name: str) -> str:
    """The checkpoint that samples `rollouts/<name>`: a head that the name ends in (`test-ziprc`), else the base."""
    head = name.partition("-")[2]
    return head if head in head_names(config) else "base"


def introspected(name: str) -> tuple[str, str]:
    """What `introspection/<name>` reads: the rollouts table and the checkpoint. A head alone reads `test`."""
    return (name, name.partition("-")[2]) if name in POOLS else ("test", name)


def rollouts_params(config: Config, name: str) -> dict[str, Any]:
    """Params of `rollouts/<name>`: the sampling settings, and the counts that this table uses."""
    counts = ROLLOUT_COUNTS.get(name, ROLLOUT_COUNTS["test"])
    every = {key for keys in ROLLOUT_COUNTS.values() for key in keys}
    return {k: v for k, v in science(config, "rollouts").items() if k in counts or k not in every}


def params_of(config: Config, stage: str, name: str) -> dict[str, Any]:
    """What an artifact depends on besides its inputs and its code: the params of its rule, and of its manifest."""
    if stage == "train_joint":
        return head_params(config, name)
    if stage == "rollouts":
        return rollouts_params(config, name)
    prompts = config.prompts
    if stage == "prompts":
        return {
            "seed": config.seed,
            "task": prompts.task,
            "settings": prompts.settings,
            "count": getattr(prompts, name),
        }
    if stage == "samples":
        sampling = science(config, "rollouts")
        shared = {key: sampling[key] for key in ("engine", "sampling", "max_model_len", "max_new_tokens", "dtype")}
        return {**science(config, "samples"), **shared, "test_thinking": sampling["test_thinking"], "policies": name}
    if stage == "base" and config.base.model == "scratch":
        return {**science(config, "base"), "task": prompts.task, "settings": prompts.settings}
    return science(config, stage)

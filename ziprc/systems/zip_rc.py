"""ZIP-RC: critics, the joint heads, what they say at every token, and the samplers that act on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ziprc.config.load import Config
from ziprc.config.zip_rc import LIVE_POLICIES
from ziprc.errors import UserError
from ziprc.plan.stage import CHECKPOINT, TABLE, Ref, Stage, System, many, one
from ziprc.systems.shared import (
    BASE,
    SAMPLING,
    RolloutsOf,
    check_grades,
    engine_module,
    grader_modules,
    grading_keys,
    table,
    task_module,
    tested,
)

TRAIN = Ref("rollouts", "train")
POOLS = {"validation-ziprc": "validation", "test-ziprc": "test"}  # what samplers are replayed on: fitted, then judged
SHARED_HEAD = tuple(f"train_joint.{key}" for key in ("length_edges", "first_row", "thinking_only"))


@dataclass(frozen=True)
class HeadOf:
    """A joint head: its key in the section `train_joint`, where its labels come from, the fold (of how many) it must not see."""

    key: str
    labels: Ref
    fold: tuple[int, int] | None = None


@dataclass(frozen=True)
class ReadingOf:
    """Which rollouts are read with which head."""

    rollouts: str
    head: str


@dataclass(frozen=True)
class ValuesOf:
    """Whose values: with the critic of its own fold for prompts that critics were trained on, else by their mean."""

    rollouts: str
    cross_fitted: bool


LABELS = {  # what a head learns from
    "score": Ref("grades", "train"),
    "value": Ref("values", "train"),
    "critic": Ref("qvalues", "train"),
    "trie": Ref("qvalues", "train-trie"),
}


def head(name: str) -> Ref:
    return Ref("train_joint", name)


def critics(config: Config) -> dict[str, HeadOf]:
    """The intermediate heads, one per fold; `noisy` alone where nothing is cross-fitted."""
    folds = config.values.folds
    labels = _labels(config, "noisy")
    if folds == 1:
        return {"noisy": HeadOf("noisy", labels)}
    return {f"noisy-fold{i}": HeadOf("noisy", labels, (i, folds)) for i in range(folds)}


def judged_heads(config: Config) -> dict[str, HeadOf]:
    """The heads that are judged: `ziprc` and, if asked for, `lite` and rivals."""
    own = config.train_joint
    keys = {
        "ziprc": "ziprc",
        **({"lite": "lite"} if own.lite else {}),
        **{name: f"rivals.{name}" for name in own.rivals},
    }
    return {name: HeadOf(key, _labels(config, key)) for name, key in keys.items()}


def heads(config: Config) -> dict[str, HeadOf]:
    return critics(config) | judged_heads(config)


def _labels(config: Config, key: str) -> Ref:
    return LABELS[config.train_joint.head(key).label]


def check_rivals(config: Config) -> None:
    """UserError where a rival would be the same checkpoint as the one critic in context that there is without folds."""
    if "critic" in config.train_joint.rivals and config.train_critic.folds == 1:
        raise UserError(
            "train_joint.rivals: with train_critic.folds=1 'critic' is the checkpoint of train_critic. Name the rival otherwise."
        )


def rollouts(config: Config) -> dict[str, RolloutsOf]:
    """`test-many` for the empirical joint, `test-<head>` to see what training moved, and the pools."""
    own = config.rollouts
    many_counts, pool_counts = ("many_prompts", "many_samples"), ("pool_prompts", "pool_samples")

    def counted(prompts: str, policy: Ref, samples: int, counts: tuple[str, ...], limit: int | None) -> RolloutsOf:
        return RolloutsOf(prompts, policy, ((own.test_thinking, samples),), (*counts, "test_thinking"), limit)

    return {
        "test-many": counted("test", BASE, own.many_samples, many_counts, own.many_prompts),
        **{f"test-{name}": tested(config, head(name)) for name in heads(config)},
        **{
            pool: counted(split, head("ziprc"), own.pool_samples, pool_counts, own.pool_prompts)
            for pool, split in POOLS.items()
        },
    }


def readings(config: Config) -> dict[str, ReadingOf]:
    """A head alone reads the test rollouts of the base; a pool is read by the head that sampled it."""
    own = {name: ReadingOf("test", name) for name in judged_heads(config)}
    return own | {pool: ReadingOf(pool, "ziprc") for pool in POOLS}


def pool(name: str) -> dict[str, Ref]:
    """The tables that a pool of recorded rollouts is read from, by the split of its prompts and their kind."""
    split = POOLS[name]
    tables = {f"{split}/{kind}": Ref(kind, name) for kind in ("rollouts", "grades", "introspection")}
    return tables | {f"{split}/prompts": Ref("prompts", split)}


def head_params(config: Config, of: HeadOf) -> list[str]:
    folds = [] if of.fold is None else ["values.folds"]
    return ["seed", *SHARED_HEAD, *folds, f"train_joint.{of.key}"]


def samples_params(config: Config, policy: str) -> list[str]:
    budgets = "majority_budgets" if policy == "majority" else "budgets"
    own = (budgets, "prompts", "branches", "max_tokens", "max_latency", "in_flight", "one_at_a_time")
    keys = [f"samples.{key}" for key in own]
    return ["seed", *keys, *SAMPLING, "rollouts.test_thinking", "prompts.task", *grading_keys(config)]


def evaluated(config: Config) -> dict[str, Ref]:
    """Everything that metrics/zip-rc.json is made from, by role."""
    wanted = [
        *(("prompts", name) for name in ("test",)),
        *(("rollouts", name) for name in ("train", "test", "test-many", "test-ziprc")),
        *(("grades", name) for name in ("train", "test", "test-ziprc")),
        *(("values", name) for name in ("train", "test-many")),
        *(("introspection", name) for name in judged_heads(config)),
        ("baselines", "test"),
    ]
    tables = {role: ref for kind, name in wanted for role, ref in table(kind, name).items()}
    return tables | {"base": BASE} | {name: head(name) for name in judged_heads(config)}


def evaluate_params(config: Config) -> list[str]:
    """Whose answers are compared, and what it says about the training of the heads and of the base."""
    heads, said = judged_heads(config).values(), ("epochs", "max_steps", "batch_size")
    counted = [f"train_joint.{of.key}.{key}" for of in heads for key in said]
    return ["evaluate", "prompts.task", *counted, "train_joint.ziprc.unfinished", "base.model", "base.tokens"]


def shows(config: Config) -> dict[str, Ref]:
    tables = [table("introspection", "ziprc"), *(table(kind, "test") for kind in ("rollouts", "grades", "prompts"))]
    tables += [table("samples", policy) for policy in config.samples.policies]
    single = {"metrics/zip-rc": Ref("evaluate", "zip-rc"), "frontier": FRONTIER, "ziprc": head("ziprc")}
    return single | {role: ref for one in tables for role, ref in one.items()}


def live_modules(config: Config) -> list[str]:
    return [task_module(config), engine_module(config), *grader_modules(config)]


CALIBRATION, FRONTIER = Ref("calibration", "ziprc"), Ref("frontier", "frontier")
FITTED = {"checkpoint": head("ziprc"), "calibration": CALIBRATION}


def _values(config: Config) -> Mapping[str, ValuesOf]:
    return {"train": ValuesOf("train", True), "test-many": ValuesOf("test-many", False)}


STAGES = (
    Stage(
        "train_joint", "the joint head {name}", CHECKPOINT, heads,
        reads=lambda c, v: {"base": BASE, "rollouts": TRAIN, v.labels.stage: v.labels},
        params=head_params, machine="big-gpu", check=check_rivals, held_out=True,
    ),
    Stage(
        "values", "what the critics expect, {name}", TABLE, _values,
        reads=lambda c, v: {"rollouts": Ref("rollouts", v.rollouts)} | {name: head(name) for name in critics(c)},
        params=lambda c, v: ["values.last_k", *(["values.folds"] if v.cross_fitted else [])], machine="gpu",
    ),
    Stage(
        "introspection", "what {name} expects at every token", TABLE, readings,
        reads=lambda c, v: {"rollouts": Ref("rollouts", v.rollouts), "checkpoint": head(v.head)},
        params=lambda c, v: ["introspection.dtype"], machine="gpu",
    ),
    Stage(
        "baselines", "honest competitors, {name}", TABLE, one("test"),
        reads=lambda c, v: {"train": TRAIN, "grades": Ref("grades", "train"), "test": Ref("rollouts", v), "base": BASE},
        params=lambda c, v: ["seed", "baselines"], machine="gpu", held_out=True,
    ),
    Stage(
        "calibration", "what samplers of {name} need, fitted on validation prompts", f"{CHECKPOINT}/calibration.json",
        one("ziprc"), reads=lambda c, v: pool("validation-ziprc") | {"checkpoint": head(v)},
        params=lambda c, v: ["seed", "prompts.task"], uses=lambda c, v: [task_module(c)], held_out=True,
    ),
    Stage(
        "frontier", "accuracy against tokens of all samplers", "frontier.json", one("frontier"),
        reads=lambda c, v: pool("validation-ziprc") | pool("test-ziprc") | FITTED,
        params=lambda c, v: ["seed", "frontier", "prompts.task"], uses=lambda c, v: [task_module(c)], held_out=True,
    ),
    Stage(
        "samples", "adaptive sampling live, {name}", TABLE, many(*LIVE_POLICIES),
        reads=lambda c, v: {"prompts": Ref("prompts", "test"), "frontier": FRONTIER} | FITTED,
        params=samples_params, machine="gpu", uses=lambda c, v: live_modules(c), check=check_grades,
    ),
)  # fmt: skip

ZIP_RC = System(
    name="zip-rc",
    stages=STAGES,
    rollouts=rollouts,
    shows=shows,
    evaluated=evaluated,
    evaluate_params=evaluate_params,
    sections=("train_joint", "values", "introspection", "baselines", "calibration", "frontier", "samples"),
    evaluation="ziprc.evaluation.head.record",
    page="ziprc.pages.zip_rc",
    evaluate_uses=lambda config: [task_module(config)],
)

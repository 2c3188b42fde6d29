"""A reasoning vocabulary: on-policy training where a model may use copies of its vocabulary inside the thinking block.

Arms differ in what they start from: the base, the base with copies, or a control. Every policy with copies is tested four ways:
as it is; with the copies banned; and with the first half of each of its thoughts kept, or put back into ordinary tokens, and
the rest sampled anew with the same seeds. Only the last pair tells whether copies carry anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ziprc.config.load import Config
from ziprc.errors import UserError, nearest
from ziprc.plan.stage import CHECKPOINT, Ref, Stage, System
from ziprc.systems.online import given, trained
from ziprc.systems.shared import BASE, RolloutsOf, table, tested

TRAIN = {"rollouts": Ref("rollouts", "train"), "grades": Ref("grades", "train")}
TESTS = ("banned", "kept", "swapped")


@dataclass(frozen=True)
class ModelOf:
    """An expanded or warmed model by its name in its section, and what it is made from."""

    model: str
    start: Ref
    reads_thoughts: bool = False


def expanded(config: Config) -> dict[str, ModelOf]:
    """`expanded-<model>` each."""
    models = config.expand.models
    copied = {name: models.get(own.as_many_as or name, own) for name, own in models.items()}
    return {f"expanded-{name}": ModelOf(name, BASE, copied[name].subset == "frequent") for name in models}


def warmed(config: Config) -> dict[str, ModelOf]:
    """`warmed-<model>` each."""
    models = config.warm_up.models
    start = {name: Ref("expand", f"expanded-{own.model}") if own.model else BASE for name, own in models.items()}
    return {f"warmed-{name}": ModelOf(name, start[name]) for name in models}


def expand_params(config: Config, of: ModelOf) -> list[str]:
    """What it adds, and what that is counted by; the seed where there is noise."""
    own = config.expand.models[of.model]
    like = [f"expand.models.{own.as_many_as}"] if own.as_many_as else []
    return ["seed", f"expand.models.{of.model}", *like]


def check_models(config: Config) -> None:
    """UserError for models that are made from others which are not there, or are of another kind."""
    models = config.expand.models
    named = {f"expand.models.{name}.as_many_as": own.as_many_as for name, own in models.items() if own.as_many_as}
    named |= {f"warm_up.models.{name}.model": own.model for name, own in config.warm_up.models.items() if own.model}
    for key, name in named.items():
        if name not in models or models[name].adds != "copies":
            known = [one for one, own in models.items() if own.adds == "copies"]
            raise UserError(
                f"{key} is '{name}', which is no model of expand.models that adds copies{nearest(name, known)}. There are: "
                f"{', '.join(known) or 'none'}."
            )


def with_copies(config: Config) -> list[str]:
    """The trained policies that have copies."""
    known = given(config)
    return [
        f"online-{n}"
        for n, arm in config.train_online.arms.items()
        if arm.start in known and known[arm.start].has_copies
    ]


def rollouts(config: Config) -> dict[str, RolloutsOf]:
    """Test prompts, as every trained policy answers them, and as one with copies does when these are taken from it."""
    found = {f"test-{name}": tested(config, policy) for name, policy in trained(config).items()}
    for name in with_copies(config):
        own = found[f"test-{name}"]
        found[f"test-{name}-banned"] = replace(own, thoughts="banned")
        for what in ("kept", "swapped"):
            found[f"test-{name}-{what}"] = replace(own, thoughts=what, before=Ref("rollouts", f"test-{name}"))
    return found


def evaluated(config: Config) -> dict[str, Ref]:
    """Test prompts, all answers to them, and the trained policies."""
    found = table("prompts", "train") | table("prompts", "test") | trained(config)
    for name in ("test", *rollouts(config)):
        found |= table("rollouts", name) | table("grades", name)
    return found


def evaluate_params(config: Config) -> list[str]:
    """Keys that metrics/reasoning-vocabulary.json depends on besides its tables."""
    own = [f"evaluate.{key}" for key in ("bootstrap", "confidence", "targets")]
    said = [
        f"train_online.arms.{name}.{key}"
        for name in config.train_online.arms
        for key in ("start", "copies_rate", "asks")
    ]
    made = [f"expand.models.{name}.adds" for name in config.expand.models]
    return [*own, *said, *made, *(f"warm_up.models.{name}.model" for name in config.warm_up.models)]


REASONING_VOCABULARY = System(
    name="reasoning-vocabulary",
    stages=(
        Stage(
            "expand", "the base, {name}", CHECKPOINT, expanded,
            reads=lambda c, v: {"base": v.start, **({"rollouts": TRAIN["rollouts"]} if v.reads_thoughts else {})},
            params=expand_params, check=check_models,
        ),
        Stage(
            "warm_up", "the policy {name}, which has been taught to use copies", CHECKPOINT, warmed,
            reads=lambda c, v: {"base": v.start, **TRAIN},
            params=lambda c, v: ["seed", f"warm_up.models.{v.model}"], machine="big-gpu", check=check_models, held_out=True,
        ),
    ),
    rollouts=rollouts,
    shows=lambda config: {
        "metrics/reasoning-vocabulary": Ref("evaluate", "reasoning-vocabulary"), **evaluated(config),
    },
    evaluated=evaluated,
    evaluate_params=evaluate_params,
    sections=("expand", "warm_up", "train_online"),
    evaluation="ziprc.evaluation.rl.vocabulary",
    page="ziprc.pages.reasoning_vocabulary",
)  # fmt: skip

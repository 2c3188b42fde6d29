"""Countdown RL with an adaptive window: GRPO on verifiable rewards, whose arms differ in the window of their responses."""

from __future__ import annotations

from dataclasses import dataclass

from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.plan.stage import CHECKPOINT, Ref, Stage, System
from ziprc.systems.shared import (
    BASE,
    RolloutsOf,
    check_grades,
    grader_modules,
    grading_keys,
    table,
    tested,
)

JUDGED = ("judged_prompts", "judged_samples")


@dataclass(frozen=True)
class ArmOf:
    """A policy trained on-policy, by its name in the configuration."""

    arm: str


def arms(config: Config) -> dict[str, ArmOf]:
    """`online-<arm>` each."""
    return {f"online-{name}": ArmOf(name) for name in config.train_online.arms}


def rollouts(config: Config) -> dict[str, RolloutsOf]:
    """Test prompts, as every trained policy answers them."""
    return {f"test-{name}": tested(config, Ref("train_online", name)) for name in arms(config)}


def arm_params(config: Config, of: ArmOf) -> list[str]:
    """Keys that decide what an arm becomes."""
    own = config.train_online
    judged = [f"train_online.{key}" for key in (("judged_every", *JUDGED) if own.judged_every else ("judged_every",))]
    lengths = [f"rollouts.{key}" for key in ("max_model_len", "max_new_tokens", "dtype")]
    return [
        "seed", f"train_online.arms.{of.arm}", "train_online.engine", "train_online.thinking", 
        *judged, *lengths, *grading_keys(config),
    ]  # fmt: skip


def arm_modules(config: Config) -> list[str]:
    """What training chooses by name: the engine that samples and what grades."""
    engine = config.train_online.engine
    return [*([f"ziprc.engines.{engine}"] if engine in ("hf", "vllm") else []), *grader_modules(config)]


def check_arms(config: Config) -> None:
    """UserError for arms that cannot be trained as they are."""
    check_grades(config)
    own, cap = config.train_online, config.rollouts.max_new_tokens
    for name, arm in own.arms.items():
        where = f"train_online.arms.{name}"
        if arm.prompts > config.prompts.train:
            raise UserError(
                f"{where}: a rollout asks {arm.prompts} different prompts, but prompts.train is {config.prompts.train}. "
                "Lower the one or raise the other."
            )
        if arm.prompts * arm.samples % arm.updates:
            raise UserError(
                f"{where}: {arm.prompts} × {arm.samples} responses cannot be shared among {arm.updates} updates. Make prompts × "
                "samples a multiple of updates."
            )
        arm.window.check_fits(cap, f"{where}.window")
    if own.judged_every and own.engine in ("colocate", "server"):
        raise UserError(
            f"train_online.engine is {own.engine}, where TRL samples; validation prompts are judged by our engines alone. Set "
            "train_online.judged_every=0, or the engine to vllm or hf."
        )
    if own.engine == "vllm" and config.runtime.gpus * config.runtime.nodes > 1:
        raise UserError(
            "train_online.engine=vllm runs in one process. With several GPUs set it to colocate (TRL's vLLM, a copy per GPU) "
            "or server."
        )


def answers(config: Config) -> dict[str, Ref]:
    """Test prompts, and what the base and every trained policy made of them."""
    found = table("prompts", "test")
    for name in ("test", *(f"test-{name}" for name in arms(config))):
        found |= table("rollouts", name) | table("grades", name)
    return found


def trained(config: Config) -> dict[str, Ref]:
    """The policies of all arms."""
    return {name: Ref("train_online", name) for name in arms(config)}


def evaluate_params(config: Config) -> list[str]:
    """Keys that metrics/countdown-rl.json depends on besides its tables."""
    judged = [f"evaluate.{key}" for key in ("bootstrap", "confidence", "targets")]
    rules = [f"train_online.arms.{name}.window.rule" for name in config.train_online.arms]
    return [*judged, *rules, "rollouts.max_new_tokens"]


STAGES = (
    Stage(
        "train_online", "the policy {name}, trained on-policy", CHECKPOINT, arms,
        reads=lambda c, v: {
            "base": BASE, **table("prompts", "train"),
            **(table("prompts", "validation") if c.train_online.judged_every else {}),
        },
        params=arm_params, machine="big-gpu", uses=lambda c, v: arm_modules(c), check=check_arms, held_out=True,
    ),
)  # fmt: skip

COUNTDOWN_RL = System(
    name="countdown-rl",
    stages=STAGES,
    rollouts=rollouts,
    shows=lambda config: {
        "metrics/countdown-rl": Ref("evaluate", "countdown-rl"),
        **trained(config),
        **answers(config),
    },
    evaluated=lambda config: answers(config) | trained(config) | table("prompts", "train"),
    evaluate_params=evaluate_params,
    sections=("train_online",),
    evaluation="ziprc.evaluation.rl.record",
    page="ziprc.pages.countdown_rl",
)

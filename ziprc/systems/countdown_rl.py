"""Countdown RL with an adaptive window: GRPO on verifiable rewards, whose arms differ in the window of their responses."""

from __future__ import annotations

from ziprc.config.load import Config
from ziprc.plan.stage import Ref, System
from ziprc.systems.online import TRAIN_ONLINE, trained
from ziprc.systems.shared import RolloutsOf, table, tested


def rollouts(config: Config) -> dict[str, RolloutsOf]:
    """Test prompts, as every trained policy answers them."""
    return {f"test-{name}": tested(config, policy) for name, policy in trained(config).items()}


def answers(config: Config) -> dict[str, Ref]:
    """Test prompts, and what the base and every trained policy made of them."""
    found = table("prompts", "test")
    for name in ("test", *(f"test-{name}" for name in trained(config))):
        found |= table("rollouts", name) | table("grades", name)
    return found


def evaluate_params(config: Config) -> list[str]:
    """Keys that metrics/countdown-rl.json depends on besides its tables."""
    judged = [f"evaluate.{key}" for key in ("bootstrap", "confidence", "targets")]
    rules = [f"train_online.arms.{name}.{key}" for name in config.train_online.arms for key in ("window.rule", "asks")]
    return [*judged, *rules, "rollouts.max_new_tokens"]


COUNTDOWN_RL = System(
    name="countdown-rl",
    stages=(TRAIN_ONLINE,),
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

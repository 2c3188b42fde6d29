"""Interim."""

from __future__ import annotations

from typing import Any

from ziprc.config.load import Config, science
from ziprc.config.zip_rc import Head
from ziprc.errors import UserError, nearest


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

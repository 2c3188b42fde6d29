"""ICL-V: a critic that reads graded rollouts of a prompt before it values the next one."""

from __future__ import annotations

from dataclasses import dataclass

from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.plan.stage import CHECKPOINT, Ref, Stage, System
from ziprc.systems.shared import BASE, table


@dataclass(frozen=True)
class CriticOf:
    """A critic in context, and the fold (of how many) that it must not see."""

    fold: tuple[int, int] | None = None


def critics(config: Config) -> dict[str, CriticOf]:
    """One per fold; `critic` alone where nothing is cross-fitted."""
    folds = config.train_critic.folds
    return {f"critic-fold{i}": CriticOf((i, folds)) for i in range(folds)} if folds > 1 else {"critic": CriticOf()}


def evaluated(config: Config) -> dict[str, Ref]:
    """Test rollouts, and training grades for what is expected of a prompt before anything is known of it."""
    found = table("prompts", "test")
    for split in ("train", "test"):
        found |= table("rollouts", split) | table("grades", split)
    return found | {name: Ref("train_critic", name) for name in critics(config)}


def evaluate_params(config: Config) -> list[str]:
    judged = [f"evaluate.{key}" for key in ("bootstrap", "confidence", "ece_bins", "targets")]
    return [*judged, *(f"train_critic.{key}" for key in ("pack_rollouts", "feedback", "end_weight", "max_length"))]


def _params(config: Config, of: CriticOf) -> list[str]:
    return [
        "seed",
        *(f"train_critic.{key}" for key in type(config.train_critic).model_fields if key != "folds" or of.fold),
    ]


def check_packs(config: Config) -> None:
    """UserError where packs cannot be full, of training prompts or of those that the critic is judged on."""
    own, asked = config.train_critic, config.rollouts
    if (trained := asked.thinking_samples + asked.non_thinking_samples) < 2:
        raise UserError(
            f"rollouts.thinking_samples and non_thinking_samples give {trained} response a training prompt; a critic in "
            "context learns from several. Raise one of them."
        )
    if asked.test_samples <= own.pack_rollouts:
        raise UserError(
            f"rollouts.test_samples is {asked.test_samples}; the critic is judged on responses beyond the "
            f"{own.pack_rollouts - 1} that a full pack has before its last, and needs two at least, so more than "
            f"train_critic.pack_rollouts={own.pack_rollouts}. Raise the one or lower the other."
        )


STAGES = (
    Stage(
        "train_critic", "the critic in context {name}", CHECKPOINT, critics,
        reads=lambda c, v: {"base": BASE, "rollouts": Ref("rollouts", "train"), "grades": Ref("grades", "train")},
        params=_params, machine="big-gpu", check=check_packs, held_out=True,
    ),
)  # fmt: skip

ICL_V = System(
    name="icl-v",
    stages=STAGES,
    rollouts=lambda config: {},
    shows=lambda config: {"metrics/icl-v": Ref("evaluate", "icl-v")},
    evaluated=evaluated,
    evaluate_params=evaluate_params,
    sections=("train_critic",),
    evaluation="ziprc.evaluation.critic.record",
    page="ziprc.pages.icl_v",
)

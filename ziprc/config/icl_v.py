"""The sections of ICL-V."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from ziprc.config.base import Increasing, Optimisation, Section, Unit

FeedbackKind = Literal["full", "no_rewards", "first_reward_only", "so_far", "answer"]
FEEDBACK_KINDS: tuple[str, ...] = get_args(FeedbackKind)


class TrainCritic(Optimisation):
    """The critic in context: it has read graded rollouts of the same prompt before the one that it values."""

    pack_rollouts: int = Field(8, ge=2, description="rollouts of one prompt in a pack; the last has one less before it")
    feedback: FeedbackKind = Field(
        "answer",
        description="said after a rollout: reward and length (full), length alone, a reward after the first alone; ours: "
        "also how many were right so far, or the answer and its mark, + or -, in place of the reward",
    )
    length_edges: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=3), Increasing] = Field(
        (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768), description="edges of the length bins in tokens, from 0 up"
    )
    reward_centres: Annotated[tuple[Unit, ...], Field(min_length=2), Increasing] = Field(
        (0.0, 1.0), description="centres of the reward bins, increasing"
    )
    folds: int = Field(2, ge=1, description="critics, each trained without its part of the prompts; 1: one, on all")
    epochs: float = Field(1.0, gt=0, description="passes over the rollouts, each in new packs")
    batch_size: int = Field(8, ge=1, description="packs per optimiser step, over all devices")
    joint_share: float = Field(
        0.35, gt=0, le=1, description="share of the steps, the last, that learn reward and length; before: reward alone"
    )
    end_weight: float = Field(
        1.0, ge=0, description="weight of a rollout's last two states together, in weights of all its states"
    )
    max_length: int = Field(131072, ge=16, description="tokens of a pack; rollouts that do not fit are left out of it")


class ICLV(Section):
    """ICL-V: a critic that learns in context from the graded rollouts of a prompt."""

    train_critic: TrainCritic = TrainCritic()

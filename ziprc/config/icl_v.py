"""The sections of ICL-V."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from ziprc.config.base import Increasing, Name, Optimisation, Section, Unit, laid_beneath

FeedbackKind = Literal["full", "no_rewards", "first_reward_only", "so_far", "answer"]
Method = Literal["kl", "rft", "awr", "dpo", "grpo", "ppo"]
FEEDBACK_KINDS: tuple[str, ...] = get_args(FeedbackKind)
LEGACY_KINDS = ("full", "no_rewards", "first_reward_only")  # of the published trainer


class TrainCritic(Optimisation):
    """The critic in context: it has read graded rollouts of the same prompt before the one that it values."""

    pack_rollouts: int = Field(8, ge=2, description="rollouts of one prompt in a pack; the last has one less before it")
    feedback: FeedbackKind = Field(
        "answer",
        description="said after a rollout: reward and length (full), length alone, a reward after the first alone; ours: "
        "also how many were right so far, or the answer and its mark, + or -, in place of the reward",
    )
    layout: Literal["template", "legacy"] = Field(
        "template", description="as the chat template renders the conversation, or as published (see training/packs.py)"
    )
    supervise_from: int = Field(
        1, ge=1, description="rollout of a pack from which on they are learned, where there are so many; else the last"
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
    end_share: float = Field(
        0.25, ge=0, lt=1, description="share of the steps, the first, that learn the reward at the end alone"
    )
    joint_share: float = Field(
        0.35, gt=0, le=1, description="share of the steps, the last, that learn reward and length; before: reward alone"
    )
    end_weight: float = Field(
        1.0, ge=0, description="weight of a rollout's last two states together, in weights of all its states"
    )
    max_length: int = Field(131072, ge=16, description="tokens of a pack; rollouts that do not fit are left out of it")
    judged_prompts: int | None = Field(
        None, ge=1, description="test prompts on which `evaluate` judges it, the first ones; null: all"
    )

    @model_validator(mode="after")
    def _published_feedback(self) -> TrainCritic:
        if self.layout == "legacy" and self.feedback not in LEGACY_KINDS:
            raise ValueError(f"layout legacy knows the feedback {', '.join(LEGACY_KINDS)}, found {self.feedback}")
        return self

    @model_validator(mode="after")
    def _shares_of_one_run(self) -> TrainCritic:
        if self.end_share + self.joint_share > 1:
            raise ValueError(f"end_share {self.end_share} and joint_share {self.joint_share} are more than all steps")
        return self


class QValues(Section):
    """Labels: what a training rollout's plausible next tokens are worth, state by state."""

    min_p: float = Field(
        0.05, gt=0, le=1, description="least probability of a candidate, as a share of the likeliest one's"
    )
    candidates: bool = Field(True, description="value every candidate; false: the tokens taken alone")
    folds: int | None = Field(
        None, ge=1, description="parts of the prompts that are labelled, the first ones; each needs a critic; null: all"
    )
    prompts: int | None = Field(None, ge=1, description="prompts that are labelled, the first ones; null: all")
    min_correct_rate: Unit = Field(0.0, description="least share of right rollouts of a prompt that is labelled")
    min_incorrect_rate: Unit = Field(0.0, description="least share of wrong rollouts of a prompt that is labelled")


class Tilted(Section):
    """How values make a policy of the reference (ziprc/joint/tilt.py)."""

    tilt: Literal["exp", "posterior", "soft", "soft_cost"] = Field(
        "exp",
        description="how a value weighs a candidate: e^(Q/eta), Q, what maximises the score, that of the whole joint",
    )
    eta: float = Field(0.1, gt=0, description="score that is worth one nat; small: far from the reference")
    price: float = Field(0.0, ge=0, description="with soft_cost: score that a token still to come costs")


class Student(Optimisation, Tilted):
    """One policy that is made of labelled rollouts. The keys of the tilt are for kl."""

    method: Method = Field(
        "kl", description="towards the tilted reference; or likelihood of right responses (rft), of all by advantage (awr), "
        "pairs (dpo), the clipped surrogate by score (grpo) or by advantage (ppo)"
    )  # fmt: skip
    labels: Literal["critic", "trie", "none"] = Field(
        "critic", description="whose labels: the critic's in context, the tree's of prefixes, or, for rft, none at all"
    )
    direction: Literal["reverse", "forward"] = Field(
        "reverse", description="kl: of the student from its target, or of the target from the student"
    )
    tail: bool = Field(True, description="kl: hold the mass outside of the candidates, too; false: free, as published")
    beta: float = Field(0.1, gt=0, description="dpo: nats of the pair's log-ratio that are worth one unit of its logit")
    temperature: float = Field(1.0, gt=0, description="awr: advantage that weighs e times as much")
    weight_clip: float = Field(20.0, gt=0, description="awr: the highest weight")
    clip_eps: float = Field(0.2, gt=0, description="grpo, ppo: how far a ratio may move before it gains nothing")
    kl_coef: float = Field(0.0, ge=0, description="grpo: weight of the KL from the reference")
    gae_lambda: Unit = Field(0.95, description="awr, ppo: 1: what came of it, 0: the next value alone")
    normalize_advantages: bool = Field(True, description="ppo: to mean 0 and deviation 1, over all rollouts")
    success_threshold: Unit = Field(0.5, description="rft: a score above it is a success")
    rounds: int = Field(
        1, ge=1, description="times that it is trained, each but the first on labelled rollouts of its own last state"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the rollouts (dpo: pairs), in every round")
    max_steps: int = Field(-1, ge=-1, description="most optimiser steps; -1: what the epochs take")
    batch_size: int = Field(64, ge=1, description="rollouts (dpo: pairs) per optimiser step, over all devices")
    max_length: int = Field(8192, ge=2, description="tokens at which inputs are cut")


class TrainPolicy(Section):
    """Policies without context, made of what the labels say. Each is sampled, graded and compared with the base."""

    defaults: Student | None = Field(None, exclude=True, description="settings that lie beneath those of every student")
    students: dict[Name, Student] = Field({}, description="by name; its checkpoint is policy-<name>")

    @model_validator(mode="before")
    @classmethod
    def _lay_defaults_beneath(cls, given: Any) -> Any:
        return laid_beneath(given, "students", Student)

    @model_validator(mode="after")
    def _labels_suffice(self) -> TrainPolicy:
        for name, own in self.students.items():
            if own.labels == "none" and own.method != "rft":
                raise ValueError(f"student {name}: {own.method} learns from labels, so labels cannot be none")
            if own.labels == "trie" and own.tilt == "soft_cost" and own.method == "kl":
                raise ValueError(f"student {name}: soft_cost needs the joint of a critic; the trie has none")
        return self


class Guide(Tilted):
    """One way to guide: what the critic has read, and how its values weigh."""

    siblings: int = Field(7, ge=0, description="graded rollouts of the prompt that the critic has read")
    scores: Literal["true", "vote"] = Field(
        "true", description="theirs (oracle-assisted), or whether each gave their commonest answer, which needs no key"
    )


class Guided(Section):
    """Decoding with reference and critic side by side, on test prompts."""

    prompts: int | None = Field(100, ge=1, description="test prompts, the first ones; null: all")
    samples: int = Field(8, ge=1, description="responses per prompt")
    modes: dict[Name, Guide] = Field({}, description="by name; its responses are test-guided-<name>")


class ICLV(Section):
    """ICL-V: a critic that learns in context from the graded rollouts of a prompt, and policies made of what it says."""

    train_critic: TrainCritic = TrainCritic()
    qvalues: QValues = QValues()
    train_policy: TrainPolicy = TrainPolicy()
    guided: Guided = Guided()

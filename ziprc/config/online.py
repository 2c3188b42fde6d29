"""The section of on-policy training: arms that differ in the window of their responses, their rewards or their optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from ziprc.config.base import LearningRate, Name, Optimisation, Schedule, Section, Unit, laid_beneath
from ziprc.errors import UserError, nearest

Rule = Literal["fixed", "phased", "adaptive", "legacy", "proposed", "predicted"]
RULES: tuple[str, ...] = get_args(Rule)
Setup = Literal["outcome", "tinyv_only", "addon", "mixed", "gated"]
REWARDS = ("score", "rubric", "cosine", "format", "repetition", "overlong")  # those of ziprc/rewards/combine.py
Tokens = Annotated[int, Field(ge=1)]


class Window(Section):
    """Tokens that a response may have while it is sampled for training: by which rule, and its knobs (training/window.py)."""

    rule: Rule = Field(
        "fixed",
        description="adaptive: follows the lengths of right answers; legacy: the published rule; proposed: its mend; predicted: "
        "stops each response by the joint head of the checkpoint that the arm starts from",
    )
    start: Tokens | None = Field(
        None, description="tokens of the first rollouts; null: rollouts.max_new_tokens, the largest"
    )
    smallest: Tokens = Field(16, description="least tokens")
    quantum: Tokens = Field(8, description="adaptive, proposed: a window is a multiple of it")
    warmup: int = Field(
        1, ge=0, description="rollouts before the first decision; adaptive, proposed: at the largest window"
    )
    every: int = Field(1, ge=1, description="rollouts from one decision to the next")
    least: int = Field(10, ge=1, description="right responses that must be remembered before the window moves")
    memory: int = Field(10, ge=1, description="adaptive, proposed: rollouts whose right responses are remembered")
    quantile: float = Field(
        0.8, gt=0, le=1, description="adaptive, proposed: of their lengths, which the window follows"
    )
    room: float = Field(
        2.0, ge=1, description="adaptive, proposed: the window it shrinks to, as a multiple of that length"
    )
    edge: Unit = Field(
        0.85, description="adaptive: a right response longer than this share of the window presses against it"
    )
    crowd: Unit = Field(0.2, description="adaptive: share of right responses that must press before the window grows")
    growth: float = Field(0.15, gt=0, description="adaptive: share of the window by which it grows at a time")
    drop: float = Field(1.0, gt=0, le=1, description="adaptive: largest share of the window that it loses at a time")
    probes: Unit = Field(
        0.0, description="adaptive, proposed: share of the rollouts at the largest window, which do not move it"
    )
    target: Unit = Field(0.7, description="legacy, proposed: share of right responses that is aimed at")
    margin: Unit = Field(0.05, description="legacy, proposed: how far from it a success rate calls for a move")
    ema: float = Field(0.9, ge=0, lt=1, description="legacy, proposed: share that a mean over rollouts keeps of itself")
    truncated: Unit = Field(0.15, description="proposed: share of cut responses that allows growth")
    step: Tokens = Field(64, description="legacy, proposed: tokens of a move, at least")
    tolerance: int = Field(
        32, ge=0, description="legacy, proposed: tokens between window and lengths that call for none"
    )
    hold: int = Field(
        20, ge=0, description="legacy, proposed: rollouts since the last move before a good policy gets more"
    )
    least_move: int = Field(5, ge=0, description="legacy: smaller moves are dropped")
    explore: Unit = Field(0.0, description="legacy: chance of a jump to the largest window, which stays")
    floor: Unit = Field(
        0.05, description="predicted: least chance of a right answer within the window with which a response goes on"
    )
    interval: Tokens = Field(8, description="predicted: tokens of a response from one such look to the next")
    lengths: Literal["all", "rolling", "ema"] = Field(
        "all", description="legacy: what the mean length of successes is over"
    )
    schedule: dict[Annotated[int, Field(ge=0)], Tokens] = Field(
        {}, description="phased: window by the rollout it starts at"
    )

    @model_validator(mode="after")
    def _can_work(self) -> Window:
        if self.start is not None and self.start < self.smallest:
            raise ValueError(f"start {self.start} is below smallest {self.smallest}")
        if (self.rule == "phased") != bool(self.schedule):
            raise ValueError("rule phased and a schedule belong together")
        return self

    def check_fits(self, largest: int, where: str) -> None:
        """UserError for a window that asks for more than a response may have, `largest` tokens."""
        asked = {"smallest": self.smallest, "start": self.start or 0}
        asked |= {f"schedule {begins}": tokens for begins, tokens in self.schedule.items()}
        if too_large := [name for name, tokens in asked.items() if tokens > largest]:
            raise UserError(
                f"{where}: {too_large[0]} is {asked[too_large[0]]} tokens, but a response has at most {largest} "
                "(rollouts.max_new_tokens). Lower the one or raise the other."
            )


class Reward(Section):
    """One part of what the optimiser sees."""

    weight: float = Field(1.0, ge=-100, le=100, description="factor of this part in the sum")
    settings: dict[str, Any] = Field({}, description="arguments of its function, see ziprc/rewards/combine.py")


class RubricReward(Section):
    """How the work of a response counts, by a rubric (ziprc/rewards/combine.py)."""

    setup: Setup = Field(
        "gated",
        description="outcome: not at all; tinyv_only: alone; addon: for wrong answers; mixed: beside the verdict; gated: for "
        "right ones",
    )
    weight: Unit = Field(1.0, description="addon, mixed: of the rubric")
    by: str = Field("program", description="program: the task's own; or the checkpoint grader-<name>, or online-<arm>")
    credit: Literal["response", "steps"] = Field(
        "response", description="steps: tokens of a step also get the verdict on it, within the group"
    )
    step_weight: float = Field(
        1.0, ge=0, description="credit steps: of a step's verdict beside the response's advantage"
    )


class Arm(Optimisation):
    """One way to train on-policy. A rollout is: sample, grade, one or more optimiser steps."""

    start: str = Field(
        "base", description="what it starts from: base, expanded-<model>, warmed-<model>, grader-<name>, ziprc or lite"
    )
    copies_rate: float = Field(
        1.0, ge=0, description="learning rate of the rows of a reasoning vocabulary, as a multiple; 0: they stay"
    )
    learning_rate: LearningRate = 1e-6
    schedule: Schedule = "constant"
    rollouts: int = Field(100, ge=1, description="times that responses are sampled and learned from")
    prompts: int = Field(8, ge=1, description="prompts of a rollout; each is asked once per pass over the split")
    samples: int = Field(8, ge=2, description="responses per prompt, the group whose mean is the baseline")
    updates: int = Field(1, ge=1, description="optimiser steps on a rollout, each on its own part of it")
    passes: int = Field(1, ge=1, description="times that all of a rollout is learned from")
    temperature: float = Field(1.0, gt=0, description="of sampling and of the log-probabilities that are trained")
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = Field(
        "dapo",
        description="how token losses add up: over all tokens of the rollout, per response, per micro-batch, by the cap",
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="what an advantage is divided by: a deviation"
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL from the policy that it starts from")
    clip_low: float = Field(0.2, gt=0, description="how far a ratio may fall before it gains nothing")
    clip_high: float = Field(0.2, gt=0, description="how far a ratio may rise before it gains nothing")
    mask_truncated: bool = Field(
        False, description="leave cut responses out of the loss; false: they are wrong answers"
    )
    rewards: dict[str, Reward] = Field(
        {"score": Reward()},
        min_length=1,
        description="what is summed to the reward, by name or by package.module:function",
    )
    rubric: RubricReward | None = Field(None, description="how the work counts; null: the answer alone is looked at")
    asks: Literal["prompts", "gradings"] = Field(
        "prompts", description="gradings: it is a grader that is trained, on how near its totals are to the teacher's"
    )
    window: Window = Window()

    @model_validator(mode="before")
    @classmethod
    def _rubric_is_the_reward(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("rubric") is not None and "rewards" not in given:
            return {**given, "rewards": {"rubric": {}}}
        return given

    @model_validator(mode="after")
    def _rewards_exist(self) -> Arm:
        if ("rubric" in self.rewards) != (self.rubric is not None):
            raise ValueError("a rubric and the reward 'rubric' belong together")
        if self.rubric is not None and self.asks == "gradings":
            raise ValueError("a grader is not graded by a rubric: leave out the one or the other")
        for name in self.rewards:
            if name not in REWARDS and ":" not in name:
                raise ValueError(
                    f"there is no reward '{name}'{nearest(name, REWARDS)}; one of your own is named package.module:function"
                )
        return self


class TrainOnline(Section):
    """On-policy training by verifiable rewards (GRPO, https://arxiv.org/abs/2402.03300)."""

    engine: Literal["vllm", "hf", "colocate", "server"] = Field(
        "vllm",
        description="what samples: our engines, seeded; or TRL's vLLM in this process, or on a server of its own",
    )
    thinking: bool = Field(True, description="whether responses have a thinking block")
    judged_every: int = Field(
        0, ge=0, description="rollouts from one judgement on validation prompts to the next; 0: none"
    )
    judged_prompts: int = Field(50, ge=1, description="validation prompts of a judgement, the first ones")
    judged_samples: int = Field(4, ge=1, description="responses to each, at the largest window")
    defaults: Arm | None = Field(None, exclude=True, description="settings that lie beneath those of every arm")
    arms: dict[Name, Arm] = Field({}, description="by name; its checkpoint is online-<name>")

    @model_validator(mode="before")
    @classmethod
    def _lay_defaults_beneath(cls, given: Any) -> Any:
        return laid_beneath(given, "arms", Arm)


class OnlineRL(Section):
    """On-policy training, which several systems share."""

    train_online: TrainOnline = TrainOnline()

"""The sections of a reasoning vocabulary: what a base is given before on-policy training, and a warm-up with it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ziprc.config.base import LearningRate, Name, Optimisation, Section, Unit


class Expansion(Section):
    """One thing that the base is given: copies of its tokens, or feed-forward units as a control."""

    adds: Literal["copies", "units"] = Field(
        "copies", description="copies of rows of the vocabulary, for the thinking block; or feed-forward units"
    )
    subset: Literal["all", "frequent", "digits+operators"] = Field(
        "all",
        description="copies: of every token that is not special; of those most used in the base's thoughts; of signs",
    )
    frequent: int = Field(4096, ge=1, description="tokens of the subset `frequent`")
    copies: int = Field(1, ge=1, le=8, description="copies of each")
    init_noise: float = Field(
        0.0, ge=0, description="deviation of what is added to a copy, as a share of that of the rows; 0: an equal row"
    )
    inside: Literal["both", "reasoning_only"] = Field(
        "both", description="what the thinking block may hold: every token, or copies alone"
    )
    corrected: bool = Field(
        True, description="a token and its copies lose ln(1 + copies) in the block, so that the base's law is kept"
    )
    as_many_as: Name | None = Field(None, description="units: about as many parameters as these copies, by name")

    @model_validator(mode="after")
    def _belongs(self) -> Expansion:
        if (self.adds == "units") != (self.as_many_as is not None):
            raise ValueError("adds: units and as_many_as belong together")
        return self


class Expand(Section):
    """What the base is given before it learns (see training/expansion.py)."""

    models: dict[Name, Expansion] = Field({}, description="by name; its checkpoint is expanded-<name>")


class WarmUp(Optimisation):
    """Training on right responses of the base whose thoughts are rewritten with copies (https://arxiv.org/abs/2604.22709).

    Without `model` it is the control: the same training of the base, on the same thoughts as they are.
    """

    learning_rate: LearningRate = 1e-4
    model: Name | None = Field(
        None,
        description="what it starts from, by its name in expand.models; null: the base, whose thoughts are not rewritten",
    )
    least: Unit = Field(0.5, description="least score of a response that is learned from")
    share: Unit = Field(1.0, description="chance that a token of a thought that has a copy becomes one")
    tokens: Annotated[int, Field(ge=1)] = Field(100_000, description="tokens that are learned from")
    batch_tokens: int = Field(2048, ge=1, description="tokens per optimizer step over all processes, at least")


class WarmUps(Section):
    """Policies that have learned to use copies before they are rewarded."""

    models: dict[Name, WarmUp] = Field({}, description="by name; its checkpoint is warmed-<name>")


class ReasoningSections(Section):
    """The sections of the system."""

    expand: Expand = Expand()
    warm_up: WarmUps = WarmUps()

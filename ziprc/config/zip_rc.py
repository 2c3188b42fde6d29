"""The sections of ZIP-RC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ziprc.config.base import Increasing, Optimisation, Section, Unit

# What can run live on an engine, by the names of their tables.
LIVE_POLICIES = ("zip-rc-plus", "zip-rc-plus-branching", "zip-rc-plus-wide", "zip-rc", "majority")


class Head(Optimisation):
    """One joint head: its label, its loss and its optimiser."""

    label: Literal["score", "value"] = "score"
    reward_centres: Annotated[tuple[Unit, ...], Field(min_length=2), Increasing] = (0.0, 1.0)
    kl: float = Field(0.0, ge=0, description="weight of KL(reference || model) over the rows outside the slice")
    kl_form: Literal["exact", "top_k", "legacy_top32"] = "exact"
    kl_top_k: int = Field(64, ge=1)
    trainable: Literal["all", "slice"] = "all"
    unfinished: Literal["zero", "ignore", "drop"] = Field(
        "zero", description="score of a capped response: 0, marginalised over, or the rollout left out"
    )
    censored: Literal["survival", "as_observed"] = "survival"
    legacy_off_by_one: bool = False
    epochs: float = Field(2.0, gt=0)
    max_steps: int = Field(-1, ge=-1)
    batch_size: int = Field(128, ge=1, description="rollouts per optimiser step, over all devices")
    max_length: int = Field(32768, ge=2, description="inputs are cut here; labels come from the whole rollout")


class TrainJoint(Section):
    """The joint heads: `noisy` (intermediate, on scores), `ziprc` (final, on values), `lite` (only the reserved rows)."""

    length_edges: Annotated[tuple[int, ...], Field(min_length=3), Increasing] = (
        0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768,
    )  # fmt: skip
    first_row: int | None = Field(None, description="first reserved row; empty: the first that no token uses")
    thinking_only: bool = False
    defaults: Head | None = Field(None, exclude=True, description="settings that lie beneath those of every head")
    noisy: Head = Head()
    ziprc: Head = Head(label="value", reward_centres=(0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1), kl=10.0)
    lite: Head | None = None

    @model_validator(mode="before")
    @classmethod
    def _lay_defaults_beneath(cls, given: Any) -> Any:
        """Every head on top of `defaults`; what is no key of a head is left for the check of `defaults` to refuse."""
        if not isinstance(given, Mapping) or not isinstance(given.get("defaults"), Mapping):
            return given
        beneath = {key: value for key, value in given["defaults"].items() if key in Head.model_fields}
        own = {"noisy": {}, "ziprc": cls.model_fields["ziprc"].default.model_dump(exclude_unset=True), **given}
        heads = {name: own.get(name) for name in ("noisy", "ziprc", "lite")}
        return {**given, **{name: {**beneath, **head} for name, head in heads.items() if isinstance(head, Mapping)}}


class Values(Section):
    """Scalar value of a rollout: the mean expected score over its last labelled states."""

    last_k: int = Field(512, ge=1)
    folds: int = Field(2, ge=1, description="critics are cross-fitted over this many folds of prompts; 1: in sample")


class Introspection(Section):
    """The joint, the emitted token's log-probability and the entropy at every labelled state."""

    dtype: Literal["float32", "bfloat16"] = "float32"


class Baselines(Section):
    """Honest competitors, fitted on the head's own training rollouts."""

    probe_hidden: int = Field(64, ge=0, description="hidden units of the probe on frozen states; 0: linear")
    probe_epochs: int = Field(20, ge=1)
    window: int = Field(8, ge=1, description="tokens of the windowed log-probability")


class Calibration(Section):
    """What is fitted on validation prompts for the samplers. Its data are the pool `validation-ziprc`."""


class Frontier(Section):
    """Replays of samplers. Each family's settings are chosen on validation prompts at every budget."""

    budgets: Annotated[tuple[float, ...], Field(min_length=1), Increasing] = (1.5, 2, 3, 4, 6, 8, 12, 16)
    orders: int = Field(2, ge=1, description="orders in which the test pool is replayed; half of it for validation")
    branches: int = Field(24, ge=1, description="most branches of one prompt; the size of the pool is a limit too")
    prices: int = Field(10, ge=2, description="settings of zip-rc-plus, from the highest to the lowest price")
    highest_price: float = Field(0.03, gt=0, description="probability of a right answer per token")
    lowest_price: float = Field(2e-5, gt=0)
    intervals: Annotated[tuple[int, ...], Field(min_length=1), Increasing] = (8, 16)
    alphas: tuple[Unit, ...] = (0.1, 1.0)
    betas: tuple[Annotated[float, Field(ge=0)], ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    published_samples: int = Field(8, ge=1, description="most samples of the published policy")
    window: int = Field(16, ge=1, description="readings of the joint that are averaged, where smoothing is tried")
    calibrated: bool = Field(False, description="whether the published policy reads the calibrated joint")
    cost_alpha: Unit = Field(0.1, description="of the paper's normalised cost")
    bootstrap: int = Field(1000, ge=10)
    confidence: float = Field(0.95, gt=0, lt=1)


class Samples(Section):
    """Live runs on the engine, with the settings that `frontier` chose."""

    policies: tuple[str, ...] = ("zip-rc-plus", "zip-rc-plus-branching", "zip-rc", "majority")
    budgets: Annotated[tuple[float, ...], Field(min_length=1), Increasing] = (2, 4)
    majority_budgets: Annotated[tuple[float, ...], Field(min_length=1), Increasing] = Field(
        (2, 4, 16), description="of the plain vote, which needs more for the same accuracy"
    )
    prompts: int | None = Field(None, ge=1, description="the first test prompts; empty: all")
    branches: int = Field(24, ge=1, description="most branches of one prompt")
    max_tokens: int | None = Field(None, ge=2, description="most tokens of one prompt, a hard limit")
    max_latency: int | None = Field(None, ge=2, description="most serial decoding steps of one prompt, a hard limit")
    in_flight: int = Field(256, ge=1, description="prompts at a time")
    one_at_a_time: int = Field(0, ge=0, description="prompts that are also timed alone, one after the other")

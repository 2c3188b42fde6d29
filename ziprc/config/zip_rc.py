"""The sections of ZIP-RC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from ziprc.config.base import Increasing, Name, Optimisation, Positive, Section, Unit

# What can run live on an engine, by the names of their tables.
LivePolicy = Literal["zip-rc-plus", "zip-rc-plus-branching", "zip-rc-plus-wide", "zip-rc", "majority"]
LIVE_POLICIES: tuple[str, ...] = get_args(LivePolicy)
HEADS = ("noisy", "ziprc", "lite")  # what every experiment may have; rivals have names of their own
# Names of other predictors and tables, which no rival may have.
TAKEN = ("ziprc", "lite", "base", "many", "probe", "logprob", "length", "constant")
Budgets = Annotated[tuple[Positive, ...], Field(min_length=1), Increasing]  # in mean lengths of one plain sample


class Head(Optimisation):
    """One joint head: its label, its loss and its optimiser."""

    label: Literal["score", "value", "critic", "trie"] = Field(
        "score",
        description="the reward that is learned: of a whole response, its grade or the critics' value; of every token, what "
        "a critic in context, or the tree of the siblings' prefixes, expects there (qvalues)",
    )
    reward_centres: Annotated[tuple[Unit, ...], Field(min_length=2), Increasing] = Field(
        (0.0, 1.0), description="centres of the reward bins, increasing"
    )
    kl: float = Field(0.0, ge=0, description="weight of KL(reference || model) over the rows outside the slice")
    kl_form: Literal["exact", "top_k", "legacy_top32"] = Field(
        "exact", description="over all rows; over kl_top_k and one bucket for the rest; as published (biased)"
    )
    kl_top_k: int = Field(64, ge=1, description="likeliest reference tokens that top_k keeps")
    trainable: Literal["all", "slice"] = Field(
        "all", description="all weights, or the reserved rows alone (no KL then)"
    )
    unfinished: Literal["zero", "ignore", "drop"] = Field(
        "zero", description="a capped response scores 0, teaches its length alone, or is left out"
    )
    censored: Literal["survival", "as_observed"] = Field(
        "survival", description="length of a capped response: at least what was seen, or that"
    )
    legacy_off_by_one: bool = Field(False, description="count one token less to come, as published")
    epochs: float = Field(2.0, gt=0, description="passes over the rollouts")
    max_steps: int = Field(-1, ge=-1, description="most optimiser steps; -1: what the epochs take")
    batch_size: int = Field(128, ge=1, description="rollouts per optimiser step, over all devices")
    max_length: int = Field(32768, ge=2, description="tokens at which inputs are cut, but not their labels")


class TrainJoint(Section):
    """The joint heads: reserved rows of the output matrix hold a joint distribution over reward and remaining tokens."""

    length_edges: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=3), Increasing] = Field(
        (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768), description="edges of the length bins in tokens, from 0 up"
    )
    first_row: int | None = Field(None, ge=0, description="first reserved row; null: the first that no token uses")
    thinking_only: bool = Field(False, description="train on responses with thinking alone")
    defaults: Head | None = Field(None, exclude=True, description="settings that lie beneath those of every head")
    noisy: Head = Field(Head(), description="the intermediate heads (critics); only their values are used")
    ziprc: Head = Field(
        Head(label="value", reward_centres=(0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1), kl=10.0),
        description="the final head",
    )
    lite: Head | None = Field(None, description="another final head, usually of the reserved rows alone; null: none")
    rivals: dict[Name, Head] = Field({}, description="more final heads, by name, that are compared with ziprc")

    @model_validator(mode="before")
    @classmethod
    def _lay_defaults_beneath(cls, given: Any) -> Any:
        """Every head on top of `defaults`; what is no key of a head is left for the check of `defaults` to refuse."""
        if not isinstance(given, Mapping) or not isinstance(given.get("defaults"), Mapping):
            return given
        beneath = {key: value for key, value in given["defaults"].items() if key in Head.model_fields}
        own = {"noisy": {}, "ziprc": cls.model_fields["ziprc"].default.model_dump(exclude_unset=True), **given}
        heads = {name: own.get(name) for name in HEADS}
        found = {**given, **{name: {**beneath, **head} for name, head in heads.items() if isinstance(head, Mapping)}}
        if isinstance(rivals := given.get("rivals"), Mapping):
            found["rivals"] = {n: {**beneath, **h} if isinstance(h, Mapping) else h for n, h in rivals.items()}
        return found

    @model_validator(mode="after")
    def _names_of_their_own(self) -> TrainJoint:
        if taken := [name for name in self.rivals if name in TAKEN or name.startswith(("noisy", "critic-", "policy-"))]:
            raise ValueError(f"rivals: '{taken[0]}' is the name of something else; name it otherwise")
        return self

    def head(self, key: str) -> Head:
        """The settings of a head, by its name or its key in this section."""
        name = key.removeprefix("rivals.")
        found: Head = getattr(self, name) if name in HEADS else self.rivals[name]
        return found


class Values(Section):
    """Scalar value of a rollout: a critic's mean expected score over its last labelled states."""

    last_k: int = Field(512, ge=1, description="states at the end of a response over which the score is averaged")
    folds: int = Field(2, ge=1, description="parts of the prompts, scored by a critic of the others; 1: in sample")


class Introspection(Section):
    """The joint, the emitted token's log-probability and the entropy at every labelled state."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="numbers that the model computes in")


class Baselines(Section):
    """Honest competitors, fitted on the head's own training rollouts."""

    probe_hidden: int = Field(64, ge=0, description="hidden units of the probe on frozen states; 0: linear")
    probe_epochs: int = Field(20, ge=1, description="passes over the probe's training states")
    window: int = Field(8, ge=1, description="tokens of the windowed log-probability")


class Calibration(Section):
    """What is fitted on validation prompts for the samplers. Its data are the pool `validation-ziprc`."""


class Frontier(Section):
    """Replays of samplers. Each family's settings are chosen on validation prompts at every budget."""

    budgets: Budgets = Field(
        (1.5, 2, 3, 4, 6, 8, 12, 16), description="tokens per prompt, in plain samples, increasing"
    )
    orders: int = Field(2, ge=1, description="orders in which the test pool is replayed; half as many for validation")
    branches: int = Field(24, ge=1, description="most branches of one prompt; the size of the pool is a limit too")
    prices: int = Field(10, ge=2, description="settings of zip-rc-plus, from the highest to the lowest price")
    highest_price: float = Field(0.03, gt=0, description="probability of a right answer that a token must be worth")
    lowest_price: float = Field(2e-5, gt=0, description="the same, of the setting that spends most")
    intervals: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), Increasing] = Field(
        (8, 16), description="tokens between two decisions, increasing"
    )
    alphas: tuple[Unit, ...] = Field(
        (0.1, 1.0), min_length=1, description="of the published policy; 1: compute alone is dear, 0: time alone"
    )
    betas: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.003, 0.01, 0.03, 0.1, 0.3), min_length=1, description="of the published policy: how dear both are"
    )
    published_samples: int = Field(8, ge=1, description="most samples of the published policy")
    window: int = Field(16, ge=1, description="readings of the joint that are averaged, where smoothing is tried")
    calibrated: bool = Field(False, description="whether the published policy reads the calibrated joint")
    cost_alpha: Unit = Field(0.1, description="weight of compute in the paper's normalised cost; the rest is time")
    bootstrap: int = Field(1000, ge=10, description="resamplings of the prompts")
    confidence: float = Field(0.95, gt=0, lt=1, description="probability that an interval covers")


class Samples(Section):
    """Live runs on the engine, with the settings that `frontier` chose."""

    policies: tuple[LivePolicy, ...] = Field(
        ("zip-rc-plus", "zip-rc-plus-branching", "zip-rc", "majority"), description="policies that are run"
    )
    budgets: Budgets = Field((2, 4), description="tokens per prompt, in plain samples, increasing")
    majority_budgets: Budgets = Field((2, 4, 16), description="samples of the plain vote, which needs more")
    prompts: int | None = Field(None, ge=1, description="test prompts, the first ones; null: all")
    branches: int = Field(24, ge=1, description="most branches of one prompt")
    max_tokens: int | None = Field(None, ge=2, description="most tokens of one prompt, a hard limit; null: none")
    max_latency: int | None = Field(None, ge=2, description="most serial steps of one prompt, a hard limit; null: none")
    in_flight: int = Field(
        256, ge=1, description="prompts at a time; their number decides who waits, and how logits round"
    )
    one_at_a_time: int = Field(0, ge=0, description="prompts that are also timed alone, one after the other")


class ZipRC(Section):
    """ZIP-RC: a joint distribution over reward and remaining length at every token, and samplers that act on it."""

    train_joint: TrainJoint = TrainJoint()
    values: Values = Values()
    introspection: Introspection = Introspection()
    baselines: Baselines = Baselines()
    calibration: Calibration = Calibration()
    frontier: Frontier = Frontier()
    samples: Samples = Samples()

"""The sections that every system reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ziprc.config.base import (
    AdamwRate,
    DType,
    LearningRate,
    Optimisation,
    OptimizerName,
    Runtime,
    Sampling,
    Schedule,
    Section,
    System,
    Warmup,
)


class Prompts(Section):
    """What is asked. Counts are prompts per split."""

    task: str = Field("arithmetic", description="a module of ziprc/tasks/; hub: any data set, by column mapping")
    settings: dict[str, Any] = Field({}, description="the task's own keys, see the end of this page")
    train: int = Field(1000, ge=1, description="prompts that models learn from")
    validation: int = Field(200, ge=1, description="prompts that samplers are calibrated on")
    test: int = Field(200, ge=1, description="prompts that everything is judged on")


class Architecture(Section):
    """A small Qwen3."""

    hidden_size: int = Field(128, ge=1, description="width of a state")
    intermediate_size: int = Field(384, ge=1, description="width of a feed-forward layer")
    num_hidden_layers: int = Field(4, ge=1, description="layers")
    num_attention_heads: int = Field(4, ge=1, description="query heads of a layer")
    num_key_value_heads: int = Field(2, ge=1, description="key and value heads of a layer; divides the query heads")
    head_dim: int = Field(32, ge=2, multiple_of=2, description="width of an attention head; even, for rotary positions")
    max_position_embeddings: int = Field(4096, ge=16, description="tokens of a sequence, at most")
    vocab_size: int = Field(384, ge=1, description="rows of the output matrix, reserved ones included")
    merges: int = Field(40, ge=0, description="byte-pair merges learned on the task's words")


class Base(Optimisation):
    """The policy to start from. All keys but `model` and `revision` are read for `scratch` alone."""

    model: str = Field("scratch", description="Hub id or local folder; scratch: train one on the task's worked traces")
    revision: str | None = Field(None, description="commit, tag or branch on the Hub; null: the newest")
    architecture: Architecture = Architecture()
    tokens: int = Field(1_000_000, ge=1000, description="training tokens, prompts included")
    repeats: float = Field(
        0.2, ge=0, lt=1, description="share of these that are repeated random segments, which teach looking back"
    )
    batch_tokens: int = Field(2048, ge=64, description="tokens per optimiser step, over all devices")
    optimizer: OptimizerName = "muon"
    learning_rate: LearningRate = 5e-3
    adamw_learning_rate: AdamwRate = 3e-3
    warmup: Warmup = 0.02
    schedule: Schedule = "linear"


class Rollouts(Section):
    """Responses per prompt and how they are sampled. A pool is a set of recorded responses of the final head's model."""

    engine: Literal["vllm", "hf"] = Field("vllm", description="what generates; hf: the exact, slower reference")
    sampling: Sampling = Sampling()
    max_model_len: int = Field(512, ge=16, description="tokens of prompt and response together")
    max_new_tokens: int = Field(256, ge=1, description="tokens after which a response is cut off")
    thinking_samples: int = Field(2, ge=0, description="responses with thinking per training prompt")
    non_thinking_samples: int = Field(0, ge=0, description="responses without thinking per training prompt")
    test_samples: int = Field(8, ge=1, description="responses per test prompt")
    recall: bool = Field(
        False, description="rubric: whether policies are also asked the test prompts without thinking, greedily"
    )
    student_samples: int = Field(8, ge=1, description="responses of a student of train_policy per test prompt")
    test_thinking: bool = Field(True, description="whether validation and test prompts are answered with thinking")
    many_prompts: int = Field(64, ge=1, description="test prompts with many responses, whose joint is counted")
    many_samples: int = Field(64, ge=1, description="responses for each of them")
    pool_samples: int = Field(8, ge=1, description="responses per prompt of a pool, on which samplers are replayed")
    pool_prompts: int | None = Field(None, ge=1, description="prompts of a pool, the first ones; null: all")
    dtype: DType = Field("float32", description="numbers that the engine computes in")

    @model_validator(mode="after")
    def _responses_fit(self) -> Rollouts:
        if self.max_new_tokens >= self.max_model_len:
            raise ValueError("max_new_tokens must be below max_model_len, which counts the prompt too")
        if self.thinking_samples + self.non_thinking_samples < 1:
            raise ValueError("at least one thinking or non-thinking sample per training prompt is needed")
        return self


class Judge(Section):
    """An LLM judge that gives an anchored Yes/No verdict."""

    model: str = Field(description="Hub id or local folder")
    revision: str | None = Field(None, description="commit, tag or branch on the Hub; null: the newest")
    max_model_len: int = Field(32768, ge=16, description="tokens of question, response and verdict together")
    max_new_tokens: int = Field(256, ge=1, description="tokens of a verdict")
    dtype: DType = Field("auto", description="numbers that the judge computes in")
    max_unparseable: float = Field(0.05, ge=0, le=1, description="share of verdicts that may be unreadable")


class Grades(Section):
    """Is the answer right? The rule first; the judge, if there is one, for what the rule cannot settle."""

    rule: Literal["exact", "math", "countdown", "gsm8k", "hendrycks", "prime", "by_source", "none"] = Field(
        "exact", description="grader; math: math-verify; by_source: the usual one of the data set a prompt is from"
    )
    style: Literal["strict", "field", "legacy"] = Field(
        "strict",
        description="of the rule countdown: the answer is the expression, is written as models do, or as published; legacy: "
        "prime and by_source compare as published too",
    )
    timeout_s: float = Field(
        5.0, gt=0, description="seconds for one answer; only algebra takes time: math, prime, by_source"
    )
    judge: Judge | None = Field(None, description="null: the rule has the last word")


class Evaluate(Section):
    """What the numbers mean. Intervals are bootstrapped over prompts."""

    bootstrap: int = Field(1000, ge=10, description="resamplings of the prompts")
    confidence: float = Field(0.95, gt=0, lt=1, description="probability that an interval covers")
    ece_bins: int = Field(10, ge=2, description="bins of equal width in calibration errors and curves")
    last_k: int = Field(8, ge=1, description="states at the end of a response over which its prediction is averaged")
    targets: bool = Field(False, description="judge the headline numbers by the targets, which belong to the toy scale")


class Report(Section):
    """The page."""

    rollouts_shown: int = Field(6, ge=0, description="test rollouts on the page, coloured by what the head expects")


class Shared(Section):
    """What every system reads."""

    seed: int = Field(0, ge=0, description="every random choice follows from it")
    systems: tuple[System, ...] = Field(("zip-rc",), min_length=1, description="systems that the experiment builds")
    prompts: Prompts = Prompts()
    base: Base = Base()
    rollouts: Rollouts = Rollouts()
    grades: Grades = Grades()
    evaluate: Evaluate = Evaluate()
    report: Report = Report()
    runtime: Runtime = Runtime()

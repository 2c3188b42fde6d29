"""The sections that every system reads, and the keys of the machine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ziprc.config.base import AdamwRate, LearningRate, Optimisation, OptimizerName, Sampling, Schedule, Section, Warmup


class Prompts(Section):
    """What is asked. `settings` belong to the task; counts are prompts per split."""

    task: str = "arithmetic"
    settings: dict[str, Any] = Field({}, description="keys of the task, see ziprc/tasks/<task>.py")
    train: int = Field(1000, ge=1)
    validation: int = Field(200, ge=1, description="prompts on which samplers are calibrated")
    test: int = Field(200, ge=1)


class Architecture(Section):
    """A small Qwen3."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024
    vocab_size: int = Field(384, description="rows of the output matrix, reserved ones included")
    merges: int = Field(40, description="byte-pair merges learned on the task's words")


class Base(Optimisation):
    """The policy to start from: a Hub id or local folder, or `scratch` to train one on the task's traces."""

    model: str = "scratch"
    revision: str | None = None
    architecture: Architecture = Architecture()
    tokens: int = Field(1_000_000, ge=1000, description="training tokens, prompts included")
    batch_tokens: int = Field(2048, ge=64)
    optimizer: OptimizerName = "muon"
    learning_rate: LearningRate = 5e-3
    adamw_learning_rate: AdamwRate = 3e-3
    warmup: Warmup = 0.02
    schedule: Schedule = "linear"


class Rollouts(Section):
    """Responses per prompt and how they are sampled."""

    engine: Literal["vllm", "hf"] = "vllm"
    sampling: Sampling = Sampling()
    max_model_len: int = Field(512, ge=16, description="prompt and response tokens together")
    max_new_tokens: int = Field(256, ge=1, description="cap on the response")
    thinking_samples: int = Field(2, ge=0, description="per training prompt")
    non_thinking_samples: int = Field(0, ge=0, description="per training prompt")
    test_samples: int = Field(8, ge=1, description="per test prompt")
    test_thinking: bool = True
    many_prompts: int = Field(64, ge=1, description="test prompts that get many rollouts, for the empirical joint")
    many_samples: int = Field(64, ge=1)
    pool_samples: int = Field(8, ge=1, description="per prompt of a pool: what adaptive samplers are replayed on")
    pool_prompts: int | None = Field(None, ge=1, description="prompts of a pool, the first ones; empty: all of them")
    shard_prompts: int = Field(512, ge=1, description="prompts per shard: what is kept after a kill")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"


class Judge(Section):
    """An LLM judge that gives an anchored Yes/No verdict."""

    model: str
    revision: str | None = None
    max_model_len: int = 32768
    max_new_tokens: int = 256
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    max_unparseable: float = Field(
        0.05, ge=0, le=1, description="a larger share of unreadable verdicts fails the stage"
    )


class Grades(Section):
    """Is the answer right? The rule grader first; the judge, if there is one, for what the rule cannot settle."""

    rule: Literal["exact", "math", "countdown", "none"] = "exact"
    timeout_s: float = Field(5.0, gt=0)
    judge: Judge | None = None


class Evaluate(Section):
    """What the numbers mean. Intervals are bootstrapped over prompts."""

    bootstrap: int = Field(1000, ge=10)
    confidence: float = Field(0.95, gt=0, lt=1)
    ece_bins: int = Field(10, ge=2)
    last_k: int = Field(8, ge=1, description="states averaged at the end of a response")
    targets: bool = Field(False, description="judge the headline numbers by the targets, which belong to the toy scale")


class Report(Section):
    """The page."""

    rollouts_shown: int = Field(6, ge=0)

"""What sections are made of, the names of the systems, and the keys of the machine.

Every key says here what it means, in which unit and in which range; `docs/config.md` and the editors' schema are made of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

System = Literal["zip-rc", "icl-v", "countdown-rl", "reasoning-vocabulary", "rubric"]
SYSTEMS: tuple[str, ...] = get_args(System)


class Section(BaseModel):
    """Strict: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampling(Section):
    """How one policy draws its tokens."""

    temperature: float = Field(1.0, ge=0, description="divides the logits; 0: the likeliest token")
    min_p: float = Field(0.1, ge=0, le=1, description="least probability of a token, as a share of the likeliest one's")
    top_p: float = Field(1.0, gt=0, le=1, description="probability mass that is kept, likeliest tokens first")
    top_k: int = Field(0, ge=0, description="tokens that are kept; 0: every one")


GREEDY = Sampling(temperature=0, min_p=0)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]  # of what a user adds to a list; part of file names
OptimizerName = Annotated[
    Literal["adamw", "muon"],
    Field(description="muon: for the hidden matrices, with AdamW for embeddings, output matrix and norms"),
]
LearningRate = Annotated[float, Field(gt=0, description="the highest of the run, per step")]
AdamwRate = Annotated[
    Annotated[float, Field(gt=0)] | None, Field(description="for what AdamW trains next to Muon; empty: the same")
]
Warmup = Annotated[float, Field(ge=0, lt=1, description="share of the steps in which the rate rises to its highest")]
Schedule = Annotated[
    Literal["cosine", "linear", "constant"],
    Field(description="how the rate falls to zero after warm-up, or that it does not"),
]


class Optimisation(Section):
    """How weights move: the optimizer, its rates and their schedule."""

    optimizer: OptimizerName = "adamw"
    learning_rate: LearningRate = 3e-5
    adamw_learning_rate: AdamwRate = None
    weight_decay: float = Field(
        0.0, ge=0, description="share of a weight that a step takes away, times the learning rate"
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="share that AdamW's means of the gradient and of its square keep per step"
    )
    warmup: Warmup = 0.05
    schedule: Schedule = "cosine"
    max_grad_norm: float = Field(1.0, gt=0, description="a gradient with a larger 2-norm is scaled down to it")


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` laid over `low`, key by key; lists are replaced. Neither input changes."""
    out = copy.deepcopy(dict(low))
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else copy.deepcopy(value)
    return out


def laid_beneath(given: Any, members: str, kind: type[Section]) -> Any:
    """A raw section whose `defaults` lie beneath each of its named `members`, which are sections of one `kind`.

    What has another shape is left for the checks of both to refuse.
    """
    defaults, own = (given.get(key) or {} if isinstance(given, Mapping) else None for key in ("defaults", members))
    if not isinstance(defaults, Mapping) or not isinstance(own, Mapping):
        return given
    defaults = {key: value for key, value in defaults.items() if key in kind.model_fields}
    laid = {n: merge(defaults, m or {}) if m is None or isinstance(m, Mapping) else m for n, m in own.items()}
    return {**given, members: laid}


Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def _increasing(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError("must increase strictly")
    return values


Increasing = AfterValidator(_increasing)

DType = Literal["float32", "bfloat16", "float16", "auto"]
# What transformers' Trainer can report to (a test compares).
Tracker = Literal[
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune", "swanlab",
    "tensorboard", "trackio", "wandb",
]  # fmt: skip


class Runtime(Section):
    """How it is computed, not what: no key here is a param of a rule, so none triggers a rebuild."""

    accelerate: str = Field("cpu", description="launch profile of training, from profiles/accelerate/")
    workers: int = Field(1, ge=1, description="engine processes side by side, each with the whole model")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one copy of the policy")
    judge_tensor_parallel: int = Field(1, ge=1, description="GPUs that share one copy of the judge")
    max_num_seqs: int = Field(256, ge=1, description="responses in flight per engine")
    shard_prompts: int = Field(512, ge=1, description="prompts per piece of rollouts; a kill loses those in the making")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory that vLLM takes")
    kv_cache_gib: int = Field(1, ge=1, description="GiB of keys and values that a vLLM engine on the CPU holds")
    enforce_eager: bool = Field(True, description="vLLM without compilation: starts sooner, decodes slower")
    stall_limit_s: float = Field(900, gt=0, description="seconds after which a step of an engine is ended as stuck")
    rollouts_per_device: int = Field(16, ge=1, description="rollouts per micro-batch; batch_size adds them up")
    forward_tokens: int = Field(16384, ge=64, description="tokens per forward pass when states are read")
    position_chunk: int = Field(1024, ge=1, description="states whose logits are held at once")
    bf16: bool = Field(False, description="bfloat16 autocast in training; master weights stay float32")
    gradient_checkpointing: bool = Field(False, description="compute activations twice to hold fewer of them")
    attention: Literal["sdpa", "flash_attention_2", "eager"] = Field("sdpa", description="attention kernel in training")
    mismatch: float = Field(
        1e-3, gt=0, description="KL in nats a token between sampler and on-policy trainer above which stderr warns"
    )
    grader: str = Field(
        "hf",
        description="what serves a grader while a policy trains: hf or vllm, in a process of its own; or the address of a server",
    )
    grader_model: str | None = Field(
        None, description="a server by address: the name of its model; null: the only one it has"
    )
    grader_memory: float = Field(0.3, gt=0, le=1, description="share of a GPU's memory of a vLLM that serves a grader")
    grader_requests: int = Field(64, ge=1, description="questions to a grader that are in flight at once")
    grader_deadline_s: float = Field(120.0, gt=0, description="seconds that an answer of a grader may take")
    grader_start_s: float = Field(900.0, gt=0, description="seconds that a server of a grader may take to be ready")
    grader_restarts: int = Field(3, ge=0, description="times that a dead server of a grader is started again")
    save_steps: int = Field(100, ge=1, description="optimiser steps between training states kept for resuming")
    trackers: tuple[Tracker, ...] = Field((), description="where training reports its metrics besides the log")
    gpus: int = Field(0, ge=0, description="GPUs of one node; 0: every stage runs on the CPU")
    nodes: int = Field(1, ge=1, description="nodes of a training stage; the others use one")
    mem_mb: int = Field(3000, ge=1, description="MB of memory of a stage, per node; a retry asks for more")
    cpu_mem_mb: int | None = Field(None, ge=1, description="MB of memory of a stage that needs no GPU; null: mem_mb")
    runtime_min: int = Field(120, ge=1, description="minutes that a cluster is asked for, per stage")

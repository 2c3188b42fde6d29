"""What sections are made of."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Strict: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampling(Section):
    """Sampling settings of one policy."""

    temperature: float = Field(1.0, ge=0)
    min_p: float = Field(0.1, ge=0, le=1)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps every token")


OptimizerName = Annotated[
    Literal["adamw", "muon"],
    Field(description="muon: for the hidden matrices, with AdamW for embeddings, output matrix and norms"),
]
LearningRate = Annotated[float, Field(gt=0, description="the highest of the run, per step")]
AdamwRate = Annotated[
    Annotated[float, Field(gt=0)] | None, Field(description="for what AdamW trains next to Muon; empty: the same")
]
Warmup = Annotated[float, Field(ge=0, lt=1, description="share of the steps in which the rate rises to its highest")]
Schedule = Annotated[Literal["cosine", "linear"], Field(description="how the rate falls to zero after warm-up")]


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


Unit = Annotated[float, Field(ge=0, le=1)]


def _increasing(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError("must increase strictly")
    return values


Increasing = AfterValidator(_increasing)


class Runtime(Section):
    """Never triggers a rebuild."""

    accelerate: str = Field("cpu", description="profiles/accelerate/<name>.yaml for training")
    workers: int = Field(1, ge=1, description="data-parallel engine processes")
    tensor_parallel: int = Field(1, ge=1)
    judge_tensor_parallel: int = Field(1, ge=1)
    max_num_seqs: int = Field(256, ge=1, description="responses in flight per engine")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    kv_cache_gib: int = Field(1, ge=1, description="of a CPU engine")
    enforce_eager: bool = True
    stall_limit_s: float = Field(900, gt=0, description="an engine whose step takes longer is ended, with a reason")
    rollouts_per_device: int = Field(16, ge=1, description="micro-batch; accumulation follows from batch_size")
    forward_tokens: int = Field(16384, ge=64, description="tokens per forward pass when states are read")
    position_chunk: int = Field(1024, ge=1, description="states per chunk of the KL")
    bf16: bool = Field(False, description="autocast; master weights stay float32")
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    save_steps: int = Field(100, ge=1, description="steps between training states kept for resuming")
    trackers: tuple[str, ...] = ()
    gpus: int = Field(0, ge=0, description="of one node; 0: every stage runs on the CPU")
    nodes: int = Field(1, ge=1, description="of a training stage; the others use one")
    mem_mb: int = Field(3000, ge=1, description="of a stage, per node; a retry asks for more")
    cpu_mem_mb: int | None = Field(None, ge=1, description="of a stage that needs no GPU; empty: mem_mb")
    runtime_min: int = 120

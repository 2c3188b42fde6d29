"""What the on-policy trainer is given: who samples, who is judged while it learns, and our settings in TRL's words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

with warnings.catch_warnings():  # of a newer vLLM than TRL knows, which is of no matter where ours samples
    warnings.simplefilter("ignore", UserWarning)
    from trl import GRPOConfig

from ziprc.config.base import Runtime
from ziprc.config.online import Arm, TrainOnline
from ziprc.engines.base import Engine
from ziprc.joint.reasoning import ReasoningVocabulary
from ziprc.joint.vocabulary import IdRange
from ziprc.training.account import Row
from ziprc.training.durable import machine_arguments
from ziprc.training.micro import Sizes
from ziprc.training.predicted import Predictor


@dataclass(frozen=True)
class Sampler:
    """Who samples: our engine, or None where TRL's own vLLM does; which ids end a response, which rows are never drawn."""

    engine: Engine | None
    stops: tuple[int, ...]
    banned: tuple[IdRange, ...]
    cap: int  # tokens of a response, at most
    context: int  # of prompt and response together
    reasoning: ReasoningVocabulary | None = None  # copies that it may use in the thinking block
    predictor: Predictor | None = None  # which stops responses, where the window is predicted


@dataclass(frozen=True)
class HeldOut:
    """Prompts that the policy is judged on while it learns, and how they are asked. They move nothing."""

    prompts: Sequence[Row]
    token_ids: Sequence[Sequence[int]]
    every: int  # rollouts
    samples: int


def grpo_config(
    arm: Arm, own: TrainOnline, runtime: Runtime, sampler: Sampler, sizes: Sizes, folder: Path, seed: int
) -> GRPOConfig:
    """Our settings in TRL's words."""
    theirs: dict[str, Any] = {}
    if sampler.engine is None:
        allowed = sorted(
            set(range(max(b for _, b in sampler.banned))) - {i for a, b in sampler.banned for i in range(a, b)}
        )
        theirs = {
            "use_vllm": True, "vllm_mode": own.engine, "vllm_tensor_parallel_size": runtime.tensor_parallel,
            "vllm_gpu_memory_utilization": runtime.gpu_memory_utilization, "vllm_max_model_length": sampler.context,
            "generation_kwargs": {"allowed_token_ids": allowed} if sampler.banned else None,
        }  # fmt: skip
    return GRPOConfig(
        **machine_arguments(runtime, folder, seed, arm.max_grad_norm), **theirs,
        per_device_train_batch_size=sizes.micro, gradient_accumulation_steps=sizes.accumulation,
        steps_per_generation=sizes.steps, num_iterations=arm.passes, max_steps=arm.rollouts * sizes.updates,
        num_generations=arm.samples, max_completion_length=sampler.cap, save_strategy="no",
        temperature=arm.temperature, top_p=1.0, top_k=0, min_p=None, beta=arm.beta, epsilon=arm.clip_low,
        epsilon_high=arm.clip_high, loss_type=arm.loss, scale_rewards=arm.scale, mask_truncated_completions=arm.mask_truncated,
        reward_weights=[of.weight for of in arm.rewards.values()], chat_template_kwargs={"enable_thinking": own.thinking},
        gradient_checkpointing=runtime.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip

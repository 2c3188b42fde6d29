"""What a live run needs besides the runner: the engine, the questions, and who reads their answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ziprc.chat import prompt_token_ids
from ziprc.config.load import Config
from ziprc.engines import start
from ziprc.engines.base import Engine, settings_for
from ziprc.joint.head import read_joint_head
from ziprc.sampling.controller import Budget
from ziprc.sampling.families import Setting
from ziprc.sampling.live.records import Question
from ziprc.store.digests import derived_seed

UNLIMITED = 1 << 30


class AnswerBook:
    """Numbers the canonical answers of every prompt, and remembers their texts."""

    def __init__(self, task: Any, tokenizer: Any, stops: Sequence[int]) -> None:
        self.task, self.tokenizer, self.stops = task, tokenizer, frozenset(stops)
        self.numbers: dict[tuple[int, str], int] = {}

    def text(self, token_ids: Sequence[int]) -> str:
        """A response without its stop token, special tokens kept."""
        kept = token_ids[:-1] if token_ids and token_ids[-1] in self.stops else token_ids
        return self.tokenizer.decode(list(kept), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def __call__(self, prompt: int, token_ids: Sequence[int]) -> int | None:
        found = self.task.canonical_answer(self.text(token_ids))
        return None if found is None else self.numbers.setdefault((prompt, found), len(self.numbers))


def questions_of(prompts: Sequence[Mapping[str, Any]], tokenizer: Any, config: Config) -> list[Question]:
    """Prompts as the live runner takes them."""
    thinking = config.rollouts.test_thinking
    return [
        Question(
            p["prompt_id"],
            tuple(prompt_token_ids(tokenizer, p["messages"], thinking)),
            derived_seed(config.seed, "samples", p["prompt_id"]),
        )
        for p in prompts
    ]


def budget_of(config: Config, setting: Setting) -> Budget:
    """The hard limits of a prompt; UserError when they leave no room for one decision."""
    own = config.samples
    return Budget(own.branches, own.max_tokens or UNLIMITED, own.max_latency or UNLIMITED, setting.interval)


@contextlib.contextmanager
def open_engine(config: Config, folder: Any, tokenizer: Any) -> Iterator[Engine]:
    """The engine of the rollouts, reading the joint."""
    own, machine = config.rollouts, config.runtime
    settings = settings_for(folder, tokenizer, own, own.sampling, machine, machine.tensor_parallel)
    with contextlib.closing(start(own.engine, replace(settings, joint=read_joint_head(folder)))) as engine:
        yield engine

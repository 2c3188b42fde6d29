"""A live run: the engine, the questions, who reads their answers, and the time it took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ziprc.chat import prompt_token_ids, visible_answer
from ziprc.config.load import Config
from ziprc.engines import start
from ziprc.engines.base import Engine, settings_for
from ziprc.joint.head import read_joint_head
from ziprc.progress import progress
from ziprc.sampling.controller import Budget, Controller
from ziprc.sampling.families import Setting
from ziprc.sampling.live.records import Answered, Question, Timing
from ziprc.sampling.live.runner import Runner
from ziprc.store.digests import derived_seed
from ziprc.tables.rollouts import FinishReason
from ziprc.tasks.base import get_task

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
    ids = ((p["prompt_id"], tuple(prompt_token_ids(tokenizer, p["messages"], thinking))) for p in prompts)
    return [Question(key, prompt, derived_seed(config.seed, "samples", key)) for key, prompt in ids]


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


@dataclass(frozen=True)
class Run:
    """Answers in the order of the questions, visible texts by (question, slot) where a branch ended by itself, and times."""

    answers: list[Answered]
    texts: dict[tuple[int, int], str]
    timing: Timing


def play(
    engine: Engine,
    config: Config,
    tokenizer: Any,
    questions: Sequence[Question],
    setting: Setting,
    in_flight: int,
    title: str,
) -> Run:
    """Answer the questions with one setting, `in_flight` prompts at a time."""
    book = AnswerBook(get_task(config.prompts.task), tokenizer, engine.settings.stop_token_ids)
    controller = Controller(setting.policy, budget_of(config, setting))
    options = dict(
        window=setting.window, max_new_tokens=config.rollouts.max_new_tokens, in_flight=in_flight,
        cells=engine.settings.joint.grid.size,
    )  # fmt: skip
    answers = []
    with contextlib.closing(engine.session()) as session, progress(len(questions), title, "prompts") as bar:
        runner = Runner(session, controller, questions, book, new_session=engine.session, **options)
        for answer in runner.run():
            answers.append(answer)
            bar.update(1)
    texts = {
        (answer.index, slot): visible_answer(book.text(branch.token_ids))
        for answer in answers
        for slot, branch in enumerate(answer.branches)
        if branch.finish_reason is FinishReason.STOP
    }
    return Run(sorted(answers, key=lambda a: a.index), texts, runner.timing)

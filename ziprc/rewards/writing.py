"""A model that is asked many things at once and whose words are read: who writes rubrics, and who teaches by assessments."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ziprc.chat import prompt_token_ids
from ziprc.config.base import GREEDY
from ziprc.config.load import Config
from ziprc.config.rubric import Writer
from ziprc.engines import start
from ziprc.engines.base import Request, settings_for
from ziprc.joint.hub import local_model
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.progress import progress
from ziprc.rewards.base import QUIET_S
from ziprc.rewards.judge import control_strings
from ziprc.rewards.rubric import Messages
from ziprc.tables.rollouts import FinishReason


class WrittenBy:
    """A context manager: it owns the engine, which starts with the first question."""

    def __init__(self, config: Config, own: Writer, key: str) -> None:
        """`key` is where the configuration names the model. UserError for a model that is not at hand."""
        folder = local_model(own.model, own.revision, f"{key}.model")
        self.own, self.key, self.kind = own, key, config.rollouts.engine
        self.tokenizer = load_tokenizer(folder)
        machine = config.runtime
        self.settings = settings_for(folder, self.tokenizer, own, GREEDY, machine, machine.judge_tensor_parallel)
        self.forbidden = control_strings(self.tokenizer)
        self.stack = contextlib.ExitStack()
        self.engine = None

    def __enter__(self) -> WrittenBy:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def ask(self, questions: Sequence[Messages], title: str, seed: int = 0) -> list[tuple[str, bool] | None]:
        """Text and whether it ended by itself, in order; None for a question that leaves no room for an answer."""
        requests, most = {}, self.own.max_model_len - self.own.max_new_tokens
        for i, messages in enumerate(questions):
            ids = prompt_token_ids(self.tokenizer, messages, thinking=False)
            if len(ids) <= most:
                requests[i] = Request(str(i), tuple(ids), seed + i, self.own.max_new_tokens)
        if requests and self.engine is None:
            self.engine = self.stack.enter_context(contextlib.closing(start(self.kind, self.settings)))
        with progress(len(requests), title, "texts", after_s=QUIET_S) as bar:
            found = (
                self.engine.generate(list(requests.values()), lambda _: bar.update(1))
                if self.engine and requests
                else []
            )
        texts = {
            i: (
                self.tokenizer.decode(one.token_ids, skip_special_tokens=True).strip(),
                one.finish_reason is FinishReason.STOP,
            )
            for i, one in zip(requests, found, strict=True)
        }
        return [texts.get(i) for i in range(len(questions))]

"""Scores from a model behind the OpenAI chat API, asked for while a policy trains.

One pool of connections, a bound on questions in flight, a deadline from when a question is sent. Equal questions are asked
once, also the eight of a group that come at the same moment, and remembered. Trouble on the way (transport, 408, 409, 429,
5xx) is tried again with back-off by OpenAI's own client; what stays without an answer has *no score*, and never a score of 0.
An answer that cannot be read is a fact about the grader and is not asked for again: another temperature would be another
grader. Where not one question of a batch was answered, the server is looked after and asked once more, and then it is an
error (`Dark`), before anything is learned from nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import httpx
import numpy as np
import openai

from ziprc.engines.server import Address
from ziprc.errors import Dark, UserError
from ziprc.rewards.base import Grade, ungraded
from ziprc.store.digests import digest_json
from ziprc.tables.grades import GradeStatus

Messages = Sequence[Mapping[str, str]]
REMEMBERED = 1 << 16  # grades
FACTS = (400, 413, 422)  # statuses that are about the question, not about the server


class Serves(Protocol):
    """Whoever keeps a model up (engines/server.py)."""

    address: Address

    def ensure(self) -> None: ...


class Scorer:
    """Grades of questions, in order; a context manager. `read` turns an answer, and whether it ended by itself, into a grade."""

    def __init__(
        self, server: Serves, read: Callable[[str, bool], Grade], max_new_tokens: int, concurrency: int = 64,
        deadline_s: float = 120.0, tries: int = 3,
    ) -> None:  # fmt: skip
        self.server, self.read, self.max_new_tokens = server, read, max_new_tokens
        self.concurrency, self.deadline_s, self.tries = concurrency, deadline_s, tries
        self.known: OrderedDict[str, Grade] = OrderedDict()
        self.runner = asyncio.Runner()
        self.client: openai.AsyncOpenAI | None = None
        self.saved = 0
        self.waits: list[float] = []  # seconds from a question to its answer

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        if self.client is not None:
            self.runner.run(self.client.close())
        self.runner.close()

    def grade(self, questions: Sequence[Messages]) -> list[Grade]:
        """One grade a question. Raises Dark when none of what had to be asked was answered, and what `ensure` raises."""
        keys = [digest_json(list(map(dict, messages))) for messages in questions]
        wanted = {key: messages for key, messages in zip(keys, questions, strict=True) if key not in self.known}
        found = {key: self.known[key] for key in keys if key in self.known}
        self.saved += len(questions) - len(wanted)
        if wanted:
            found |= self.runner.run(self._ask(wanted))
            lost = {key: wanted[key] for key in wanted if found[key].status == GradeStatus.UNSCORED}
            if lost:
                try:
                    self.server.ensure()
                except UserError as error:
                    raise Dark(
                        f"{len(lost)} of {len(wanted)} questions to the grader were not answered. {error}"
                    ) from None
                found |= self.runner.run(self._ask(lost))
                if len(lost) == len(wanted) and all(found[key].status == GradeStatus.UNSCORED for key in lost):
                    why = found[next(iter(lost))].rationale
                    raise Dark(
                        f"Not one of {len(lost)} questions to the grader was answered, though the server was seen to: {why}."
                    )
        for key in wanted:
            if found[key].status != GradeStatus.UNSCORED:
                self.known[key] = found[key]
        while len(self.known) > REMEMBERED:
            self.known.popitem(last=False)
        return [found[key] for key in keys]

    def counts(self) -> dict[str, float]:
        """Since the last call: questions that were saved, and quantiles of the seconds that answers took."""
        saved, waits, self.saved, self.waits = self.saved, self.waits, 0, []
        quantiles = {f"seconds_answer_p{q}": float(np.quantile(waits, q / 100)) for q in (50, 95) if waits}
        return {"saved": saved, **quantiles}

    async def _ask(self, wanted: Mapping[str, Messages]) -> dict[str, Grade]:
        address = self.server.address
        if (
            self.client is None
            or str(self.client.base_url).rstrip("/") != address.url
            or self.client.api_key != address.key
        ):
            if self.client is not None:
                await self.client.close()
            limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
            self.client = openai.AsyncOpenAI(
                base_url=address.url, api_key=address.key, max_retries=self.tries - 1, timeout=self.deadline_s,
                http_client=httpx.AsyncClient(limits=limits, timeout=self.deadline_s, trust_env=False),
            )  # fmt: skip
        room = asyncio.Semaphore(self.concurrency)
        grades = await asyncio.gather(*(self._one(address, messages, room) for messages in wanted.values()))
        return dict(zip(wanted, grades, strict=True))

    async def _one(self, address: Address, messages: Messages, room: asyncio.Semaphore) -> Grade:
        assert self.client is not None
        async with room:
            sent = time.monotonic()
            try:
                async with asyncio.timeout(self.deadline_s):
                    answer: Any = await self.client.chat.completions.create(
                        model=address.model, messages=list(messages), temperature=0, max_tokens=self.max_new_tokens,
                        extra_body=dict(address.extra),
                    )  # fmt: skip
                choice = answer.choices[0]
                text, ended, named = choice.message.content or "", choice.finish_reason == "stop", answer.model
                if not isinstance(text, str) or named != address.model:
                    return ungraded(GradeStatus.UNSCORED, f"another model answered: {str(named)[:100]}")
            except openai.APIStatusError as error:
                status = GradeStatus.ERROR if error.status_code in FACTS else GradeStatus.UNSCORED
                return ungraded(status, f"{error.status_code}: {error.message}")
            except TimeoutError:
                return ungraded(
                    GradeStatus.UNSCORED, f"no answer within {self.deadline_s:g} s (runtime.grader_deadline_s)"
                )
            except (openai.OpenAIError, httpx.HTTPError, ValueError, TypeError, AttributeError, LookupError) as error:
                return ungraded(GradeStatus.UNSCORED, f"{type(error).__name__}: {error}")
            self.waits.append(time.monotonic() - sent)
        return self.read(text, ended)

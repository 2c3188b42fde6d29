"""Scores from a model behind the OpenAI chat API, asked for while a policy trains.

One pool of connections, a bound on questions in flight, a deadline from when a question is sent. Equal questions are asked
once, also the eight of a group that come at the same moment, and remembered. Trouble on the way (transport, 408, 409, 429,
5xx) is tried again with back-off by OpenAI's own client; what stays without an answer has *no score*, and never a score of 0.
An answer that cannot be read is a fact about the grader and is not asked for again: another temperature would be another
grader. Where not one question of a batch was answered, the server is looked after and asked once more, and then it is an
error (`Dark`), before anything is learned from nothing. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
FACTS = (400, 413, 422)  # statuses that are about the question; other 4xx (key, model) are about the server
ENDS = {"stop": True, "length": False}  # finish reasons of a model's own; with any other the answer was broken off
MOST_BYTES = 8 << 20  # of a body: no grader says that much


class Serves(Protocol):
    """Whoever keeps a model up (engines/server.py)."""

    address: Address

    def ensure(self) -> None: ...


class Scorer:
    """Grades of questions, in order; a context manager. `read` turns an answer, and whether it ended by itself, into a grade.

    `deadline_s` is that of a question from when it is sent, all its `tries` together; `concurrency` questions are in flight.
    `totals` counts, from the beginning: questions `asked` of the server, `saved` since an equal one was, grades that were left
    `unscored`, `prompt_tokens` and `completion_tokens` of the answers.
    """

    def __init__(
        self, server: Serves, read: Callable[[str, bool], Grade], max_new_tokens: int, concurrency: int = 64,
        deadline_s: float = 120.0, tries: int = 3,
    ) -> None:  # fmt: skip
        self.server, self.read, self.max_new_tokens = server, read, max_new_tokens
        self.concurrency, self.deadline_s, self.tries = concurrency, deadline_s, tries
        self.known: OrderedDict[str, Grade] = OrderedDict()
        self.lock = threading.Lock()
        self.runner = asyncio.Runner()
        self.client: openai.AsyncOpenAI | None = None
        self.saved = 0
        self.waits: list[float] = []  # seconds from a question to its answer
        self.totals: Counter[str] = Counter()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        if self.client is not None:
            self.runner.run(self.client.close())
        self.runner.close()

    def grade(self, questions: Sequence[Messages]) -> list[Grade]:
        """One grade a question. Dark when none of what had to be asked was answered.

        Not to be called where an event loop runs; threads wait for each other.
        """
        keys = [digest_json(list(map(dict, messages))) for messages in questions]
        with self.lock:
            wanted = {key: messages for key, messages in zip(keys, questions, strict=True) if key not in self.known}
            found = {key: self.known[key] for key in keys if key in self.known}
            self.saved += len(questions) - len(wanted)
            self.totals["saved"] += len(questions) - len(wanted)
            if wanted:
                found |= self._answered(wanted)
            self.known |= {key: found[key] for key in wanted if found[key].status != GradeStatus.UNSCORED}
            while len(self.known) > REMEMBERED:
                self.known.popitem(last=False)
        grades = [found[key] for key in keys]
        self.totals["unscored"] += sum(grade.status == GradeStatus.UNSCORED for grade in grades)
        return grades

    def _answered(self, wanted: Mapping[str, Messages]) -> dict[str, Grade]:
        """Grades by key. What has none is asked for once more after a look at the server; Dark when nothing has one then."""
        found = self.runner.run(self._ask(wanted))
        lost = {key: wanted[key] for key, grade in found.items() if grade.status == GradeStatus.UNSCORED}
        if not lost:
            return found
        said = f"{len(lost)} of {len(wanted)} questions to the grader were not answered ({found[next(iter(lost))].rationale})"
        try:
            self.server.ensure()
        except UserError as error:
            if len(lost) == len(wanted):
                raise Dark(f"{said}, and nothing was learned from them. {error}") from None
            print(f"{said} and have no score. {error}", file=sys.stderr, flush=True)
            return found
        found |= self.runner.run(self._ask(lost))
        if len(lost) == len(wanted) and all(found[key].status == GradeStatus.UNSCORED for key in lost):
            why = found[next(iter(lost))].rationale
            raise Dark(
                f"Not one of {len(lost)} questions to the grader was answered, also after a look at its server: {why}. Nothing "
                "was learned from them."
            )
        return found

    def counts(self) -> dict[str, float]:
        """Since the last call: questions that were saved, and quantiles of the seconds that answers took."""
        saved, waits, self.saved, self.waits = self.saved, self.waits, 0, []
        quantiles = {f"seconds_answer_p{q}": float(np.quantile(waits, q / 100)) for q in (50, 95) if waits}
        return {"saved": saved, **quantiles}

    async def _ask(self, wanted: Mapping[str, Messages]) -> dict[str, Grade]:
        self.totals["asked"] += len(wanted)
        address = self.server.address
        await self._connect(address)
        room = asyncio.Semaphore(self.concurrency)
        grades = await asyncio.gather(*(self._one(address, messages, room) for messages in wanted.values()))
        return dict(zip(wanted, grades, strict=True))

    async def _connect(self, address: Address) -> None:
        """Have a client of this address: a server that was started again is at another."""
        if self.client is not None:
            if (str(self.client.base_url).rstrip("/"), self.client.api_key) == (address.url, address.key):
                return
            await self.client.close()
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        self.client = openai.AsyncOpenAI(
            base_url=address.url, api_key=address.key, max_retries=self.tries - 1, timeout=self.deadline_s,
            http_client=httpx.AsyncClient(
                limits=limits, timeout=self.deadline_s, trust_env=not address.local, verify=not address.local,
                headers={"Accept-Encoding": "identity"}, event_hooks={"response": [_bound]},
            ),
        )  # fmt: skip

    async def _one(self, address: Address, messages: Messages, room: asyncio.Semaphore) -> Grade:
        """The grade of one question. Whatever goes wrong on the way is data: it must not end training, nor be a score."""
        assert self.client is not None
        async with room:
            sent = time.monotonic()
            try:
                async with asyncio.timeout(self.deadline_s):
                    answer: Any = await self.client.chat.completions.create(
                        model=address.model, messages=list(messages), temperature=0, max_tokens=self.max_new_tokens,
                        extra_body=dict(address.extra),
                    )  # fmt: skip
                text, ended = _said(answer, address.model)
                for name in ("prompt_tokens", "completion_tokens"):
                    count = getattr(getattr(answer, "usage", None), name, None)
                    self.totals[name] += count if isinstance(count, int) else 0
            except openai.APIStatusError as error:
                status = GradeStatus.ERROR if error.status_code in FACTS else GradeStatus.UNSCORED
                return ungraded(status, f"{error.status_code}: {error.message}")
            except UnicodeEncodeError as error:  # half a character: the question cannot be sent to anybody
                return ungraded(GradeStatus.ERROR, f"{error}")
            except TimeoutError:
                return ungraded(
                    GradeStatus.UNSCORED, f"no answer within {self.deadline_s:g} s (runtime.grader_deadline_s)"
                )
            except Exception as error:  # the boundary: whatever else a server does is recorded as no score
                cause = f" ({error.__cause__!r})" if error.__cause__ else ""
                return ungraded(GradeStatus.UNSCORED, f"{type(error).__name__}: {error}{cause}")
            self.waits.append(time.monotonic() - sent)
        return self._read(text, ended)

    def _read(self, text: str, ended: bool) -> Grade:
        """What `read` makes of it, held to its contract, also where assertions are off."""
        try:
            grade = self.read(text, ended)
        except Exception as error:
            return ungraded(GradeStatus.UNPARSEABLE, f"{type(error).__name__}: {error}")
        if grade.score is not None and not 0 <= grade.score <= 1:  # NaN is in no range
            return ungraded(GradeStatus.UNPARSEABLE, f"a score of {grade.score} outside [0, 1]")
        return grade


def _said(answer: Any, model: str) -> tuple[str, bool]:
    """Text of a well-formed answer of our model, and whether it ended by itself. Raises whatever another shape leads to."""
    choice = answer.choices[0]
    text = choice.message.content
    text = "" if text is None else text
    if answer.model != model:
        raise ValueError(f"another model answered: {str(answer.model)[:100]}")
    if not isinstance(text, str):
        raise ValueError(f"text is expected, found {type(text).__name__}")
    if choice.finish_reason not in ENDS:
        raise ValueError(f"the answer was broken off: {str(choice.finish_reason)[:100]}")
    return text, ENDS[choice.finish_reason]


async def _bound(response: httpx.Response) -> None:
    """Let a response end as a failure of transport once it is longer than any answer."""
    assert isinstance(response.stream, httpx.AsyncByteStream)
    response.stream = _Bounded(response.stream)


class _Bounded(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self.stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self.stream:
            size += len(part)
            if size > MOST_BYTES:
                raise httpx.ReadError(f"a body of more than {MOST_BYTES >> 20} MiB")
            yield part

    async def aclose(self) -> None:
        await self.stream.aclose()

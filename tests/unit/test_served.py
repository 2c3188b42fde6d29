"""The client of a served grader, against real little servers that misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ziprc.engines.server import Address
from ziprc.errors import Dark, UserError
from ziprc.rewards.rubric import read_total
from ziprc.rewards.served import Scorer
from ziprc.tables.grades import GradeStatus

MODEL = "grader-1"
GOOD = "1 4 4 ok 3\nTotal Score: 7/10 points"


def answer(text: Any = GOOD, model: str = MODEL, reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": model,
        "choices": [{"index": 0, "finish_reason": reason, "message": message}],
    }  # fmt: skip


@dataclass
class Fake:
    """What the next requests get: a status and a body each, or a function of the handler; then good answers."""

    script: list[Any] = field(default_factory=list)
    by_content: Callable[[str], Any] | None = None
    seen: Counter[str] = field(default_factory=Counter)
    most: int = 0
    now: int = 0
    pause: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    address: Address = field(default_factory=lambda: Address("", "", "", {}))
    ensured: int = 0
    on_ensure: Callable[[], None] = lambda: None

    def ensure(self) -> None:
        self.ensured += 1
        self.on_ensure()


@contextmanager
def serving(**own: Any) -> Iterator[Fake]:
    fake = Fake(**own)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = body["messages"][-1]["content"]
            with fake.lock:
                fake.seen[content] += 1
                fake.now += 1
                fake.most = max(fake.most, fake.now)
                step = fake.script.pop(0) if fake.script else None
            if step is None and fake.by_content is not None:
                step = fake.by_content(content)
            try:
                time.sleep(fake.pause)
                if callable(step):
                    step(self)
                    return
                status, sent = step if step is not None else (200, answer())
                raw = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except BrokenPipeError:
                pass
            finally:
                with fake.lock:
                    fake.now -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.address = Address(f"http://127.0.0.1:{server.server_port}/v1", "key", MODEL, {})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def scorer(fake: Fake, **own: Any) -> Scorer:
    return Scorer(fake, read_total, 80, **{"deadline_s": 5.0, "tries": 1, **own})


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1.0)


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.close()


def test_answers_come_in_order_and_are_read() -> None:
    def by_content(content: str) -> Any:
        return 200, answer(f"Total Score: {int(content) % 11}/10")

    with serving(by_content=by_content) as fake, scorer(fake) as asks:
        grades = asks.grade([question(str(i)) for i in range(40)])
    assert [round((g.score or 0) * 10) for g in grades] == [i % 11 for i in range(40)]


def test_equal_questions_are_asked_once_and_remembered() -> None:
    with serving() as fake, scorer(fake) as asks:
        grades = asks.grade([question("a")] * 8 + [question("b")] * 3)
        again = asks.grade([question("b"), question("c")])
        assert asks.counts()["saved"] == 10
    assert fake.seen == {"a": 1, "b": 1, "c": 1}
    assert {g.score for g in [*grades, *again]} == {0.7}


def test_no_more_questions_are_in_flight_than_allowed() -> None:
    with serving(pause=0.05) as fake, scorer(fake, concurrency=3) as asks:
        asks.grade([question(str(i)) for i in range(12)])
    assert 1 < fake.most <= 3


def test_a_deadline_begins_when_a_question_is_sent() -> None:
    with serving(pause=0.3) as fake, scorer(fake, concurrency=1, deadline_s=0.9) as asks:
        grades = asks.grade([question(str(i)) for i in range(6)])  # 1.8 s in all
    assert {g.score for g in grades} == {0.7}


@pytest.mark.parametrize(
    ("step", "status"),
    [
        ((500, {"error": {"message": "no"}}), GradeStatus.UNSCORED),
        ((503, b""), GradeStatus.UNSCORED),
        ((429, {"error": {"message": "slower"}}), GradeStatus.UNSCORED),
        ((401, {"error": {"message": "key"}}), GradeStatus.UNSCORED),
        ((404, {"error": {"message": "no such model"}}), GradeStatus.UNSCORED),
        ((400, {"error": {"message": "the maximum is 320 tokens"}}), GradeStatus.ERROR),
        ((200, b"not json"), GradeStatus.UNSCORED),
        ((200, b""), GradeStatus.UNSCORED),
        ((200, b"[]"), GradeStatus.UNSCORED),
        ((200, {"model": MODEL, "choices": []}), GradeStatus.UNSCORED),
        ((200, {"model": MODEL}), GradeStatus.UNSCORED),
        ((200, {"model": MODEL, "choices": [{"message": None}]}), GradeStatus.UNSCORED),
        ((200, answer(model="another")), GradeStatus.UNSCORED),
        ((200, answer(7)), GradeStatus.UNSCORED),
        ((200, answer("")), GradeStatus.UNPARSEABLE),
        ((200, answer(None)), GradeStatus.UNPARSEABLE),
        ((200, answer("Total Score: nan")), GradeStatus.UNPARSEABLE),
        ((200, answer("Total Score: -1000000000/10")), GradeStatus.UNPARSEABLE),
        ((200, answer("x" * 20_000_000)), GradeStatus.UNPARSEABLE),
        ((200, answer(reason="length")), GradeStatus.UNFINISHED),
        (hang, GradeStatus.UNSCORED),
        (cut, GradeStatus.UNSCORED),
    ],
    ids=str,
)
def test_trouble_is_no_score_and_costs_nobody_else_one(step: Any, status: GradeStatus) -> None:
    def by_content(content: str) -> Any:
        return step if content == "bad" else None

    with serving(by_content=by_content) as fake, scorer(fake, deadline_s=0.6) as asks:
        bad, good = asks.grade([question("bad"), question("good")])
    assert (bad.status, bad.score) == (status, None)
    assert good.score == 0.7
    assert fake.ensured == (status == GradeStatus.UNSCORED)  # facts about a question call for no look at the server


def test_trouble_that_passes_is_waited_for() -> None:
    script = [(500, b""), (429, b"")]
    with serving(script=script) as fake, scorer(fake, tries=3) as asks:
        assert asks.grade([question("a")])[0].score == 0.7
    assert fake.seen["a"] == 3 and fake.ensured == 0


def test_a_failure_is_not_remembered() -> None:
    with serving(script=[(500, b"")] * 2) as fake, scorer(fake) as asks:
        fake.by_content = lambda content: None
        first = asks.grade([question("a"), question("b")])
        assert [g.status for g in first].count(GradeStatus.UNSCORED) == 0  # asked again after the look at the server
        fake.script = [(500, b"")] * 2
        fake.by_content = lambda content: (500, b"") if content == "c" else None
        assert asks.grade([question("c"), question("d")])[0].status == GradeStatus.UNSCORED
        fake.by_content = None
        assert asks.grade([question("c")])[0].score == 0.7


def test_a_dark_batch_is_an_error_after_one_look_at_the_server() -> None:
    refusing = serving(by_content=lambda content: (500, b""))
    with refusing as fake, scorer(fake) as asks, pytest.raises(Dark, match="Not one of 3 questions"):
        asks.grade([question(str(i)) for i in range(3)])
    assert fake.ensured == 1


def test_a_server_that_cannot_be_brought_back_is_an_error() -> None:
    def gone() -> None:
        raise UserError("it has died too often")

    refusing = serving(by_content=lambda content: (500, b""), on_ensure=gone)
    with refusing as fake, scorer(fake) as asks, pytest.raises(Dark, match="died too often"):
        asks.grade([question("a")])


def test_a_server_that_moved_is_found_at_its_new_address() -> None:
    with serving() as old, serving() as new, scorer(old) as asks:
        old.by_content = lambda content: (500, b"")
        old.on_ensure = lambda: setattr(old, "address", new.address)
        assert asks.grade([question("a")])[0].score == 0.7
    assert new.seen == {"a": 1}


def test_two_scorers_at_once_do_not_mix() -> None:
    def answers_with(points: int) -> Callable[[str], Any]:
        return lambda content: (200, answer(f"Total Score: {points}/10"))

    with serving(by_content=answers_with(3)) as one, serving(by_content=answers_with(9)) as two:
        found: dict[int, set[float | None]] = {}

        def work(number: int, fake: Fake) -> None:
            with scorer(fake) as asks:
                found[number] = {g.score for g in asks.grade([question(str(i)) for i in range(20)])}

        threads = [threading.Thread(target=work, args=pair) for pair in ((0, one), (1, two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {0: {0.3}, 1: {0.9}}


def test_nothing_is_asked_where_there_is_no_question() -> None:
    with serving() as fake, scorer(fake) as asks:
        assert asks.grade([]) == []
    assert not fake.seen

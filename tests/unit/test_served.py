"""The client of a served grader, against real little servers that misbehave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
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
from ziprc.errors import Dark, Stopped, UserError
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
            except ConnectionError:  # whoever asked has left
                self.close_connection = True
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


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, which is news enough for a timeout of the transport."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def huge(handler: BaseHTTPRequestHandler) -> None:
    """50 MB, of which no more than a few are read."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(50_000_000))
    handler.end_headers()
    for _ in range(50):
        handler.wfile.write(b"x" * 1_000_000)


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
        assert asks.totals == {"asked": 3, "saved": 10, "unscored": 0, "prompt_tokens": 0, "completion_tokens": 0}
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


LOST, ERROR, UNREADABLE = GradeStatus.UNSCORED, GradeStatus.ERROR, GradeStatus.UNPARSEABLE
TROUBLE: dict[str, tuple[Any, GradeStatus]] = {
    "500": ((500, {"error": {"message": "no"}}), LOST),
    "503": ((503, b""), LOST),
    "429": ((429, {"error": {"message": "slower"}}), LOST),
    "408": ((408, b""), LOST),
    "401": ((401, {"error": {"message": "key"}}), LOST),
    "404": ((404, {"error": {"message": "no such model"}}), LOST),
    "400": ((400, {"error": {"message": "the maximum is 320 tokens"}}), ERROR),
    "413": ((413, b""), ERROR),
    "no JSON": ((200, b"not json"), LOST),
    "no text": ((200, b"\x00\xff\xfe"), LOST),
    "nothing": ((200, b""), LOST),
    "a list": ((200, b"[]"), LOST),
    "null": ((200, b"null"), LOST),
    "deep": ((200, b"[" * 200_000), LOST),
    "no choice": ((200, {"model": MODEL, "choices": []}), LOST),
    "no choices": ((200, {"model": MODEL}), LOST),
    "no message": ((200, {"model": MODEL, "choices": [{"message": None, "finish_reason": "stop"}]}), LOST),
    "an error as an answer": ((200, {"error": {"message": "no"}}), LOST),
    "another model": ((200, answer(model="another")), LOST),
    "a number": ((200, answer(7)), LOST),
    "a list of parts": ((200, answer([])), LOST),
    "aborted": ((200, answer(reason="abort")), LOST),
    "no reason": ((200, answer(reason=None)), LOST),  # type: ignore[arg-type]
    "no words": ((200, answer("")), UNREADABLE),
    "no content": ((200, answer(None)), UNREADABLE),
    "NaN": ((200, answer("nan")), UNREADABLE),
    "a total of NaN": ((200, answer("Total Score: nan")), UNREADABLE),
    "a total of -10^9": ((200, answer("Total Score: -1e9")), UNREADABLE),
    "-1000000000/10": ((200, answer("Total Score: -1000000000/10")), UNREADABLE),
    "infinity": ((200, answer("Total Score: 1e999/10")), UNREADABLE),
    "5 MB of words": ((200, answer("x" * 5_000_000)), UNREADABLE),
    "50 MB": (huge, LOST),
    "cut by its cap": ((200, answer(reason="length")), GradeStatus.UNFINISHED),
    "late": (hang, LOST),
    "dripping": (drip, LOST),
    "cut off": (cut, LOST),
}


@pytest.mark.parametrize(("step", "status"), TROUBLE.values(), ids=TROUBLE)
def test_trouble_is_no_score_and_costs_nobody_else_one(step: Any, status: GradeStatus) -> None:
    def by_content(content: str) -> Any:
        return step if content == "bad" else None

    with serving(by_content=by_content) as fake, scorer(fake, deadline_s=0.8) as asks:
        bad, good = asks.grade([question("bad"), question("good")])
    assert (bad.status, bad.score) == (status, None)
    assert good.score == 0.7
    assert fake.ensured == (status == GradeStatus.UNSCORED)  # facts about a question call for no look at the server


def test_trouble_that_passes_is_waited_for() -> None:
    script = [(500, b""), (429, b""), (408, b"")]
    with serving(script=script) as fake, scorer(fake, tries=4, deadline_s=30.0) as asks:
        assert asks.grade([question("a")])[0].score == 0.7
    assert fake.seen["a"] == 4 and fake.ensured == 0


def test_who_is_told_to_wait_waits_that_long() -> None:
    times: list[float] = []

    def later(handler: BaseHTTPRequestHandler) -> None:
        times.append(time.monotonic())
        handler.send_response(429)
        handler.send_header("Retry-After", "1.5")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def now(content: str) -> Any:
        times.append(time.monotonic())

    with serving(script=[later], by_content=now) as fake, scorer(fake, tries=2, deadline_s=30.0) as asks:
        assert asks.grade([question("a")])[0].score == 0.7
    assert times[1] - times[0] >= 1.4


@pytest.mark.parametrize("status", [400, 413, 422, 401, 403, 404])
def test_what_waiting_does_not_mend_is_asked_once(status: int) -> None:
    def by_content(content: str) -> Any:
        return (status, {"error": {"message": "no"}}) if content == "bad" else None

    with serving(by_content=by_content) as fake, scorer(fake, tries=3, deadline_s=30.0) as asks:
        bad = asks.grade([question("bad"), question("good")])[0]
    assert bad.rationale is not None and str(status) in bad.rationale
    assert fake.seen["bad"] == 1 + fake.ensured  # again only after a look at the server


def test_words_that_break_the_reader_and_scores_that_are_none_are_no_scores() -> None:
    class Loose:
        score, status = float("nan"), GradeStatus.GRADED

    def breaks(text: str, ended: bool) -> Any:
        if "7" in text:
            raise OverflowError("too much")
        return Loose()

    def by_content(content: str) -> Any:
        return (200, answer(content))

    with serving(by_content=by_content) as fake, Scorer(fake, breaks, 80, deadline_s=5.0, tries=1) as asks:
        grades = asks.grade([question("7"), question("8")])
    assert [(g.score, g.status) for g in grades] == [(None, UNREADABLE)] * 2
    assert "too much" in (grades[0].rationale or "") and "nan" in (grades[1].rationale or "")


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


def test_some_answers_without_a_server_are_kept_and_the_rest_has_no_score(capsys: pytest.CaptureFixture[str]) -> None:
    def gone() -> None:
        raise UserError("it has died too often")

    def by_content(content: str) -> Any:
        return (500, b"") if content == "bad" else None

    with serving(by_content=by_content, on_ensure=gone) as fake, scorer(fake) as asks:
        grades = asks.grade([question("bad"), question("good")])
        assert asks.totals["unscored"] == 1
    assert [(g.score, g.status) for g in grades] == [(None, LOST), (0.7, GradeStatus.GRADED)]
    said = capsys.readouterr().err
    assert "1 of 2 questions" in said and "died too often" in said


def test_nobody_listening_is_dark() -> None:
    with serving() as fake:
        pass
    with scorer(fake) as asks, pytest.raises(Dark, match=r"Not one of 2 questions.*Connection"):
        asks.grade([question("a"), question("b")])


def test_no_proxy_is_asked_for_the_way_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving() as fake, scorer(fake) as asks:
        assert asks.grade([question("a")])[0].score == 0.7


def test_a_key_stands_in_no_message() -> None:
    own = Address("http://127.0.0.1:1/v1", "secret-key", MODEL, {})
    assert "secret-key" not in f"{own} {own!r}"
    refusing = serving(by_content=lambda content: (401, {"error": {"message": "no"}}))
    with refusing as fake, scorer(fake) as asks, pytest.raises(Dark) as caught:
        fake.address = Address(fake.address.url, "secret-key", MODEL, {})
        asks.grade([question("a")])
    assert "secret-key" not in str(caught.value)


def test_asking_needs_neither_torch_nor_vllm() -> None:
    code = "import sys, ziprc.rewards.served; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_signal_that_ends_training_ends_the_asking_too() -> None:
    def end(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGALRM, end)
    began = time.monotonic()
    try:
        with serving(pause=5.0) as fake, pytest.raises(Stopped), scorer(fake, deadline_s=60.0) as asks:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            asks.grade([question("a"), question("b")])
        assert time.monotonic() - began < 3
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_body_without_end_is_not_read_to_its_end() -> None:
    sent: list[int] = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(10**12))
        handler.end_headers()
        while True:
            sent.append(handler.wfile.write(b" " * 1_000_000))

    def by_content(content: str) -> Any:
        return endless if content == "bad" else None

    with serving(by_content=by_content) as fake, scorer(fake, deadline_s=60.0) as asks:
        bad, good = asks.grade([question("bad"), question("good")])
    assert good.score == 0.7 and bad.status == LOST and "more than 8 MiB" in (bad.rationale or "")
    assert sum(sent) < 2 * 40_000_000  # twice, with what the sockets hold


def test_half_a_character_is_a_fact_about_the_question() -> None:
    with serving() as fake, scorer(fake) as asks:
        bad, good = asks.grade([question("\ud800"), question("a")])
    assert (bad.status, good.score, fake.ensured) == (GradeStatus.ERROR, 0.7, 0)


def test_threads_that_share_a_scorer_wait_for_each_other() -> None:
    with serving(pause=0.02) as fake, scorer(fake) as asks:
        found: list[float | None] = []
        threads = [
            threading.Thread(target=lambda: found.extend(g.score for g in asks.grade([question("a"), question("b")])))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [0.7] * 8 and fake.seen == {"a": 1, "b": 1}


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

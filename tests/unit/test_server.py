"""Servers of a grader as processes: ready, the engine's own answers, looked after, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.doubles import servable_checkpoint
from ziprc.config.base import GREEDY, Runtime
from ziprc.config.rubric import Gradings
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, Response, settings_for
from ziprc.engines.server import Address, Remote, Server, answers
from ziprc.engines.serving import Batches, application
from ziprc.errors import UserError
from ziprc.joint.reasoning import ReasoningVocabulary
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import graded
from ziprc.rewards.served import Scorer
from ziprc.tables.grades import GradeStatus
from ziprc.tables.rollouts import FinishReason

GOLDEN = [{"role": "user", "content": "2+2"}]
TOKENS = 12


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = servable_checkpoint(tmp_path_factory.mktemp("grader"))
    return settings_for(
        folder, load_tokenizer(folder), Gradings(max_model_len=128), GREEDY, Runtime(max_num_seqs=32), 1
    )


def server(settings: EngineSettings, folder: Path, **own: Any) -> Server:
    return Server(
        "hf", settings, folder / "grader.log", GOLDEN, lambda text: True, TOKENS, **{"start_limit_s": 120.0, **own}
    )


def read(text: str, finished: bool) -> Any:
    return graded(1.0, rationale=text)


def asked(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def running(settings: EngineSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    own = server(settings, tmp_path_factory.mktemp("log"), restarts=9)
    starter = threading.Thread(target=own.__enter__)
    starter.start()
    starter.join()  # Linux tells of the end of the thread that started a process, which is no reason to end the server
    with contextlib.closing(own):
        assert answers(own.address)
        yield own


def test_its_answers_are_the_engines_own(running: Server, settings: EngineSettings) -> None:
    from ziprc.chat import prompt_token_ids

    tokenizer, questions = load_tokenizer(settings.model), asked([f"{i}+{i}" for i in range(20)])
    with Scorer(running, read, TOKENS) as scorer:
        found = [grade.rationale for grade in scorer.grade(questions)]
    with contextlib.closing(start("hf", settings)) as engine:
        ids = [tuple(prompt_token_ids(tokenizer, q, thinking=False)) for q in questions]
        wanted = engine.generate([Request(str(i), one, 0, TOKENS) for i, one in enumerate(ids)])
    assert found == [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in wanted]


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "another"}, 404, "this server has"),
        ({"stream": True}, 400, "stream"),
        ({"n": 2}, 400, "one choice"),
        ({"stop": ["a"]}, 400, "leave out stop"),
        ({"logprobs": True}, 400, "leave out logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logit_bias": {"1": 5}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "chat_template_kwargs"),
        ({"seed": 1 << 70}, 400, "seed"),
        ({"max_tokens": 0}, 400, "answered with 0"),
        ({"max_tokens": "5"}, 400, "whole number"),
        ({"max_completion_tokens": 117, "max_tokens": 5}, 400, "maximum is 128"),
        ({"messages": ["hello"]}, 400, ""),
        ({"messages": [{"role": "user", "content": None}]}, 400, "text as content"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": [1]}, 400, ""),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "9" * 500}]}, 400, "maximum is 128"),
        ({"max_tokens": 500}, 400, "maximum is 128"),
        ({"temperature": -1}, 400, "temperature"),
        ({"messages": None}, 400, ""),
    ],
)
def test_what_it_cannot_do_it_refuses(running: Server, change: dict[str, Any], status: int, said: str) -> None:
    own = running.address
    body = {"model": own.model, "messages": GOLDEN, "max_tokens": TOKENS} | change
    answer = httpx.post(f"{own.url}/chat/completions", json=body, headers={"Authorization": f"Bearer {own.key}"})
    assert answer.status_code == status and said in answer.text


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"no", b"\xff\xfe", b"[" * 100_000, b"1"])
def test_what_is_no_question_is_refused(running: Server, body: bytes) -> None:
    shown = {"Authorization": f"Bearer {running.address.key}"}
    assert httpx.post(f"{running.address.url}/chat/completions", content=body, headers=shown).status_code == 400


def test_an_answer_has_what_the_api_says(running: Server) -> None:
    own = running.address
    harmless = {"user": "me", "stream": False, "n": 1, "stop": None, "chat_template_kwargs": {"enable_thinking": False}}
    body = {"model": own.model, "messages": GOLDEN, "max_completion_tokens": 3, "temperature": None, **harmless}
    answer = httpx.post(f"{own.url}/chat/completions", json=body, headers={"Authorization": f"Bearer {own.key}"}).json()
    assert (answer["object"], answer["model"], len(answer["choices"])) == ("chat.completion", own.model, 1)
    choice, usage = answer["choices"][0], answer["usage"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    assert usage["completion_tokens"] == 3 and usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert httpx.get(f"{own.url.removesuffix('/v1')}/health").status_code == 200  # without a key


def test_only_who_has_the_key_is_answered_and_it_stands_in_no_list_of_processes(running: Server) -> None:
    own = running.address
    assert httpx.post(f"{own.url}/chat/completions", json={"model": own.model, "messages": GOLDEN}).status_code == 401
    assert httpx.get(f"{own.url}/models", headers={"Authorization": "Bearer x"}).status_code == 401
    assert running.process is not None
    assert not any(own.key in " ".join(one.cmdline()) for one in family(running.process.pid))
    assert own.key not in running.log.read_text()


@pytest.mark.parametrize(("number", "whose"), [(signal.SIGKILL, "guard"), (signal.SIGSTOP, "server")])
def test_a_server_that_dies_or_hangs_is_started_again(
    running: Server, number: int, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ziprc.engines.server.LOOK_S", 1.0)
    assert running.process is not None
    before, left = family(running.process.pid), running.left
    assert len(before) == 2
    os.kill(before[0 if whose == "guard" else -1].pid, number)
    if whose == "guard":
        running.process.wait()
    running.left = 0
    with pytest.raises(UserError, match=r"(has ended|does not answer) again, and may not be restarted.*grader\.log"):
        running.ensure()
    running.left = left
    with Scorer(running, read, TOKENS, deadline_s=3.0, tries=1) as scorer:
        assert scorer.grade(asked(["1", "2"]))[0].score == 1
    assert running.left == left - 1 and gone(before)
    assert running.ensure() is None and running.left == left - 1  # a server in health is left alone


@pytest.mark.slow
def test_a_server_whose_words_have_changed_is_started_again_and_then_an_error(
    settings: EngineSettings, tmp_path: Path
) -> None:
    with server(settings, tmp_path, restarts=2) as own:
        own.ensure()
        assert own.left == 2
        own.accepts = lambda text: False
        with pytest.raises(UserError, match="could not be started again, and may not be restarted"):
            own.ensure()
        assert own.left == 0


@pytest.mark.slow
def test_a_port_that_somebody_takes_first_is_given_up(
    settings: EngineSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, free, ports = server(settings, tmp_path), Server._new_address, list[int]()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def new_address(of: Server) -> tuple[Address, int]:
            address, port = free(of)
            if not ports:
                port = taken.getsockname()[1]
                address = replace(address, url=f"http://127.0.0.1:{port}/v1")
            ports.append(port)
            return address, port

        monkeypatch.setattr(Server, "_new_address", new_address)
        monkeypatch.setattr("ziprc.engines.server.LOOK_S", 1.0)
        with own:
            assert len(ports) == 2 and own.left == 3


def test_a_server_that_takes_too_long_is_an_error_and_ended(settings: EngineSettings, tmp_path: Path) -> None:
    own = server(settings, tmp_path, start_limit_s=0.3)
    with pytest.raises(UserError, match=r"not ready after 0\.3 s.*grader\.log"), own:
        pass
    assert own.process is None and own.left == 3


def test_closing_ends_a_server_that_hangs(tmp_path: Path, settings: EngineSettings) -> None:
    own = server(settings, tmp_path)
    with open(own.log, "wb") as log:
        own.address, port = own._new_address()
        own.process = own._process(port, log)
    while len(processes := family(own.process.pid)) < 2:
        assert own.process.poll() is None, own.log.read_text()
        time.sleep(0.05)
    processes[-1].suspend()
    own.close()
    own.close()
    assert gone(processes) and own.process is None


def test_vllm_is_told_everything_that_our_engine_knows_of_sampling(settings: EngineSettings, tmp_path: Path) -> None:
    copies = ReasoningVocabulary(start=316, sources=((0, 4),), copies=1, turn=257, opens=259, closes=260)
    given = replace(settings, banned=((261, 316),), reasoning=copies)  # a grader does not think, so draws no copy
    own = Server("vllm", given, tmp_path / "log", GOLDEN, lambda text: True, TOKENS)
    own.address, port = own._new_address()
    banned = {str(i) for i in range(261, 320)}
    assert set(own.address.extra["logit_bias"]) == banned
    assert own.address.extra["stop_token_ids"] == list(settings.stop_token_ids)
    command, environment = own._vllm(port)
    assert environment["VLLM_API_KEY"] == own.address.key and own.address.key not in " ".join(command)
    assert command[command.index("--generation-config") + 1] == "vllm"


def test_a_model_that_is_no_grader_is_refused_and_its_server_ended(settings: EngineSettings, tmp_path: Path) -> None:
    own = Server("hf", settings, tmp_path / "log", GOLDEN, lambda text: False, TOKENS)
    with pytest.raises(UserError, match="answers the golden question with"), own:
        pass
    assert own.process is None


def test_a_model_that_is_not_there_is_named(settings: EngineSettings, tmp_path: Path) -> None:
    own = server(replace(settings, model=tmp_path / "nothing"), tmp_path)
    with pytest.raises(UserError, match="ended while it started"), own:
        pass


def program(settings: EngineSettings, folder: Path, kind: str) -> str:
    """Python that starts a server `running` and prints its process; the body of its `with` may go on."""
    return f"""
import time
from pathlib import Path
from tests.unit.test_server import GOLDEN, TOKENS
from ziprc.config.base import GREEDY, Runtime
from ziprc.config.rubric import Gradings
from ziprc.engines.base import settings_for
from ziprc.engines.server import Server
from ziprc.joint.tokenizer import load_tokenizer
folder = Path({str(settings.model)!r})
own = settings_for(folder, load_tokenizer(folder), Gradings(max_model_len=128), GREEDY, Runtime(), 1)
with Server({kind!r}, own, Path({str(folder)!r}) / "grader.log", GOLDEN, lambda text: True, TOKENS, 600.0) as running:
    print(running.process.pid, flush=True)
"""


def killed_parent(settings: EngineSettings, folder: Path, kind: str, least: int) -> list[psutil.Process]:
    """The processes of a server, at least so many, just after the program that started it was killed with -9."""
    command = [sys.executable, "-c", f"{program(settings, folder, kind)}    time.sleep(600)\n"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as parent:
        assert parent.stdout is not None
        processes = family(int(parent.stdout.readline()))
        assert len(processes) >= least
        parent.kill()
    return processes


def test_no_server_outlives_a_parent_that_was_killed(settings: EngineSettings, tmp_path: Path) -> None:
    assert gone(killed_parent(settings, tmp_path, "hf", 2))


def test_a_server_by_address_is_checked_and_never_started(running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    own = running.address
    monkeypatch.setenv("ZIPRC_GRADER_KEY", own.key)
    with Remote(own.url, None, GOLDEN, lambda text: True, TOKENS) as remote:
        assert remote.address.model == own.model
        remote.ensure()
    with pytest.raises(UserError, match="was expected"):
        Remote(own.url, "another", GOLDEN, lambda text: True, TOKENS).__enter__()
    with pytest.raises(UserError, match="another model than a grader"):
        Remote(own.url, own.model, GOLDEN, lambda text: False, TOKENS).__enter__()
    monkeypatch.setenv("ZIPRC_GRADER_KEY", "wrong")
    with pytest.raises(UserError, match="No server answers"):
        Remote(own.url, own.model, GOLDEN, lambda text: True, TOKENS).__enter__()
    assert answers(own)


class ScriptedEngine:
    """Answers with the seed of a request; fails on those with a seed above 100, and waits for `go`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        seeds = [one.seed for one in requests]
        self.batches.append(seeds)
        self.go.wait(10)
        if max(seeds) > 100:
            raise RuntimeError("out of memory")
        return [Response("", (65 + seed,), FinishReason.STOP) for seed in seeds]


def wish(seed: int) -> Request:
    return Request("", (1, 2), seed, 4)


def test_what_comes_together_is_one_batch_of_bounded_size() -> None:
    engine = ScriptedEngine()
    batches = Batches(engine, 8)  # type: ignore[arg-type]
    futures = [batches.ask(wish(seed)) for seed in range(20)]
    assert [future.result(5).token_ids[0] - 65 for future in futures] == list(range(20))
    assert len(engine.batches) <= 4 and max(map(len, engine.batches)) == 8


def test_a_request_that_breaks_the_engine_spoils_no_other() -> None:
    batches = Batches(ScriptedEngine(), 8)  # type: ignore[arg-type]
    good, bad, other = (batches.ask(wish(seed)) for seed in (1, 101, 2))
    assert good.result(5).token_ids == (66,) and other.result(5).token_ids == (67,)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(5)
    assert batches.ask(wish(3)).result(5).token_ids == (68,)


def test_who_has_left_costs_nothing(settings: EngineSettings) -> None:
    engine = ScriptedEngine()
    engine.go.clear()
    batches = Batches(engine, 8)  # type: ignore[arg-type]
    first = batches.ask(wish(1))
    while not engine.batches:
        time.sleep(0.01)
    app = application(settings, load_tokenizer(settings.model), batches, "name", "key")
    body = {"model": "name", "messages": GOLDEN, "max_tokens": 4, "seed": 2}

    async def leave() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            health = await client.get("/health")
            assert health.status_code == 200
        events = [
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False},
            {"type": "http.disconnect"},
        ]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
            "headers": [(b"authorization", b"Bearer key")], "root_path": "", "scheme": "http", "http_version": "1.1",
        }  # fmt: skip
        sent: list[Any] = []

        async def receive() -> Any:
            return events.pop(0)

        async def send(event: Any) -> None:
            sent.append(event)

        await app(scope, receive, send)
        assert sent[0]["status"] == 499

    asyncio.run(leave())
    engine.go.set()
    assert first.result(5).token_ids == (66,) and batches.ask(wish(3)).result(5).token_ids == (68,)
    assert engine.batches == [[1], [3]]


@pytest.mark.slow
def test_vllm_answers_as_our_server_and_comes_back_when_its_engine_is_killed(
    running: Server, settings: EngineSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ziprc.engines.server.LOOK_S", 5.0)
    questions = asked([f"{i}-{i}" for i in range(32)])
    with Scorer(running, read, TOKENS) as scorer:
        wanted = [grade.rationale for grade in scorer.grade(questions)]
    own = Server("vllm", settings, tmp_path / "vllm.log", GOLDEN, lambda text: True, TOKENS, 600.0, restarts=1)
    with own:
        assert own.process is not None
        before = family(own.process.pid)
        assert len(before) >= 3 and {os.getpgid(one.pid) for one in before} == {own.process.pid}
        assert not any(own.address.key in " ".join(one.cmdline()) for one in before)
        with Scorer(own, read, TOKENS, deadline_s=60.0, tries=1) as scorer:
            found = [grade.rationale for grade in scorer.grade(questions)]
        assert found == wanted
        engine = next(one for one in before if "EngineCore" in one.name() + " ".join(one.cmdline()))
        killer = threading.Timer(0.1, engine.kill)
        with Scorer(own, read, TOKENS, deadline_s=60.0, tries=1) as scorer:
            killer.start()
            grades = scorer.grade(questions)
            killer.join()
            grades = scorer.grade(questions)
        assert [grade.rationale for grade in grades] == wanted and all(g.status == GradeStatus.GRADED for g in grades)
        own.ensure()
        assert own.left == 0 and gone(before)
        after = family(own.process.pid)
    assert gone(after)


@pytest.mark.slow
def test_no_process_of_vllm_outlives_a_parent_that_was_killed(settings: EngineSettings, tmp_path: Path) -> None:
    processes = killed_parent(settings, tmp_path, "vllm", 3)
    assert gone(processes)

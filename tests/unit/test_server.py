"""Servers of a grader as processes: ready, the engine's own answers, looked after, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.doubles import servable_checkpoint
from ziprc.config.base import GREEDY, Runtime
from ziprc.config.rubric import Gradings
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, settings_for
from ziprc.engines.server import Remote, Server, answers
from ziprc.errors import UserError
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import graded
from ziprc.rewards.served import Scorer

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
    with server(settings, tmp_path_factory.mktemp("log"), restarts=9) as own:
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


def test_only_who_has_the_key_is_answered_and_it_stands_in_no_list_of_processes(running: Server) -> None:
    own = running.address
    assert httpx.post(f"{own.url}/chat/completions", json={"model": own.model, "messages": GOLDEN}).status_code == 401
    assert httpx.get(f"{own.url}/models", headers={"Authorization": "Bearer x"}).status_code == 401
    assert running.process is not None
    assert not any(own.key in " ".join(one.cmdline()) for one in family(running.process.pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_is_started_again(
    running: Server, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ziprc.engines.server.LOOK_S", 1.0)
    assert running.process is not None
    before, left = family(running.process.pid), running.left
    os.kill(before[-1].pid, number)
    with Scorer(running, read, TOKENS, deadline_s=3.0, tries=1) as scorer:
        assert scorer.grade(asked(["1", "2"]))[0].score == 1
    assert running.left == left - 1 and gone(before)
    assert running.ensure() is None and running.left == left - 1  # a server in health is left alone


def test_too_many_deaths_are_an_error_with_the_end_of_the_log(settings: EngineSettings, tmp_path: Path) -> None:
    with server(settings, tmp_path, restarts=0) as own:
        assert own.process is not None
        os.killpg(own.process.pid, signal.SIGKILL)
        own.process.wait()
        with pytest.raises(UserError, match=r"may not be restarted.*grader\.log"):
            own.ensure()


def test_a_model_that_is_no_grader_is_refused_and_its_server_ended(settings: EngineSettings, tmp_path: Path) -> None:
    own = Server("hf", settings, tmp_path / "log", GOLDEN, lambda text: False, TOKENS)
    with pytest.raises(UserError, match="answers the golden question with"), own:
        pass
    assert own.process is None


def test_a_model_that_is_not_there_is_named(settings: EngineSettings, tmp_path: Path) -> None:
    from dataclasses import replace

    own = server(replace(settings, model=tmp_path / "nothing"), tmp_path)
    with pytest.raises(UserError, match="ended while it started"), own:
        pass


def test_no_server_outlives_a_parent_that_was_killed(settings: EngineSettings, tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from tests.unit.test_server import server
from ziprc.config.base import GREEDY, Runtime
from ziprc.config.rubric import Gradings
from ziprc.engines.base import settings_for
from ziprc.joint.tokenizer import load_tokenizer
folder = Path({str(settings.model)!r})
own = settings_for(folder, load_tokenizer(folder), Gradings(max_model_len=128), GREEDY, Runtime(), 1)
with server(own, Path({str(tmp_path)!r})) as running:
    print(running.process.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as parent:
        assert parent.stdout is not None
        processes = family(int(parent.stdout.readline()))
        assert len(processes) == 2
        time.sleep(0.1)
        parent.kill()
    assert gone(processes)


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

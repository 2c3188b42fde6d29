"""A model behind the OpenAI chat API that lives as long as who needs it: started, found ready, looked after, ended.

Ours (serving.py) or vLLM, in a process group of its own on a free port of the loopback, with a key and a model name that nobody
else has, so that no answer can come from another server. It is ready when it is healthy, has our model, *and* has answered a
golden question as that model would. It is judged by whether it answers that question, never by an exit code (a server of vLLM
whose engine was killed ends with 0), and is started again a few times before that is an error. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import httpx

from ziprc.engines import guard
from ziprc.engines.base import EngineSettings, own_dtype
from ziprc.errors import UserError

Messages = Sequence[Mapping[str, str]]
KEY = "ZIPRC_GRADER_KEY"  # of an external server
LOOK_S = 10.0  # that a look at a server's health may take
GOLDEN_S = 120.0  # that the golden question may take once a server is up: its engine may be in the middle of a batch
END_S = 10.0  # that a server may take to end; more than the guard's grace
BETWEEN_LOOKS_S = 0.2
PORTS = 3  # that are tried when somebody else takes the one that was free
TAIL = 1500  # characters of a log in an error
BLOCK_TOKENS = 32  # smallest KV block of vLLM's CPU backend
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
NO_ANSWER = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError)
NOT_OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING", KEY)


@dataclass(frozen=True)
class Address:
    """Where a model answers, and what has to be said for it. `url` ends in /v1; `extra` goes into the body of every question."""

    url: str
    key: str
    model: str
    extra: Mapping[str, Any]

    @property
    def local(self) -> bool:
        """Whether it is on this machine, where no proxy stands between."""
        return self.url.startswith(("http://127.0.0.1", "http://localhost", "http://[::1]"))

    def __repr__(self) -> str:
        return f"Address({self.url}, {self.model})"  # a key belongs in no log


class Remote:
    """A server that somebody else keeps up. `ensure` can only look."""

    def __init__(
        self, url: str, model: str | None, golden: Messages, accepts: Callable[[str], bool], max_new_tokens: int = 64
    ) -> None:
        self.url, self.named = url.rstrip("/").removesuffix("/v1") + "/v1", model
        self.golden, self.accepts, self.max_new_tokens = golden, accepts, max_new_tokens
        self.address = Address(self.url, os.environ.get(KEY, "none"), model or "", NO_THINKING)

    def __enter__(self) -> Remote:
        """UserError unless the server is there, has the model, and answers the golden question as a grader."""
        try:
            names = models(self.address)
        except NO_ANSWER as error:
            raise UserError(f"No server answers at {self.url}: {error}. Start it, or mend runtime.grader.") from None
        chosen = self.named or (names[0] if len(names) == 1 else None)
        if chosen not in names:
            raise UserError(
                f"The server at {self.url} has the models {', '.join(names)}, and {self.named or 'one alone'} was expected. Name "
                "one as runtime.grader_model."
            )
        self.address = Address(self.url, self.address.key, chosen, NO_THINKING)
        if (problem := check_golden(self.address, self.golden, self.accepts, self.max_new_tokens)) is not None:
            raise UserError(f"The server at {self.url} {problem}. It serves another model than a grader of ours.")
        return self

    def __exit__(self, *error: object) -> None: ...

    def ensure(self) -> None:
        """UserError when it does not answer the golden question any more."""
        try:
            gone = self.address.model not in models(self.address)  # not all have a /health
        except NO_ANSWER as error:
            raise UserError(f"The server at {self.url} no longer answers: {error}.") from None
        if gone:
            raise UserError(f"The server at {self.url} no longer has {self.address.model}.")
        if (problem := check_golden(self.address, self.golden, self.accepts, self.max_new_tokens)) is not None:
            raise UserError(f"The server at {self.url} {problem}.")


class Server:
    """A context manager; see the head of this file. `log` collects what all its processes say."""

    def __init__(
        self, kind: Literal["hf", "vllm"], settings: EngineSettings, log: Path, golden: Messages,
        accepts: Callable[[str], bool], max_new_tokens: int, start_limit_s: float = 900.0, restarts: int = 3,
    ) -> None:  # fmt: skip
        if kind not in ("hf", "vllm"):
            raise UserError(f"runtime.grader is hf, vllm or the http address of a server, found '{kind}'.")
        if settings.reasoning is not None:  # a grader does not think, and elsewhere no copy may be drawn
            rows = settings.reasoning.rows
            settings = replace(settings, banned=(*settings.banned, (rows.start, rows.stop)), reasoning=None)
        self.kind, self.settings, self.log = kind, settings, log
        self.golden, self.accepts, self.max_new_tokens = golden, accepts, max_new_tokens
        self.start_limit_s, self.left = start_limit_s, restarts
        self.process: subprocess.Popen[bytes] | None = None
        self.address = Address("", "", "", {})

    def __enter__(self) -> Server:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ensure(self) -> None:
        """Start it again unless it answers the golden question. UserError when it has been started too often."""
        problem = self._problem()
        while problem is not None:
            if not self.left:
                raise UserError(
                    f"The server of {self.settings.model} {problem} again, and may not be restarted "
                    f"(runtime.grader_restarts). {self._said()}"
                )
            self.left -= 1
            print(
                f"the server of {self.settings.model} {problem}; starting it again ({self.left} more times)", file=sys.stderr,
                flush=True,
            )  # fmt: skip
            self.close()
            try:
                self._start()
                problem = None
            except UserError as error:
                print(error, file=sys.stderr, flush=True)
                problem = "could not be started"

    def close(self) -> None:
        """End it and all its processes: it is asked to, and killed when it takes too long. A second call does nothing."""
        if self.process is not None:
            self.process.terminate()  # the guard passes it on
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        self._kill()

    def _kill(self) -> None:
        """End its whole group at once, also one that was stopped or whose guard is gone."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _problem(self) -> str | None:
        """What is wrong with it now; None when it answers as a grader."""
        if self.process is None or self.process.poll() is not None:
            return "has ended"
        if not answers(self.address):
            return "does not answer"
        return check_golden(self.address, self.golden, self.accepts, self.max_new_tokens)

    def _start(self) -> None:
        """Return when it is ready. UserError when it ends before, takes too long, or is no grader; it may live on then."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + self.start_limit_s
        for last in [False] * (PORTS - 1) + [True]:
            self.address, port = self._new_address()
            begin = self.log.stat().st_size if self.log.exists() else 0
            with open(self.log, "ab") as log:
                self.process = self._process(port, log)
            if self._is_up(until):
                break
            if last or b"address already in use" not in self.log.read_bytes()[begin:].lower():
                raise UserError(f"The server of {self.settings.model} ended while it started. {self._said()}")
            self._kill()
        left = max(until - time.monotonic(), BETWEEN_LOOKS_S)
        if (problem := check_golden(self.address, self.golden, self.accepts, self.max_new_tokens, left)) is not None:
            raise UserError(f"The server of {self.settings.model} {problem}. Is it a grader? {self._said()}")

    def _is_up(self, until: float) -> bool:
        """Whether it came to answer; False when it ended instead. UserError when it is too late."""
        assert self.process is not None
        while not answers(self.address):
            if self.process.poll() is not None:
                return False
            if time.monotonic() > until:
                raise UserError(
                    f"The server of {self.settings.model} is not ready after {self.start_limit_s:g} s (runtime.grader_start_s). "
                    f"{self._said()}"
                )
            time.sleep(BETWEEN_LOOKS_S)
        return True

    def _new_address(self) -> tuple[Address, int]:
        """A port that is free just now, a key and a name that nobody else has, and what vLLM has to hear with every question."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        key, name = secrets.token_urlsafe(24), f"{self.settings.model.name}-{secrets.token_hex(6)}"
        extra: dict[str, Any] = {}
        if self.kind == "vllm":
            extra = {**NO_THINKING, "stop_token_ids": list(self.settings.stop_token_ids)}
            if self.settings.banned:  # rows that are no token, which our own engine never samples
                extra["logit_bias"] = {str(i): -100 for begin, end in self.settings.banned for i in range(begin, end)}
        return Address(f"http://127.0.0.1:{port}/v1", key, name, extra), port

    def _process(self, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """The server under its guard; it learns its key where nobody else can read it."""
        environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        environment.setdefault("OMP_NUM_THREADS", "1")
        if self.kind == "hf":
            command = ["-m", "ziprc.engines.serving"]
        else:
            command, more = self._vllm(port)
            environment |= more
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", guard.__file__, str(os.getpid()), sys.executable, *command],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        own = self.settings
        kept = {name: value for name, value in vars(own).items() if name not in ("joint", "reasoning", "log_probs")}
        told = kept | {"model": str(own.model), "sampling": own.sampling.model_dump()}
        about = {"key": self.address.key, "name": self.address.model, "port": port, "settings": told}
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{json.dumps(about)}\n".encode())
            process.stdin.close()
        return process

    def _vllm(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of vLLM's server. Of sampling it knows nothing but what a question says."""
        own, cpu = self.settings, on_cpu()
        # fmt: off
        command = [
            "-m", "vllm.entrypoints.openai.api_server", "--model", str(own.model), "--served-model-name", self.address.model,
            "--dtype", own_dtype(own, cpu), "--max-model-len", str(own.max_model_len), "--max-num-seqs", str(own.max_num_seqs),
            "--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm", "--disable-uvicorn-access-log",
            "--tensor-parallel-size", str(own.tensor_parallel), *(["--enforce-eager"] if own.enforce_eager else []),
            *(["--block-size", str(BLOCK_TOKENS)] if cpu else ["--gpu-memory-utilization", str(own.gpu_memory_utilization)]),
        ]
        # fmt: on
        environment = {
            "VLLM_API_KEY": self.address.key,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second one takes no more than 1024 biases, and ends with the 1025th
        }  # fmt: skip
        if cpu:
            environment |= {"VLLM_CPU_KVCACHE_SPACE": str(own.kv_cache_gib), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return command, environment

    def _said(self) -> str:
        text = self.log.read_bytes()[-TAIL:].decode(errors="replace").strip() if self.log.exists() else ""
        return f"The end of {self.log}: {text or '(nothing)'}"


def on_cpu() -> bool:
    """Whether the vLLM that is installed is the build for CPUs."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version("vllm-cpu"))
    return False


def connection(address: Address, limit_s: float) -> httpx.Client:
    """A client of the address that shows its key. No proxy is asked for the way to this machine itself."""
    return httpx.Client(
        headers={"Authorization": f"Bearer {address.key}"}, timeout=limit_s, trust_env=not address.local,
        verify=not address.local,  # http: spares reading the certificates
    )  # fmt: skip


def models(address: Address) -> list[str]:
    """Names of the models that a server says it has. One of NO_ANSWER when it says nothing of the kind."""
    with connection(address, LOOK_S) as client:
        answer = client.get(f"{address.url}/models")
    answer.raise_for_status()
    try:
        return [str(one["id"]) for one in answer.json()["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise httpx.DecodingError(f"no list of models: {answer.text[:200]}") from None


def answers(address: Address) -> bool:
    """Whether our model is there and in health."""
    try:
        with connection(address, LOOK_S) as client:
            healthy = client.get(f"{address.url.removesuffix('/v1')}/health").is_success
        return healthy and address.model in models(address)
    except NO_ANSWER:
        return False


def check_golden(
    address: Address, golden: Messages, accepts: Callable[[str], bool], max_new_tokens: int, limit_s: float = GOLDEN_S
) -> str | None:
    """What is wrong with the answer to the golden question; None when it is acceptable, and comes within `limit_s`."""
    body = {
        "model": address.model,
        "messages": list(golden),
        "temperature": 0,
        "max_tokens": max_new_tokens,
        **address.extra,
    }
    try:
        with connection(address, limit_s) as client:
            answer = client.post(f"{address.url}/chat/completions", json=body)
        answer.raise_for_status()
        text = answer.json()["choices"][0]["message"]["content"] or ""
    except (*NO_ANSWER, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"does not answer the golden question: {type(error).__name__} {error}"
    if isinstance(text, str) and accepts(text):
        return None
    return f"answers the golden question with {str(text)[-200:]!r}"

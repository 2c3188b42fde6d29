"""A model behind the OpenAI chat API that lives as long as who needs it: started, found ready, looked after, ended.

Ours (serving.py) or vLLM, in a process group of its own on a free port of the loopback, with a key and a model name that nobody
else has, so that no answer can come from another server. It is ready when it is healthy, has our model, *and* has answered a
golden question as that model would. It is judged by whether it answers, never by an exit code (a server of vLLM whose engine was
killed ends with 0), and is started again a few times before that is an error.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import httpx

from ziprc.engines import guard
from ziprc.engines.base import EngineSettings
from ziprc.errors import UserError

Messages = Sequence[Mapping[str, str]]
KEY = "ZIPRC_GRADER_KEY"  # of an external server
LOOK_S = 10.0  # that a look at a server's health may take
END_S = 10.0  # that a server may take to end
BETWEEN_LOOKS_S = 0.2
TAIL = 1500  # characters of a log in an error
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@dataclass(frozen=True)
class Address:
    """Where a model answers, and what has to be said for it. `url` ends in /v1; `extra` goes into the body of every question."""

    url: str
    key: str
    model: str
    extra: Mapping[str, Any]


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
        except httpx.HTTPError as error:
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
        """UserError when it does not answer."""
        if not answers(self.address):
            raise UserError(f"The server at {self.url} no longer answers, or no longer has {self.address.model}.")


class Server:
    """A context manager; see the head of this file. `log` collects what all its processes say."""

    def __init__(
        self, kind: Literal["hf", "vllm"], settings: EngineSettings, log: Path, golden: Messages,
        accepts: Callable[[str], bool], max_new_tokens: int, start_limit_s: float = 900.0, restarts: int = 3,
    ) -> None:  # fmt: skip
        if kind not in ("hf", "vllm"):
            raise UserError(f"runtime.grader is hf, vllm or the http address of a server, found '{kind}'.")
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
        """Start it again unless it answers. UserError when it has been started too often."""
        if self.process is not None and answers(self.address):
            return
        if not self.left:
            raise UserError(
                f"The server of {self.settings.model} has died again, and may not be restarted. {self._said()}"
            )
        self.left -= 1
        print(
            f"the server of {self.settings.model} does not answer; starting it again ({self.left} more times)", file=sys.stderr,
            flush=True,
        )  # fmt: skip
        self.close()
        self._start()

    def close(self) -> None:
        """End it and all its processes."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        key, name = secrets.token_urlsafe(24), f"{self.settings.model.name}-{secrets.token_hex(6)}"
        extra: dict[str, Any] = {}
        if self.kind == "vllm":
            extra = dict(NO_THINKING)
            if self.settings.banned:  # rows that are no token, which our own engine never samples
                extra["logit_bias"] = {str(i): -100 for begin, end in self.settings.banned for i in range(begin, end)}
        self.address = Address(f"http://127.0.0.1:{port}/v1", key, name, extra)
        with open(self.log, "ab") as log:
            self.process = self._process(port, log)
        until = time.monotonic() + self.start_limit_s
        while not answers(self.address):
            if self.process.poll() is not None:
                raise UserError(f"The server of {self.settings.model} ended while it started. {self._said()}")
            if time.monotonic() > until:
                raise UserError(
                    f"The server of {self.settings.model} is not ready after {self.start_limit_s:g} s (runtime.grader_start_s). "
                    f"{self._said()}"
                )
            time.sleep(BETWEEN_LOOKS_S)
        if (problem := check_golden(self.address, self.golden, self.accepts, self.max_new_tokens)) is not None:
            raise UserError(f"The server of {self.settings.model} {problem}. Is it a grader? {self._said()}")

    def _process(self, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """The server under its guard; it learns its key where nobody else can read it."""
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # of who trains
            environment.pop(name, None)
        own = self.settings
        if self.kind == "hf":
            command = ["-m", "ziprc.engines.serving"]
        else:
            # fmt: off
            command = [
                "-m", "vllm.entrypoints.openai.api_server", "--model", str(own.model), "--served-model-name", self.address.model,
                "--dtype", own.dtype, "--max-model-len", str(own.max_model_len), "--max-num-seqs", str(own.max_num_seqs),
                "--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", str(own.gpu_memory_utilization),
                "--tensor-parallel-size", str(own.tensor_parallel), *(["--enforce-eager"] if own.enforce_eager else []),
            ]
            environment |= {
                "VLLM_API_KEY": self.address.key, "VLLM_CPU_KVCACHE_SPACE": str(own.kv_cache_gib), "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            }
            # fmt: on
            environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        process = subprocess.Popen(
            [sys.executable, "-S", "-E", guard.__file__, str(os.getpid()), sys.executable, *command],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        kept = {name: value for name, value in vars(own).items() if name not in ("joint", "reasoning", "log_probs")}
        told = kept | {"model": str(own.model), "sampling": own.sampling.model_dump()}
        about = {"key": self.address.key, "name": self.address.model, "port": port, "settings": told}
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{json.dumps(about)}\n".encode())
            process.stdin.close()
        return process

    def _said(self) -> str:
        text = self.log.read_text(errors="replace")[-TAIL:].strip() if self.log.exists() else ""
        return f"The end of {self.log}: {text or '(nothing)'}"


def models(address: Address) -> list[str]:
    """Names of the models that a server says it has. httpx.HTTPError when it says nothing of the kind."""
    answer = httpx.get(f"{address.url}/models", headers={"Authorization": f"Bearer {address.key}"}, timeout=LOOK_S)
    answer.raise_for_status()
    try:
        return [str(one["id"]) for one in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise httpx.DecodingError(f"no list of models: {answer.text[:200]}") from None


def answers(address: Address) -> bool:
    """Whether our model is there and in health."""
    try:
        healthy = httpx.get(f"{address.url.removesuffix('/v1')}/health", timeout=LOOK_S).is_success
        return healthy and address.model in models(address)
    except httpx.HTTPError:
        return False


def check_golden(address: Address, golden: Messages, accepts: Callable[[str], bool], max_new_tokens: int) -> str | None:
    """What is wrong with the answer to the golden question; None when it is acceptable."""
    body = {
        "model": address.model,
        "messages": list(golden),
        "temperature": 0,
        "max_tokens": max_new_tokens,
        **address.extra,
    }
    try:
        answer = httpx.post(
            f"{address.url}/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {address.key}"},
            timeout=300.0,
        )
        answer.raise_for_status()
        text = answer.json()["choices"][0]["message"]["content"] or ""
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        return f"does not answer the golden question: {error}"
    return None if accepts(text) else f"answers the golden question with {text[-200:]!r}"

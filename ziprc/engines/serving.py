"""A small server around our engine that speaks the OpenAI chat API, so that who asks need not know what answers.

It has what a grader needs and no more: `POST /v1/chat/completions` (one choice, no stream), `GET /v1/models`, `GET /health`.
Requests that arrive a few milliseconds apart are one batch of the engine. What it cannot do it refuses with a 400, a prompt
that is too long with the limit in the text. It reads its settings, and the key that callers must show, from standard input,
so that neither stands in the list of processes. Started by server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ziprc.chat import prompt_token_ids
from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import Engine, EngineSettings, Request, Response
from ziprc.errors import UserError
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.tables.rollouts import FinishReason

GATHER_S = 0.02  # requests that come no further apart are one batch,
LONGEST_GATHER_S = 0.5  # which does not wait longer than this
Asked = tuple[Request, "Future[Response]"]


class Batches:
    """One thread that owns the engine and answers whatever has come in since its last batch."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine, self.most = engine, most
        self.waiting: SimpleQueue[Asked] = SimpleQueue()
        threading.Thread(target=self._work, name="batches", daemon=True).start()

    def ask(self, request: Request) -> Future[Response]:
        future: Future[Response] = Future()
        self.waiting.put((request, future))
        return future

    def _work(self) -> None:
        while True:
            batch, until = [self.waiting.get()], time.monotonic() + LONGEST_GATHER_S
            with contextlib.suppress(Empty):
                while len(batch) < self.most and time.monotonic() < until:
                    batch.append(self.waiting.get(timeout=GATHER_S))
            try:
                found = self.engine.generate([request for request, _ in batch])
                for (_, future), response in zip(batch, found, strict=True):
                    future.set_result(response)
            except Exception as error:  # the boundary: who asked hears of it, as a 500
                for _, future in batch:
                    future.set_exception(error)


def application(settings: EngineSettings, tokenizer: Any, batches: Batches, name: str, key: str) -> Any:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def refused(status: int, message: str) -> Any:
        return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)

    def guarded(answer: Callable[..., Any]) -> Callable[..., Any]:
        async def only_with_key(request: Any) -> Any:
            if request.headers.get("authorization") != f"Bearer {key}":
                return refused(401, "a key is needed: Authorization: Bearer …")
            return await answer(request)

        return only_with_key

    async def health(request: Any) -> Any:
        return JSONResponse({})

    async def models(request: Any) -> Any:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    async def chat(request: Any) -> Any:
        try:
            body = json.loads(await request.body())
            asked = Request("", *wanted(body, settings, tokenizer))
            if body.get("model") != name:
                return refused(404, f"there is no model {str(body.get('model'))[:100]!r}; this server has {name}")
        except (ValueError, TypeError, KeyError, AttributeError, UserError) as error:
            return refused(400, str(error)[:1000])
        response = await asyncio.wrap_future(batches.ask(asked))
        ended = response.finish_reason is FinishReason.STOP
        return JSONResponse(
            {
                "id": f"chatcmpl-{time.monotonic_ns()}", "object": "chat.completion", "created": int(time.time()), "model": name,
                "choices": [
                    {
                        "index": 0, "finish_reason": "stop" if ended else "length",
                        "message": {
                            "role": "assistant", "content": tokenizer.decode(response.token_ids, skip_special_tokens=True)
                        },
                    }
                ],
                "usage": {
                    "prompt_tokens": len(asked.prompt_token_ids), "completion_tokens": len(response.token_ids),
                    "total_tokens": len(asked.prompt_token_ids) + len(response.token_ids),
                },
            }
        )  # fmt: skip

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", guarded(models)),
            Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
        ]
    )


def wanted(
    body: dict[str, Any], settings: EngineSettings, tokenizer: Any
) -> tuple[tuple[int, ...], int, int, Sampling]:
    """Prompt tokens, seed, cap and sampling of a request. UserError or ValueError for what cannot be honoured."""
    if body.get("stream") or body.get("n", 1) != 1 or body.get("tools"):
        raise UserError("this server gives one choice, whole, without tools: leave out stream, n and tools")
    messages = [{"role": str(m["role"]), "content": m["content"]} for m in body["messages"]]
    if not messages or any(not isinstance(m["content"], str) for m in messages):
        raise UserError("messages with text as content are expected")
    ids = tuple(prompt_token_ids(tokenizer, messages, thinking=False))
    cap = int(body.get("max_completion_tokens") or body.get("max_tokens") or settings.max_model_len - len(ids))
    if cap < 1 or len(ids) + cap > settings.max_model_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens and may be answered with {cap}; this model's maximum is {settings.max_model_len}"
        )
    sampling = Sampling(temperature=body.get("temperature", 1.0), top_p=body.get("top_p", 1.0), min_p=0.0)
    return ids, int(body.get("seed") or 0), cap, sampling


def main() -> None:
    import uvicorn

    own = json.loads(sys.stdin.readline())
    key, name, port, given = own["key"], own["name"], own["port"], own["settings"]
    settings = EngineSettings(
        **{
            **given, "model": Path(given["model"]), "sampling": Sampling(**given["sampling"]),
            "banned": tuple(map(tuple, given["banned"])), "stop_token_ids": tuple(given["stop_token_ids"]),
        }
    )  # fmt: skip
    tokenizer = load_tokenizer(settings.model)
    with contextlib.closing(start("hf", settings)) as engine:
        app = application(settings, tokenizer, Batches(engine, settings.max_num_seqs), name, key)
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()

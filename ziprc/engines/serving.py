"""A small server around our engine that speaks the OpenAI chat API, so that who asks need not know what answers.

It has what a grader needs and no more: `POST /v1/chat/completions` (one choice, no stream), `GET /v1/models`, `GET /health`.
Requests that arrive a few milliseconds apart are one batch of the engine; one whose asker has left is dropped before it costs
anything. What it cannot do it refuses with a 400, a prompt that is too long with the limit in the text. It reads its settings,
and the key that callers must show, from standard input, so that neither stands in the list of processes. Started by server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import secrets
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
KEEP_ALIVE_S = 75  # longer than clients keep an idle connection, so that it is they who close it
SEEDS = 1 << 63
CLIENT_LEFT = 499  # nginx's status; nobody reads it
Asked = tuple[Request, "Future[Response]"]

# What asks for something that this server has not, unless it has one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,), "n": (1,), "best_of": (1,), "tools": ([],), "functions": ([],), "stop": ([], ""), "stop_token_ids": ([],),
    "logprobs": (False,), "top_logprobs": (0,), "prompt_logprobs": (), "response_format": ({"type": "text"},),
    "structured_outputs": (), "logit_bias": ({},), "bad_words": ([],), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "min_tokens": (0,), "continue_final_message": (False,), "add_generation_prompt": (True,),
    "chat_template": (), "chat_template_kwargs": ({}, {"enable_thinking": False}), "use_beam_search": (False,), "echo": (False,),
}  # fmt: skip


class Batches:
    """One thread that owns the engine and answers whatever has come in since its last batch."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine, self.most = engine, most
        self.waiting: SimpleQueue[Asked] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self.thread.start()

    def ask(self, request: Request) -> Future[Response]:
        """The response that is to come; cancelled before its batch begins, it costs nothing."""
        future: Future[Response] = Future()
        self.waiting.put((request, future))
        return future

    def _work(self) -> None:
        while True:
            batch, until = [self.waiting.get()], time.monotonic() + LONGEST_GATHER_S
            with contextlib.suppress(Empty):
                while len(batch) < self.most and time.monotonic() < until:
                    batch.append(self.waiting.get(timeout=GATHER_S))
            if wanted := [one for one in batch if one[1].set_running_or_notify_cancel()]:
                self._answer(wanted)

    def _answer(self, batch: list[Asked]) -> None:
        """Answer all, or each by itself, so that one request on which the engine fails spoils no other."""
        try:
            found = self.engine.generate([request for request, _ in batch])
        except Exception as error:  # the boundary: who asked hears of it, as a 500
            if len(batch) > 1:
                for one in batch:
                    self._answer([one])
            else:
                batch[0][1].set_exception(error)
            return
        for (_, future), response in zip(batch, found, strict=True):
            future.set_result(response)


def application(settings: EngineSettings, tokenizer: Any, batches: Batches, name: str, key: str) -> Any:
    """The ASGI application."""
    from jinja2 import TemplateError
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    shown = f"Bearer {key}".encode()

    def refused(status: int, message: str) -> Any:
        return JSONResponse({"error": {"message": message, "code": status}}, status_code=status)

    def guarded(answer: Callable[..., Any]) -> Callable[..., Any]:
        async def only_with_key(request: Any) -> Any:
            if not secrets.compare_digest(request.headers.get("authorization", "").encode(), shown):
                return refused(401, "a key is needed: Authorization: Bearer …")
            return await answer(request)

        return only_with_key

    async def health(request: Any) -> Any:
        return JSONResponse({}, status_code=200 if batches.thread.is_alive() else 503)

    async def models(request: Any) -> Any:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    async def chat(request: Any) -> Any:
        """One answer, unless whoever asked has left before it began."""
        try:
            body = json.loads(await request.body())
            if body.get("model") != name:
                return refused(404, f"there is no model {str(body.get('model'))[:100]!r}; this server has {name}")
            asked = Request("", *wanted(body, settings, tokenizer))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, TemplateError, UserError) as error:
            return refused(400, str(error)[:1000])
        answer, leaves = asyncio.wrap_future(batches.ask(asked)), asyncio.ensure_future(left(request))
        await asyncio.wait({answer, leaves}, return_when=asyncio.FIRST_COMPLETED)
        leaves.cancel()
        if not answer.done():
            answer.cancel()
            return Response(status_code=CLIENT_LEFT)
        response = answer.result()
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


async def left(request: Any) -> None:
    """Return when whoever asked has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def wanted(
    body: dict[str, Any], settings: EngineSettings, tokenizer: Any
) -> tuple[tuple[int, ...], int, int, Sampling]:
    """Prompt tokens, seed, cap and sampling of a request. UserError or ValueError for what cannot be honoured."""
    for field, neutral in NEUTRAL.items():
        if (said := body.get(field)) is not None and said not in neutral:
            raise UserError(
                f"this server gives one choice, whole, in plain text: leave out {field}, found {str(said)[:100]!r}"
            )
    messages = [{"role": str(m["role"]), "content": m["content"]} for m in body["messages"]]
    if not messages or any(not isinstance(m["content"], str) for m in messages):
        raise UserError("messages with text as content are expected")
    ids = tuple(prompt_token_ids(tokenizer, messages, thinking=False))
    caps = [body[field] for field in ("max_completion_tokens", "max_tokens") if body.get(field) is not None]
    cap = caps[0] if caps else settings.max_model_len - len(ids)
    if type(cap) is not int:
        raise UserError(f"max_completion_tokens is a whole number, found {str(cap)[:100]!r}")
    if cap < 1 or len(ids) + cap > settings.max_model_len:
        raise UserError(
            f"the prompt has {len(ids)} tokens and may be answered with {cap}; this model's maximum is {settings.max_model_len}"
        )
    seed = body.get("seed") or 0
    if type(seed) is not int or not -SEEDS <= seed < SEEDS:
        raise UserError(f"seed is a whole number of 64 bits, found {str(seed)[:100]!r}")
    given = [(name, body[name]) for name in ("temperature", "top_p", "top_k", "min_p") if body.get(name) is not None]
    return ids, seed, cap, sampling_of(tuple(given))


@functools.lru_cache(64)
def sampling_of(given: tuple[tuple[str, Any], ...]) -> Sampling:
    """What was asked for, over the defaults of the API. One object for all that ask alike: the engine tells rows apart by it."""
    own = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, **dict(given)}
    return Sampling(**own | {"top_k": 0 if own["top_k"] == -1 else own["top_k"]})  # -1 is vLLM's word for all


def main() -> None:
    """Read the settings from standard input, a line of JSON, and serve until ended."""
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
        uvicorn.run(
            app,
            host="127.0.0.1",
            port=port,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )


if __name__ == "__main__":
    main()

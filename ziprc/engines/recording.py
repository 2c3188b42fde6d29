"""Rollouts as an engine makes them, piece by piece, and the rows that come of them.

A piece starts from a drained engine with an empty prefix cache, and its seeds come from outside, so its bytes depend
neither on earlier pieces nor on the number of workers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, Response
from ziprc.errors import UserError
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.progress import progress
from ziprc.store.digests import digest_json
from ziprc.tables.pieces import Pieces
from ziprc.tables.rollouts import ROLLOUTS, FinishReason

ID_LENGTH = 24


@dataclass(frozen=True)
class Wanted:
    """One rollout to be made."""

    prompt_id: str
    thinking: bool
    sample_index: int
    seed: int
    prompt: tuple[int, ...]
    begun: tuple[int, ...] = ()  # what of the response is given, and counts among its tokens

    def rollout_id(self, policy: str) -> str:
        content = [self.prompt_id, policy, self.thinking, self.sample_index, self.seed]
        return digest_json(content)[:ID_LENGTH]


def _token_lists(lists: Sequence[Sequence[int]]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]).astype(np.int64)
    values = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=int(offsets[-1]))
    return pa.LargeListArray.from_arrays(offsets, values)


def response_texts(responses: Sequence[Response], tokenizer: Any) -> list[str]:
    """The texts keep special tokens, but not the stop token."""
    ids = [list(r.token_ids[:-1] if r.finish_reason is FinishReason.STOP else r.token_ids) for r in responses]
    found: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return found


def check_fit(prompts: Mapping[str, int], own: Any, section: str = "rollouts") -> None:
    """Refuse prompts, by id with their tokens, that leave no room for a whole response; lengths are `own`, of a section."""
    long = {prompt_id: n for prompt_id, n in prompts.items() if n > own.max_model_len - own.max_new_tokens}
    if long:
        worst = max(long, key=lambda prompt_id: long[prompt_id])
        raise UserError(
            f"{len(long)} of {len(prompts)} prompts do not fit: prompt {worst} has {long[worst]} tokens, and with up "
            f"to {own.max_new_tokens} new tokens ({section}.max_new_tokens) it passes the limit of {own.max_model_len}. "
            f"Raise {section}.max_model_len to at least {long[worst] + own.max_new_tokens}, or lower "
            f"{section}.max_new_tokens."
        )


def rollout_table(wanted: Sequence[Wanted], responses: Sequence[Response], policy: str, tokenizer: Any) -> pa.Table:
    """Columns of the rollouts table, in the order wanted."""
    return ROLLOUTS.make(
        {
            "rollout_id": [w.rollout_id(policy) for w in wanted],
            "prompt_id": [w.prompt_id for w in wanted],
            "sample_index": [w.sample_index for w in wanted],
            "seed": [w.seed for w in wanted],
            "prompt_token_ids": _token_lists([w.prompt for w in wanted]),
            "response_token_ids": _token_lists([r.token_ids for r in responses]),
            "response_text": response_texts(responses, tokenizer),
            "finish_reason": [r.finish_reason.value for r in responses],
            "thinking": [w.thinking for w in wanted],
            "policy": [policy] * len(wanted),
        }
    )


@dataclass(frozen=True)
class Recording:
    """How the pieces of a rollouts table are made."""

    pieces: Pieces
    kind: str  # of engine
    settings: EngineSettings
    policy: str
    max_new_tokens: int

    def run(self, title: str, parts: Sequence[tuple[int, Sequence[Wanted]]]) -> None:
        """Start an engine and make these pieces, each with its number, one after the other."""
        tokenizer = load_tokenizer(self.settings.model)
        most = sum(len(wanted) for _, wanted in parts) * self.max_new_tokens
        with contextlib.closing(start(self.kind, self.settings)) as engine, progress(most, title, "tok") as bar:

            def on_tokens(tokens: int) -> None:
                bar.total -= self.max_new_tokens - tokens  # what this response did not use
                bar.update(tokens)

            for number, wanted in parts:
                requests = [
                    Request(w.rollout_id(self.policy), w.prompt + w.begun, w.seed, self.max_new_tokens - len(w.begun))
                    for w in wanted
                ]
                found = engine.generate(requests, on_tokens)
                responses = [
                    replace(one, token_ids=w.begun + one.token_ids) if w.begun else one
                    for w, one in zip(wanted, found, strict=True)
                ]
                self.pieces.write(number, rollout_table(wanted, responses, self.policy, tokenizer))

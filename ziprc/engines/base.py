"""What an engine is: requests in, responses out, in the order given.

Two engines stand behind this interface: vLLM, and plain Transformers as the exact reference. A response depends on its
request alone (prompt, seed, cap) and on the settings; order and batching may move a logit by a rounding error, nothing
else. Two rules hold in both, at any setting: rows of the output matrix that the tokenizer does not know are never
sampled, and the finish reason is the engine's own word. `generate` runs requests to their end; a `session` is the same
engine under live control, one step at a time. Imports no torch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from ziprc.config.base import Runtime, Sampling
from ziprc.config.shared import Judge, Rollouts
from ziprc.errors import UserError, first_few
from ziprc.joint.reasoning import ReasoningVocabulary, read_reasoning
from ziprc.joint.vocabulary import IdRange, Vocabulary
from ziprc.processor import native_bfloat16
from ziprc.store.files import read_json
from ziprc.tables.rollouts import FinishReason

if TYPE_CHECKING:
    import torch

    from ziprc.joint.head import JointHead

OnTokens = Callable[[int], None]
Watch = Callable[[Sequence[int], Sequence[int], NDArray[np.float32]], Iterable[int]]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True)
class Request:
    """One response that is wanted. `key` is the caller's name for it."""

    key: str
    prompt_token_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    sampling: Sampling | None = None  # None: the engine's
    stop: tuple[int, ...] = ()  # ids that end it besides the engine's stop tokens


@dataclass(frozen=True)
class Response:
    """What came out; `token_ids` include the stop token.

    Row j of `joint` [m, R·L] comes from the forward pass that emitted token j, so it knows the tokens before j only:
    the same state as labelled state j of `joint.readout`. `log_probs` [m] are those of the tokens under the law that drew
    them: after temperature and filters, outside the banned rows. Both None unless the engine was asked for them.
    """

    key: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    joint: NDArray[np.float32] | None = None
    log_probs: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Step:
    """What one step of a session emitted: one row per request that got a token, n rows.

    A row is the state in which `token_ids[i]` was drawn, so it knows the tokens before it only. What the state says
    about the future (`joint`, `entropy`) comes from the very forward pass that emitted the token; `log_prob` looks
    back, at the last token that the state knows. Both are of the model itself: neither tempered nor filtered.
    """

    keys: list[str]  # whose row it is
    token_ids: NDArray[np.int32]  # [n] the stop token included
    position: NDArray[np.int32]  # [n] of the token in its response; 0 is the first
    finish: list[FinishReason | None]  # why the response ended with this token
    joint: NDArray[np.float32] | None  # [n, R·L]; None unless the engine was asked to read
    log_prob: NDArray[np.float32]  # [n] of the token at position - 1, outside the banned rows; 0 at position 0
    entropy: NDArray[np.float32]  # [n] in nats, outside the banned rows
    cached: NDArray[np.int32]  # [n] prompt tokens that came from the prefix cache


@dataclass(frozen=True)
class EngineSettings:
    """The model, how it is sampled, and the knobs of the machine.

    `joint` is read at every token when it is given; `banned` rows are never sampled either way, and those of `reasoning` in the
    thinking block alone. `log_probs`: `generate` says how likely each token was.
    """

    model: Path
    sampling: Sampling
    stop_token_ids: tuple[int, ...]
    banned: tuple[IdRange, ...]
    max_model_len: int
    joint: JointHead | None = None
    reasoning: ReasoningVocabulary | None = None
    log_probs: bool = False
    dtype: Dtype = "float32"
    max_num_seqs: int = 256
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_gib: int = 1
    enforce_eager: bool = True
    stall_limit_s: float = 900.0  # a step that takes longer ends the process (watchdog.py)

    @property
    def joint_rows(self) -> slice | None:
        """The rows of the joint head, where it is read."""
        return None if self.joint is None else self.joint.layout.joint_slice


class Session(Protocol):
    """Live control of an engine: requests come and go while others decode.

    To resume a response or to branch from it, add a request whose prompt is the old prompt and the tokens to keep: the
    prefix cache still has them, in whole blocks. A key names one request in flight and may be used again afterwards.
    """

    def add(self, request: Request) -> None:
        """Let the request join at the next step, or as soon as there is room. UserError when it can never fit."""

    def abort(self, keys: Iterable[str]) -> None:
        """These emit nothing more and free their memory; a key that has already finished is no error."""

    def step(self) -> Step | None:
        """Decode one token of every request that has room; None when nothing is in flight."""

    def close(self) -> None:
        """Abort whatever is in flight; the engine may then generate, or open another session."""


class Engine(Protocol):
    """Generates. Every call to `generate` starts from a drained engine with an empty prefix cache.

    Close it whatever happens (`contextlib.closing`): its watchdog would go on, and end a process that has moved on.
    """

    def generate(
        self, requests: Sequence[Request], on_tokens: OnTokens | None = None, watch: Watch | None = None
    ) -> list[Response]:
        """Responses in the order of the requests; `on_tokens` hears how many tokens each finished response has.

        `watch` is told at every step which requests go on (by their place among `requests`), how many tokens each had in the
        state that was read, and the joint of those states [n, R·L]; those that it names end there, as FinishReason.ABORT.
        It needs an engine that reads a joint.
        """

    def session(self) -> Session:
        """A drained engine with an empty prefix cache, under live control; one at a time."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take on these weights, by the names that Transformers gives them; tied ones once, under either name.

        What was cached of the old ones is dropped. UserError for a name that the model has not, or one that is missing.
        """

    def close(self) -> None: ...


def check_request(request: Request, in_flight: Container[str], max_model_len: int) -> None:
    """Refuse what an engine could not run to its cap."""
    prompt, cap = len(request.prompt_token_ids), request.max_new_tokens
    if request.key in in_flight:
        raise UserError(f"Request {request.key} is already in flight. Abort that one first, or use another key.")
    if not prompt or cap < 1:
        raise UserError(
            f"Request {request.key} has {prompt} prompt tokens and a cap of {cap}; both must be at least 1."
        )
    if prompt + cap > max_model_len:
        raise UserError(
            f"Request {request.key} has {prompt} prompt tokens and may add {cap}, {prompt + cap} in all; the engine "
            f"holds max_model_len={max_model_len}. Lower max_new_tokens, or raise max_model_len."
        )


def check_weights(names: Iterable[str], folder: Path) -> None:
    """UserError unless these are the weights of the model in `folder`; a tied output matrix may go without saying."""
    found, known = set(names), set[str]()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as weights:
            known |= set(weights.keys())
    if (missing := known - found) or (unknown := found - known - {"lm_head.weight"}):
        what, wrong = ("lack", missing) if missing else ("hold unknown", unknown)
        raise UserError(
            f"The weights for the engine of {folder} {what} {first_few(sorted(wrong))}: they are another model's."
        )


def settings_for(
    folder: Path, tokenizer: Any, own: Rollouts | Judge, sampling: Sampling, machine: Runtime, tensor_parallel: int,
    log_probs: bool = False, copies: bool = True,
) -> EngineSettings:  # fmt: skip
    """How the model in `folder` is run: lengths and dtype from its section, knobs from `runtime`; no unknown id is sampled.

    `copies`: whether those of a reasoning vocabulary may be used at all.
    """
    reasoning, banned = read_reasoning(folder), unknown_rows(folder, tokenizer)
    if reasoning is not None and not copies:
        banned, reasoning = (*banned, (reasoning.rows.start, reasoning.rows.stop)), None
    return EngineSettings(
        folder, sampling, stop_token_ids(folder, tokenizer), banned, own.max_model_len, reasoning=reasoning,
        log_probs=log_probs, dtype=own.dtype, tensor_parallel=tensor_parallel,
        max_num_seqs=machine.max_num_seqs, gpu_memory_utilization=machine.gpu_memory_utilization,
        kv_cache_gib=machine.kv_cache_gib, enforce_eager=machine.enforce_eager, stall_limit_s=machine.stall_limit_s,
    )  # fmt: skip


def own_dtype(settings: EngineSettings, on_cpu: bool) -> str:
    """The dtype to run in; `auto` is that of the checkpoint (vLLM's own `auto` would turn float32 into bfloat16).

    A bfloat16 checkpoint runs in float32 on a processor that could only emulate bfloat16, and stderr says so.
    """
    if settings.dtype != "auto":
        return settings.dtype
    config = read_json(settings.model / "config.json")
    own = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if own == "bfloat16" and on_cpu and not native_bfloat16():
        print(
            f"{settings.model} is in bfloat16, for which this processor has no instructions: it runs in float32, in twice "
            "the memory. To have bfloat16 emulated, write it for `auto` (rollouts.dtype, grades.judge.dtype).",
            file=sys.stderr,
            flush=True,
        )
        return "float32"
    return own


def stop_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: those of the generation config (else of the model config) and the tokenizer's."""
    source = folder / "generation_config.json"
    named = read_json(source if source.exists() else folder / "config.json").get("eos_token_id")
    found = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    stops = tuple(sorted(int(i) for i in found if i is not None))
    if not stops:
        raise UserError(f"{folder} names no end token: neither generation config nor tokenizer has eos_token_id.")
    return stops


def unknown_rows(folder: Path, tokenizer: Vocabulary) -> tuple[IdRange, ...]:
    """The rows of the output matrix that are no token: the joint head and whatever pads the vocabulary."""
    return gaps(tokenizer.get_vocab().values(), read_json(folder / "config.json")["vocab_size"])


def gaps(used: Iterable[int], size: int) -> tuple[IdRange, ...]:
    """Half-open ranges of [0, size) that hold no used id."""
    edges = [-1, *sorted({i for i in used if i < size}), size]
    return tuple((a + 1, b) for a, b in itertools.pairwise(edges) if b - a > 1)

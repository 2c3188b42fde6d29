"""vLLM, on CPUs and GPUs, inside our own process: the engine that makes the rollouts.

One custom logits processor applies our taps (taps.py), which stock vLLM cannot do: softmax over the R·L rows of the joint
head is read in the very forward pass that emits a token, and then every row that is no token is set to -inf, before
temperature and min-p and for greedy sampling too. vLLM has two model runners with an interface for processors each, and
ours serves both: the second runs wherever Triton exists, the first elsewhere, as on a CPU. A session drives the same
engine a step at a time. What had to be learned about vLLM is noted where it matters.
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Read when vLLM is imported. The engine runs in this process, so that readings need not cross a process border; nothing
# is sent anywhere.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_DO_NOT_TRACK"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunnersProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunnersProcessor

from ziprc.engines.base import (
    EngineSettings,
    OnTokens,
    Request,
    Response,
    Step,
    Watch,
    check_request,
    check_weights,
    own_dtype,
)
from ziprc.engines.taps import Ban, LogitsTap, Place, ReadJoint, ReadStates, Region, Text, TextRows, taps_of
from ziprc.engines.watchdog import Watchdog
from ziprc.errors import UserError
from ziprc.joint.reasoning import ReasoningVocabulary
from ziprc.store.files import read_json
from ziprc.tables.rollouts import FinishReason

warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # CPU wheels have no Triton, and need none

BATCHED_TOKENS = 8192  # tokens of one forward pass on a CPU
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # csrc/cpu/cpu_attn.cpp
BLOCK_TOKENS = 32  # smallest KV block of the CPU backend; only whole blocks of a prompt are shared

# How a processor, which vLLM constructs, finds the taps of its engine: those of a whole call, or of a session.
_taps: dict[int, list[LogitsTap]] = {}
_engine_ids = itertools.count()


class ApplyTaps(FirstRunnersProcessor, SecondRunnersProcessor):
    """Applies our taps to the rows of our requests and leaves the others alone: warm-up requests are not ours.

    The first model runner constructs it with (config, device, is_pin_memory), tells who moved by `update_state` and calls
    `apply(logits)`; the second with (config, state of the requests), `add_request` and `apply(logits, context)`.
    Configured through `additional_config["ziprc"]`.
    """

    def __init__(self, vllm_config: VllmConfig, device_or_state: Any, is_pin_memory: bool = False) -> None:
        own = vllm_config.additional_config["ziprc"]
        self.engine, self.state = own["engine"], device_or_state
        region = [Region(ReasoningVocabulary.from_dict(own["reasoning"]))] if own.get("reasoning") else []
        self.reads = bool(region)  # whether any tap looks at tokens
        # For a tensor-parallel worker: the taps are in our process.
        self.alone: list[LogitsTap] = [*region, Ban(own["banned"])]
        # Row of the batch (first runner) or slot, which a request keeps (second) → request.
        self.requests: dict[int, _Known] = {}

    def is_argmax_invariant(self) -> bool:
        return False  # so it runs first, and for greedy sampling too

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The first runner's news: requests that came, went or changed rows."""
        process_dict_updates(self.requests, batch_update, _request_of)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """The second runner's news: a request has taken this slot, whoever had it before."""
        self.requests.pop(req_idx, None)
        if (found := _request_of(sampling_params, None, [])) is not None:
            self.requests[req_idx] = found
        return found is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """[B, V] in place; taps see our rows only."""
        found = self._places(ctx, len(logits))
        if found:
            rows = list(found)
            places, texts = zip(*found.values(), strict=True)
            own = logits if len(rows) == len(logits) else logits[rows]
            for tap in _taps.get(self.engine, self.alone):
                tap.apply(places, own, texts)
            if own is not logits:
                logits[rows] = own
        return logits

    def _places(self, ctx: LogitsContext | None, rows: int) -> dict[int, tuple[Place, Text]]:
        """Place and text of every row that is ours, from what the host knows."""
        if ctx is None:  # where vLLM schedules ahead, the last token is a placeholder; then only their number is used
            known = sorted(self.requests.items())
            return {row: ((of.number, len(of.out)), Text(of.begin, of.temperature, of.read)) for row, of in known}
        assert rows == len(ctx.idx_mapping_np), "one row a request, and exact lengths: no speculative decoding"
        slots, lengths, prompt = ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np, self.state.prompt_len.np
        ours = [(row, slot) for row, slot in enumerate(slots) if slot in self.requests]
        last: list[int] = []
        if self.reads and ours:  # what was drawn last is on the device: one copy for all rows
            at = torch.tensor([[slot, lengths[row] - 1] for row, slot in ours]).T
            last = self.state.all_token_ids.gpu[at[0], at[1]].tolist()
        found = {}
        for number, (row, slot) in enumerate(ours):
            of, position = self.requests[slot], int(lengths[row] - prompt[slot])

            def read(first: int, stop: int, slot: int = slot, number: int = number) -> list[int]:
                if stop - first == 1:
                    return [last[number]]
                begin = int(prompt[slot])
                row: list[int] = self.state.all_token_ids.gpu[slot, begin + first : begin + stop].tolist()
                return row

            found[row] = (of.number, position), Text(of.begin, of.temperature, read)
        return found


@dataclass(frozen=True)
class _Known:
    """A request of ours, as a processor knows it; `out` is live for the first runner, and empty for the second."""

    number: int
    begin: int  # where in the assistant's turn its prompt ends
    temperature: float
    out: list[int]

    def read(self, first: int, stop: int) -> list[int]:
        found = self.out[first:stop]
        assert min(found, default=0) >= 0, "a token that is not known yet: vLLM schedules ahead of what it has drawn"
        return found


def _request_of(params: SamplingParams, _prompt: list[int] | None, out: list[int]) -> _Known | None:
    own = params.extra_args or {}
    if "ziprc_request" not in own:
        return None
    return _Known(own["ziprc_request"], own.get("ziprc_begin", 0), params.temperature, out)


class VLLMEngine:
    """One vLLM engine in this process (its tensor-parallel workers, if any, are processes of their own).

    Several may live side by side, but the first that is closed or garbage-collected takes the process's distributed
    state with it, and the others die at their next step.
    """

    def __init__(self, settings: EngineSettings) -> None:
        if settings.joint is not None and settings.tensor_parallel > 1:
            raise UserError(
                f"The joint head cannot be read while sampling with tensor_parallel={settings.tensor_parallel}: the "
                "readings live in another process. Use one device per engine, or read the joint afterwards "
                "(introspection)."
            )
        if current_platform.is_cpu():
            _check_head_dim(settings)
        self.settings = settings
        self._id = next(_engine_ids)
        self._session: VLLMSession | None = None
        self._set_num_threads = torch.set_num_threads  # a CPU engine replaces it by a no-op, for the whole process
        try:
            self.llm = LLM(**self._arguments())
        except ValueError as error:
            raise UserError(f"vLLM refused to start with {settings.model}: {error}") from error
        self.watchdog = Watchdog(settings.stall_limit_s, f"vLLM with {settings.model}")

    def generate(
        self, requests: Sequence[Request], on_tokens: OnTokens | None = None, watch: Watch | None = None
    ) -> list[Response]:
        """As `Engine.generate`."""
        engine, reader = self.llm.llm_engine, ReadJoint(self.settings.joint_rows) if self.settings.joint_rows else None
        self._start(reader)
        kind = RequestOutputKind.FINAL_ONLY if watch is None else RequestOutputKind.CUMULATIVE
        ids = [self._add(request, number, kind) for number, request in enumerate(requests)]
        texts: dict[int, CompletionOutput] = {}
        live, ended = set(range(len(requests))), set[int]()
        while engine.has_unfinished_requests():
            with self.watchdog.watching():
                outputs = engine.step()
            for output in outputs:
                number = int(output.request_id)
                if number in live:
                    texts[number] = output.outputs[0]
            for number in [int(output.request_id) for output in outputs if output.finished]:
                if number in live:
                    live.remove(number)
                    if on_tokens is not None:
                        on_tokens(len(texts[number].token_ids))
            if watch is not None and reader is not None:
                stopped = reader.stopped(watch, live & set(texts))
                engine.abort_request([ids[number] for number in stopped], internal=True)
                live, ended = live - stopped, ended | stopped
        responses = [texts[number] for number in range(len(requests))]
        said = [_log_probs(text) if self.settings.log_probs else None for text in responses]
        joint: list[Any] = [None] * len(responses)
        if reader and responses:
            joint = reader.by_request([len(text.token_ids) for text in responses])
        del _taps[self._id]  # and all that was read
        why = [FinishReason.ABORT if n in ended else FinishReason(of.finish_reason) for n, of in enumerate(responses)]
        return [
            Response(request.key, tuple(text.token_ids), reason, reading, own)
            for request, text, reason, reading, own in zip(requests, responses, why, joint, said, strict=True)
        ]

    def session(self) -> VLLMSession:
        vocab_size = read_json(self.settings.model / "config.json")["vocab_size"]
        reader = ReadStates(self.settings.joint_rows, TextRows(self.settings.banned, vocab_size))
        self._start(reader)
        self._session = VLLMSession(self, reader)
        return self._session

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """As `Engine.load_weights`."""
        check_weights(weights, self.settings.model)
        self.llm.collective_rpc(_take_weights, args=(dict(weights),))
        self.llm.llm_engine.reset_prefix_cache()

    def close(self) -> None:
        """End the engine, and with it any other of this process."""
        self.watchdog.close()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        _taps.pop(self._id, None)
        torch.set_num_threads = self._set_num_threads

    def _start(self, reader: LogitsTap | None) -> None:
        """Drain the engine, empty its prefix cache, and let `reader` read from now on."""
        if self._session is not None:
            raise UserError("A session of this engine is still open. Close it before generating or opening another.")
        core = self.llm.llm_engine.engine_core.engine_core
        while core.batch_queue:  # where vLLM schedules ahead, a step is under way after the last request has ended
            self.llm.llm_engine.step()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM still holds KV blocks although nothing is in flight")
        _taps[self._id] = taps_of(self.settings, reader)

    def _add(self, request: Request, number: int, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY) -> str:
        """Queue the request; its output and its readings are filed under `number`. Returns vLLM's own id for it."""
        reasoning = self.settings.reasoning
        begin = reasoning.at_end(request.prompt_token_ids) if reasoning else 0
        params = SamplingParams(
            **dict(request.sampling or self.settings.sampling),
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            stop_token_ids=[*self.settings.stop_token_ids, *request.stop],
            ignore_eos=True,  # the stop ids above are all there are; vLLM adds none of its own
            detokenize=False,
            logprobs=0 if self.settings.log_probs else None,  # of the token that was drawn alone
            output_kind=kind,
            extra_args={"ziprc_request": number, "ziprc_begin": begin},
        )
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        return self.llm.llm_engine.add_request(str(number), prompt, params)

    def _arguments(self) -> dict[str, Any]:
        settings, reasoning = self.settings, self.settings.reasoning
        banned = [list(rows) for rows in settings.banned]
        own = {"banned": banned, "engine": self._id, "reasoning": reasoning.to_dict() if reasoning else None}
        return {
            "model": str(settings.model),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # sampling settings are ours alone
            "dtype": own_dtype(settings, on_cpu=current_platform.is_cpu()),
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "tensor_parallel_size": settings.tensor_parallel,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "logprobs_mode": "processed_logprobs",  # of the law that drew
            "logits_processors": [ApplyTaps],
            "additional_config": {"ziprc": own},
            **(
                {"async_scheduling": False} if reasoning else {}
            ),  # the first runner's host must know what was drawn last
            "use_tqdm_on_load": False,
            **(_cpu_arguments(settings) if current_platform.is_cpu() else {}),
        }


def _take_weights(worker: Any, weights: dict[str, torch.Tensor]) -> None:
    """Runs where the model is. On a CPU the output matrix is packed: where it is tied, nobody else packs it again."""
    runner = worker.model_runner
    runner.reload_weights(weights_iterator=iter(weights.items()))
    head = getattr(runner.get_model(), "lm_head", None)
    if current_platform.is_cpu() and head is not None and hasattr(head, "cpu_linear"):
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def _log_probs(text: CompletionOutput) -> NDArray[np.float32]:
    """[m] of the tokens of a response."""
    assert text.logprobs is not None
    rows = zip(text.logprobs, text.token_ids, strict=True)
    return np.array([row[token].logprob for row, token in rows], dtype=np.float32)


@dataclass
class _Flying:
    """A request in flight."""

    key: str
    vllm_id: str
    number: int
    emitted: int = 0
    log_prob: float = 0.0  # of its last token
    cached: int = 0


class VLLMSession:
    """Live control of one engine, in which it keeps the place of `generate`."""

    def __init__(self, engine: VLLMEngine, reader: ReadStates) -> None:
        self.engine, self.reader = engine, reader
        self._numbers = itertools.count()
        self._by_key: dict[str, _Flying] = {}
        self._by_id: dict[str, _Flying] = {}

    def add(self, request: Request) -> None:
        check_request(request, self._by_key, self.engine.settings.max_model_len)
        number = next(self._numbers)
        one = _Flying(request.key, self.engine._add(request, number), number)
        self._by_key[one.key] = self._by_id[one.vllm_id] = one

    def abort(self, keys: Iterable[str]) -> None:
        gone = [self._by_key[key] for key in set(keys) if key in self._by_key]
        self.engine.llm.llm_engine.abort_request([one.vllm_id for one in gone], internal=True)
        self._forget(gone)

    def step(self) -> Step | None:
        """As `Session.step`."""
        while self._by_id:
            outputs = [output for output in self._core_outputs() if output.request_id in self._by_id]
            if outputs:  # a step that only prefills a part of a prompt, or that fills a queue, has none
                return self._emitted(outputs)
        return None

    def close(self) -> None:
        self.abort(list(self._by_key))
        if self.engine._session is self:
            self.engine._session = None

    def _core_outputs(self) -> Sequence[EngineCoreOutput]:
        """`LLMEngine.step`, less the two objects it makes per token: a tenth of the time of a small model."""
        engine = self.engine.llm.llm_engine
        with self.engine.watchdog.watching():
            outputs = engine.engine_core.get_output().outputs
        engine.output_processor.process_outputs(outputs)  # its own list of who is in flight
        return outputs

    def _emitted(self, outputs: Sequence[EngineCoreOutput]) -> Step:
        """What the outputs of one step say, joined with what was read where they were drawn."""
        rows = [self._by_id[output.request_id] for output in outputs]
        tokens = np.array([token for output in outputs for token in output.new_token_ids], dtype=np.int32)
        assert len(tokens) == len(rows), "a step emits one token of a request"
        states = self.reader.take([(row.number, row.emitted) for row in rows], tokens)
        for row, output in zip(rows, outputs, strict=True):
            if output.prefill_stats is not None:  # with the first token only
                row.cached = output.prefill_stats.num_cached_tokens
        step = Step(
            keys=[row.key for row in rows],
            token_ids=tokens,
            position=np.array([row.emitted for row in rows], dtype=np.int32),
            finish=[None if o.finish_reason is None else FinishReason(str(o.finish_reason)) for o in outputs],
            joint=states.joint,
            log_prob=np.array([row.log_prob for row in rows], dtype=np.float32),
            entropy=states.entropy,
            cached=np.array([row.cached for row in rows], dtype=np.int32),
        )
        for row, log_prob in zip(rows, states.log_prob.tolist(), strict=True):
            row.emitted, row.log_prob = row.emitted + 1, log_prob
        self._forget([row for row, why in zip(rows, step.finish, strict=True) if why is not None])
        return step

    def _forget(self, gone: Iterable[_Flying]) -> None:
        for one in gone:
            del self._by_key[one.key], self._by_id[one.vllm_id]


def _check_head_dim(settings: EngineSettings) -> None:
    """Refuse what the CPU attention kernel would only refuse in the middle of the first forward pass."""
    config = read_json(settings.model / "config.json")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim not in CPU_HEAD_DIMS:
        raise UserError(
            f"{settings.model} has attention heads of {head_dim} dimensions, which vLLM cannot run on a CPU. Use one "
            f"of {', '.join(map(str, CPU_HEAD_DIMS))} (base.architecture.head_dim), or the engine `hf`."
        )


def _cpu_arguments(settings: EngineSettings) -> Mapping[str, Any]:
    """A fixed KV cache instead of a share of all memory, and no chunked prefill.

    When a prefill is chunked, vLLM rewinds the generators of seeded requests, which CPU generators cannot do: it fails.
    """
    return {
        "kv_cache_memory_bytes": settings.kv_cache_gib << 30,
        "block_size": BLOCK_TOKENS,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(BATCHED_TOKENS, settings.max_model_len),
    }

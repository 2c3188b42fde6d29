"""vLLM, on CPUs and GPUs, inside our own process: the engine that makes the rollouts.

One custom logits processor does both things that stock vLLM cannot: it reads softmax over the R·L rows of the joint
head in the very forward pass that emits a token, and then sets every row that is no token to -inf, before temperature
and min-p and for greedy sampling too. A reading is filed under the number of output tokens so far; when a chunked
prefill or a preempted request computes a position again, the later reading overwrites the earlier one. On a GPU the
readings wait on the device and cross over once in `STEPS_PER_COPY` steps. What had to be learned about vLLM is noted
where it matters.
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

# Read when vLLM is imported. The engine runs in this process, so that readings need not cross a process border; the
# second model runner takes no custom logits processors; nothing is sent anywhere.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_DO_NOT_TRACK"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ziprc.artifacts import read_json
from ziprc.engines.base import EngineSettings, OnTokens, Request, Response, own_dtype
from ziprc.errors import UserError
from ziprc.schemas import FinishReason

warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # CPU wheels have no Triton, and need none

STEPS_PER_COPY = 64
BATCHED_TOKENS = 8192  # tokens of one forward pass on a CPU
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # csrc/cpu/cpu_attn.cpp
BLOCK_TOKENS = 32  # smallest KV block of the CPU backend; only whole blocks of a prompt are shared

_readouts: dict[int, Readout] = {}  # how an engine's processor, which vLLM constructs, finds the engine's readout
_readout_ids = itertools.count()


class Readout:
    """Readings of one `generate` call: for every step, which (request, position) each row of a tensor belongs to."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.places: list[tuple[int, int]] = []
        self._waiting: list[torch.Tensor] = []
        self._host: list[NDArray[np.float32]] = []

    def add(self, places: Sequence[tuple[int, int]], probabilities: torch.Tensor) -> None:
        """Row i of `probabilities` [B, R·L] is the reading of `places[i]`, a (request, position)."""
        assert len(places) == len(probabilities), "every row of a batch belongs to a request"
        self.places.extend(places)
        self._waiting.append(probabilities)
        if len(self._waiting) >= STEPS_PER_COPY:
            self._copy()

    def _copy(self) -> None:
        if self._waiting:
            self._host.append(torch.cat(self._waiting).cpu().numpy())
            self._waiting.clear()

    def by_request(self, lengths: Sequence[int]) -> list[NDArray[np.float32]]:
        """[m, R·L] for every request, given the m of each. The last reading of a position counts."""
        self._copy()
        request, position = np.asarray(self.places, dtype=np.int64).T
        wanted = position < np.asarray(lengths)[request]  # a step may already be under way when a response stops
        starts = np.concatenate([[0], np.cumsum(lengths)])
        readings = np.concatenate(self._host)
        rows = np.full((starts[-1], readings.shape[1]), np.nan, dtype=np.float32)
        rows[starts[request[wanted]] + position[wanted]] = readings[wanted]
        assert not np.isnan(rows).any(), "a position was never read"
        return np.split(rows, starts[1:-1])


class ReadAndMask(LogitsProcessor):
    """Reads the joint head, then bans the rows that are no token. Configured through `additional_config["ziprc"]`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        own = vllm_config.additional_config["ziprc"]
        self.banned = [slice(*rows) for rows in own["banned"]]
        self.joint = slice(*own["joint"]) if own["joint"] else None
        self.readout = _readouts.get(own["readout"])  # none in the worker processes of tensor parallelism
        self.rows: dict[int, tuple[int, list[int]]] = {}  # row of the batch → (request, its output tokens, live)

    def is_argmax_invariant(self) -> bool:
        return False  # so it runs first, and for greedy sampling too

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if self.joint is not None:
            process_dict_updates(self.rows, batch_update, _request_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.rows and self.readout is not None:
            # Softmax of its own: the slice itself is overwritten below.
            probabilities = logits[:, self.joint].float().softmax(-1)
            places = [(request, len(out)) for request, out in (self.rows[i] for i in range(len(self.rows)))]
            self.readout.add(places, probabilities)
        for rows in self.banned:
            logits[:, rows] = -torch.inf
        return logits


def _request_of(params: SamplingParams, _prompt: list[int] | None, out: list[int]) -> tuple[int, list[int]] | None:
    number = (params.extra_args or {}).get("ziprc_request")
    return None if number is None else (number, out)


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
        self._readout_id = next(_readout_ids)
        self._readout = _readouts[self._readout_id] = Readout()
        self._set_num_threads = torch.set_num_threads  # a CPU engine replaces it by a no-op, for the whole process
        self._request_ids = itertools.count()
        try:
            self.llm = LLM(**self._arguments())
        except ValueError as error:
            raise UserError(f"vLLM refused to start with {settings.model}: {error}") from error

    def generate(self, requests: Sequence[Request], on_tokens: OnTokens | None = None) -> list[Response]:
        self.llm.reset_prefix_cache()
        self._readout.clear()
        numbers: dict[str, int] = {}
        for number, request in enumerate(requests):
            numbers[str(next(self._request_ids))] = number
            self._add(next(reversed(numbers)), number, request)
        finished: dict[int, RequestOutput] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                finished[numbers[output.request_id]] = output
                if on_tokens is not None:
                    on_tokens(len(output.outputs[0].token_ids))
        outputs = [finished[number].outputs[0] for number in range(len(requests))]
        joint: Sequence[NDArray[np.float32] | None] = [None] * len(outputs)
        if self.settings.joint is not None and outputs:
            joint = self._readout.by_request([len(output.token_ids) for output in outputs])
        self._readout.clear()
        return [
            Response(request.key, tuple(output.token_ids), FinishReason(output.finish_reason), reading)
            for request, output, reading in zip(requests, outputs, joint, strict=True)
        ]

    def close(self) -> None:
        """End the engine, and with it any other of this process."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        _readouts.pop(self._readout_id)
        torch.set_num_threads = self._set_num_threads

    def _add(self, request_id: str, number: int, request: Request) -> None:
        sampling = self.settings.sampling
        params = SamplingParams(
            temperature=sampling.temperature,
            min_p=sampling.min_p,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(self.settings.stop_token_ids),
            ignore_eos=True,  # the stop ids above are all there are; vLLM adds none of its own
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"ziprc_request": number},
        )
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(request.prompt_token_ids)}, params)

    def _arguments(self) -> dict[str, Any]:
        settings = self.settings
        joint = settings.joint.layout.joint_slice if settings.joint else None
        own = {
            "banned": [list(rows) for rows in settings.banned],
            "joint": [joint.start, joint.stop] if joint else None,
            "readout": self._readout_id,
        }
        return {
            "model": str(settings.model),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # sampling settings are ours alone
            "dtype": own_dtype(settings),
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "tensor_parallel_size": settings.tensor_parallel,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "logits_processors": [ReadAndMask],
            "additional_config": {"ziprc": own},
            "use_tqdm_on_load": False,
            **(_cpu_arguments(settings) if current_platform.is_cpu() else {}),
        }


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

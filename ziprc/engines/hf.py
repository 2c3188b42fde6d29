"""The exact reference engine: batched generation with plain Transformers, no vLLM needed.

It samples as vLLM 0.32 does, step by step, so that equal seeds give equal tokens in float32: banned rows to -inf,
temperature, min-p, top-k, top-p, then the Gumbel-max draw with one generator per request. On a CPU vLLM draws one
integer a step from that generator and expands it with SplitMix64 into independent noise per token; elsewhere it divides
by exponential noise. Both are here; the first is tested against vLLM. Slower than vLLM:
batches are static. Shapes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from ziprc.config import Sampling
from ziprc.engines.base import EngineSettings, OnTokens, Request, Response, own_dtype
from ziprc.joint.checkpoint import load_model
from ziprc.schemas import FinishReason

GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS
LIVE_SHARE = 0.75  # finished rows leave the batch once fewer than this share of its rows is live

# SplitMix64 (Steele, Lea, Flood 2014) and the odd constant that numbers its streams.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))


def gumbel_noise(seeds: Sequence[int], vocab_size: int) -> NDArray[np.float64]:
    """[B, V] standard Gumbel noise, a pure function of (seed, token)."""
    keys = _mix(np.asarray(seeds, dtype=np.uint64))[:, None]
    streams = np.arange(1, vocab_size + 1, dtype=np.uint64) * GAMMA
    uniform = ((_mix(keys + streams) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Temperature, then min-p, top-k and top-p: what is cut becomes -inf. [B, V] float32, temperature > 0."""
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        floor = probabilities.amax(-1, keepdim=True) * sampling.min_p
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[:, -1] = False
        logits = logits.scatter(-1, order, ascending.masked_fill(tail, -torch.inf))
    return logits


def draw(logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token per row of filtered logits, [B]; advances every generator as vLLM would."""
    if logits.device.type == "cpu":
        seeds = [int(torch.randint(0, 2**31, (1,), generator=g)) for g in generators]
        noise = torch.from_numpy(gumbel_noise(seeds, logits.shape[-1]))
        return (logits.double() + noise).argmax(-1)
    noise = torch.empty_like(logits)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)


def sample(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Next tokens [B] from float32 logits [B, V] in which banned rows are already -inf."""
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    return draw(filtered(logits, sampling), generators)


@dataclass
class _Row:
    """One response in the making."""

    request: Request
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    joint: list[NDArray[np.float32]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, token: int, stops: frozenset[int]) -> None:
        self.tokens.append(token)
        if token in stops:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.request.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def response(self) -> Response:
        assert self.finish_reason is not None
        joint = np.stack(self.joint) if self.joint else None
        return Response(self.request.key, tuple(self.tokens), self.finish_reason, joint)


@dataclass
class _Inputs:
    """What the next forward pass is given; the first dimension is the batch."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    cache: DynamicCache

    def advance(self, tokens: torch.Tensor) -> None:
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], -1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.ids.device)
        self.ids, self.mask, self.positions = self.ids[index], self.mask[index], self.positions[index]
        self.cache.batch_select_indices(index)


class HFEngine:
    """Static batches of `max_num_seqs` requests, sorted by prompt length, padded on the left."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(settings.model, getattr(torch, own_dtype(settings))).to(self.device)
        self.stops = frozenset(settings.stop_token_ids)

    def generate(self, requests: Sequence[Request], on_tokens: OnTokens | None = None) -> list[Response]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_token_ids))
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self.settings.max_num_seqs):
            batch = order[start : start + self.settings.max_num_seqs]
            rows = [_Row(requests[i], self._generator(requests[i].seed)) for i in batch]
            self._finish(rows, on_tokens or (lambda tokens: None))
            responses.update((i, row.response()) for i, row in zip(batch, rows, strict=True))
        return [responses[i] for i in range(len(requests))]

    def close(self) -> None:
        del self.model

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def _prompts(self, rows: Sequence[_Row]) -> _Inputs:
        prompts = [torch.tensor(row.request.prompt_token_ids) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left").to(self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        mask = (torch.arange(ids.shape[1], device=self.device) >= ids.shape[1] - lengths[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return _Inputs(ids, mask, positions, DynamicCache(config=self.model.config))

    @torch.inference_mode()
    def _finish(self, rows: Sequence[_Row], on_tokens: OnTokens) -> None:
        """Generate until every row has its finish reason."""
        batch, inputs = list(rows), self._prompts(rows)
        while batch:
            tokens = self._step(batch, inputs)
            for row, token in zip(batch, tokens.tolist(), strict=True):
                if row.finish_reason is None:
                    row.add(token, self.stops)
                    if row.finish_reason is not None:
                        on_tokens(len(row.tokens))
            inputs.advance(tokens)
            live = [i for i, row in enumerate(batch) if row.finish_reason is None]
            if len(live) < LIVE_SHARE * len(batch):
                batch = [batch[i] for i in live]
                if batch:
                    inputs.keep(live)

    def _step(self, batch: Sequence[_Row], inputs: _Inputs) -> torch.Tensor:
        """One forward pass: the next token of every row, [B]; the joint is read before the rows are banned."""
        logits = (
            self.model(
                input_ids=inputs.ids,
                attention_mask=inputs.mask,
                position_ids=inputs.positions,
                past_key_values=inputs.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        if self.settings.joint is not None:
            joint = logits[:, self.settings.joint.layout.joint_slice].softmax(-1).cpu().numpy()
            for row, reading in zip(batch, joint, strict=True):
                if row.finish_reason is None:
                    row.joint.append(reading)
        for first, last in self.settings.banned:
            logits[:, first:last] = -torch.inf
        return sample(logits, self.settings.sampling, [row.generator for row in batch])
